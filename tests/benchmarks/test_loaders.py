"""The loaders' benchmark: what it reads, that both sides read the same, its table by hand."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.machine import versions
from benchmarks.pipelines.loaders import run, sets, table
from ikd_fast.demo.data import TRAIN_IMAGES

VOC = """<annotation><object><name>Tree</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>
</annotation>"""


@pytest.fixture
def photos(monkeypatch) -> dict[str, np.ndarray]:
    """Photographs of our own in place of the demo's, which would be downloaded; a tree in the first one's corner."""
    rng = np.random.default_rng(0)
    found, files = {}, {}
    for name in TRAIN_IMAGES:
        found[name] = np.kron(rng.integers(0, 256, (31, 42, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        stored = io.BytesIO()
        Image.fromarray(found[name]).save(stored, "PNG")
        files[f"{name}.png"] = stored.getvalue()
        files[f"{name}.xml"] = VOC.format(100, 120, 180, 200).encode()
    monkeypatch.setattr(sets, "read_source", lambda: files)
    return found


def test_the_set_is_cut_from_the_photographs(photos, tmp_path) -> None:
    root = sets.jpeg_set(tmp_path, 6)
    content = json.loads((root / "annotations" / "train.json").read_text())
    assert len(content["images"]) == 6
    for entry in content["images"]:
        image = np.asarray(Image.open(root / "train" / entry["file_name"]).convert("RGB"))
        assert image.shape == (480, 640, 3)
        (box,) = (a["bbox"] for a in content["annotations"] if a["image_id"] == entry["id"])
        # Photographs are 672 x 496, so that every cut has the whole tree; its place says where the cut is.
        x, y = 100 - box[0], 120 - box[1]
        assert box[2:] == [80, 80]
        cuts = [photo[int(y) : int(y) + 480, int(x) : int(x) + 640].astype(int) for photo in photos.values()]
        # The right one is a JPEG's distance away, others hundreds of random blocks.
        assert min(np.abs(image.astype(int) - cut).mean() for cut in cuts) < 12
    stamp = (root / "train" / "00000.jpg").stat().st_mtime_ns
    sets.jpeg_set(root, 6)
    assert (root / "train" / "00000.jpg").stat().st_mtime_ns == stamp


def passes(*rows: tuple[float, float]) -> list[dict]:
    return [dict(seconds=s, cpu_seconds=c, images=100) for s, c in rows]


RESULT = dict(
    created="2026-01-02T03:04:05+00:00",
    machine=dict(cpu="A processor", gpu=None, cores=2, load=0.1),
    commit=dict(id="0123456789abcdef", dirty=False),
    device="cpu",
    rounds=3,
    stages={"decode": {"cv2": [0.002, 0.002, 0.002], "DALI": [0.003, 0.004, 0.005]}},
    work={
        "some images": [
            dict(name="mmdet", workers=1, passes=passes((1.0, 1.0), (2.0, 1.0), (1.0, 1.0))),
            dict(name="DALI and cv2", workers=1, passes=passes((0.5, 0.25), (0.5, 0.25), (0.5, 0.25))),
        ]
    },
)


def test_table_by_hand() -> None:
    text = table.markdown(RESULT)
    assert text.startswith("2026-01-02, commit `0123456789`, A processor, 2 cores, DALI on the CPU; ")
    assert "busy" not in text
    # 100 images in 1, 2 and 1 seconds; quartiles of three values are half way.
    assert "| 1 | mmdet | 100 (75 .. 100) | 10.0 (10.0 .. 10.0) |  |  |" in text
    assert (
        "| 1 | DALI and cv2 | 200 (200 .. 200) | 2.5 (2.5 .. 2.5) | 2.00 (2.00 .. 3.00) | 4.00 (4.00 .. 4.00) |"
        in text
    )
    assert "| decode | 2.00 (2.00 .. 2.00) | 4.00 (3.50 .. 4.50) | 2.00 (1.75 .. 2.25) |" in text
    busy = RESULT | dict(machine=RESULT["machine"] | dict(load=1.5))
    assert "**The machine was busy** (load average 1.5 before the run)" in table.markdown(busy)


def test_into_a_page(tmp_path, capsys) -> None:
    result, page = tmp_path / "loaders.json", tmp_path / "page.md"
    result.write_text(json.dumps(RESULT))
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        assert table.main([str(result), "--into", str(page)]) == 0
        before, _, rest = page.read_text().partition(table.BEGIN)
        inside, _, after = rest.partition(table.END)
        assert (before, after) == ("before\n", "\nafter\n")
        assert inside.strip() == table.markdown(RESULT).strip()
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        table.main([str(result), "--into", str(page)])
    assert "expected the lines <!-- dali: generated below -->" in capsys.readouterr().err


def test_what_is_missing_is_said(monkeypatch, tmp_path, capsys) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(run.importlib, "import_module", absent)
    assert run.main(["--out", str(tmp_path / "out"), "--device", "gpu"]) == 1
    said = capsys.readouterr().err
    assert "needs a CUDA device that torch sees; mmdet: pip install" in said
    assert 'nvidia.dali: pip install "ikd_fast[dali]"' in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        run.main(["--out", str(tmp_path), "--rounds", "1"])
    assert "--rounds must be 2 or more, for quartiles, got 1" in capsys.readouterr().err


def test_every_side_reads_the_same_images(photos, tmp_path) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'ikd_fast[dali]'")
    pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    from benchmarks.pipelines.loaders.sides import COCO, Side, config

    root = sets.jpeg_set(tmp_path / "set", 5)
    seen = {}
    for name, dali in run.settings("cpu").items():
        side = Side(config(root, COCO, 2), 1, dali)
        done = [side.read() for _ in range(2)]
        assert side.epoch == 2
        for one in done:
            assert one.images == 5
            assert one.seconds > 0
            assert one.cpu_seconds > 0
        side.loader.batch_sampler.sampler.set_epoch(0)
        seen[name] = [
            (sample.img_id, tuple(image.shape), sample.flip)
            for batch in side.loader
            for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True)
        ]
    assert [*seen] == ["mmdet", "DALI and cv2", "DALI alone"]
    assert len(set(map(tuple, seen.values()))) == 1
    assert all(shape == (3, 800, 1067) for _, shape, _ in seen["mmdet"])


def test_a_run_writes_its_result(photos, tmp_path, capsys) -> None:
    dali = pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'ikd_fast[dali]'")
    pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    assert run.main(["--out", str(tmp_path / "out"), "--images", "9", "--rounds", "2"]) == 0
    result = json.loads((tmp_path / "out" / "loaders.json").read_text())
    ((name, rows),) = result["work"].items()
    assert name == "9 JPEGs of 640 x 480"
    assert [(row["workers"], len(row["passes"])) for row in rows] == [
        (w, 2) for w in (1, 2) for _ in range(3)
    ]
    assert {image for row in rows for image in (p["images"] for p in row["passes"])} == {9}
    assert all(v > 0 for sides in result["stages"].values() for times in sides.values() for v in times)
    assert (tmp_path / "out" / "loaders.md").read_text() == table.markdown(result)
    assert table.markdown(result) in capsys.readouterr().out
    packages = [f"nvidia-dali-cuda{n}" for n in (120, 130)]
    assert any(versions().get(name) == dali.__version__ for name in packages)
