"""The published teachers as mmdet's metafiles list them, and downloads checked by the hash in their name."""

from __future__ import annotations

import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet
from ikd_fast.mmdet import build, published

import mmdet

ZOO = Path(mmdet.__file__).parent / ".mim" / "configs"


@pytest.mark.parametrize("family", published.TEACHERS)
def test_teachers_are_as_in_mmdets_metafile(family):
    import yaml

    teacher = published.TEACHERS[family]
    path = ZOO / teacher.config.removeprefix("mmdet::")
    assert path.is_file()
    models = yaml.safe_load((path.parent / "metafile.yml").read_text())["Models"]
    (model,) = [m for m in models if m["Name"] == path.stem]
    metrics = {key: value for result in model["Results"] for key, value in result["Metrics"].items()}
    assert metrics == {"box AP": teacher.box_ap} | (
        {} if teacher.mask_ap is None else {"mask AP": teacher.mask_ap}
    )
    assert model["Weights"] == teacher.url
    assert teacher.url.endswith(f"-{teacher.sha256_prefix}.pth")
    assert len(teacher.sha256_prefix) == 8


@pytest.mark.parametrize("family", published.TEACHERS)
def test_the_bases_name_these_teachers(family):
    from mmengine.config import Config

    config = Config.fromfile(build.resolve_path(f"ikd_fast::_base_/ikd_{family}.py", "configs"))
    teacher = published.TEACHERS[family]
    assert (config.model.teacher_config, config.model.teacher_ckpt) == (teacher.config, teacher.url)


class Site:
    """A folder served over HTTP on this machine, and torch.hub's cache in another."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root, self.cache, self.requests = root / "site", root / "hub", []
        self.root.mkdir()
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(self.cache))
        site = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, directory=str(site.root), **kwargs)

            def log_message(self, *args):
                site.requests.append(self.path)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def publish(self, weights: dict, name: str | None = None) -> str:
        path = self.root / "made.pth"
        torch.save(dict(meta=dict(epoch=12), state_dict=weights), path)
        name = name or f"net-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
        path.rename(self.root / name)
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}"


@pytest.fixture
def site(tmp_path, monkeypatch):
    made = Site(tmp_path, monkeypatch)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_download_is_checked_kept_and_read(site):
    weights = {"neck.weight": torch.arange(4.0)}
    url = site.publish(weights)
    for _ in range(2):
        read = build.read_checkpoint(url)
        assert read.keys() == weights.keys()
        assert torch.equal(read["neck.weight"], weights["neck.weight"])
    assert len(site.requests) == 1
    assert published.cached_path(url).parent == site.cache / "checkpoints"


def test_a_file_that_is_not_what_its_name_says(site):
    url = site.publish({"neck.weight": torch.zeros(1)}, "net-00000000.pth")
    with pytest.raises(ValueError, match=r"net-00000000\.pth is not the published file: expected .*00000000.*delete it"):  # fmt: skip
        build.read_checkpoint(url)


def test_a_cut_download_in_the_cache(site):
    """What an interrupted copy leaves behind; torch alone would fail with a message about zip archives."""
    url = site.publish({"neck.weight": torch.zeros(100)})
    path = published.fetch(url)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    got = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.raises(ValueError, match=rf"got {got} \({len(whole) // 2} bytes\)"):
        build.read_checkpoint(url)
    path.unlink()
    assert build.read_checkpoint(url)["neck.weight"].shape == (100,)


def test_a_name_without_a_hash_is_not_checked(site):
    url = site.publish({"neck.weight": torch.ones(1)}, "latest.pth")
    assert build.read_checkpoint(url)["neck.weight"].item() == 1


def test_no_network_says_where_the_file_may_be_put(site):
    url = site.publish({}, "net-11111111.pth").replace("net-", "other-")
    with pytest.raises(OSError, match=r"cannot be downloaded .*404.*put the file at .*other-11111111\.pth"):
        build.read_checkpoint(url)
    assert not published.cached_path(url).exists()


def test_deformable_weights_of_older_files_load(tmp_path):
    """mmcv renames ``conv2_offset`` to ``conv2.conv_offset`` while loading; a strict teacher must accept the same files."""
    from mmcv.cnn import build_conv_layer

    net = torch.nn.Module()
    net.conv2 = build_conv_layer(dict(type="DCN", deform_groups=1), 4, 4, 3, padding=1)
    old = {k.replace("conv2.conv_offset", "conv2_offset"): v for k, v in net.state_dict().items()}
    assert set(old) == {"conv2.weight", "conv2_offset.weight", "conv2_offset.bias"}
    torch.save(old, tmp_path / "old.pth")
    ikd_fast.distill.load_strict(net, build.read_checkpoint(str(tmp_path / "old.pth")))
