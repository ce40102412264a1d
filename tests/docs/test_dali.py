"""docs/dali.md: what it names is there, and its code runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pipelines.loaders.table import BEGIN, END, markdown
from benchmarks.tables import IDLE

DOC = Path(__file__).parents[2] / "docs" / "dali.md"
TEXT = DOC.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def row(name: str) -> list[str]:
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_loop_of_ones_own_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: make dali, or pip install 'ikd_fast[dali]'")
    pytest.importorskip("PIL", reason="the example draws its pictures with Pillow")
    (code,) = [block for block in BLOCKS if "ikd.step" in block]
    space: dict = {}
    exec(compile(code, "dali.md", "exec"), space)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    seen = [
        re.fullmatch(r"(\d) \((.*)\) \[(.*)\] \[(.*)\] (-?\d+\.\d+)", line).groups() for line in lines[:-1]
    ]
    assert lines[-1] == "no file was left out"
    for epoch in "01":  # six images in batches of four, each once an epoch
        mine = [row for row in seen if row[0] == epoch]
        # 107 x 80 padded to multiples of 32
        assert [row[1] for row in mine] == ["4, 3, 96, 128", "2, 3, 96, 128"]
        assert sorted(i for row in mine for i in row[2].split(", ")) == list("012345")
    assert seen[0][2:4] != seen[2][2:4]
    assert space["loader"].skips.count == 0
    (views,) = [block for block in BLOCKS if "View.identity" in block]
    exec(compile(views, "dali.md", "exec"), space)
    assert len(space["views"]) == len(space["targets"]) == 2
    for view, target in zip(space["views"], space["targets"], strict=True):
        assert view.size == target["size"] == (80, 107)
        # The object's corners in the file, 8..56 by 8..48; mirrored ones change places.
        ends = np.array([[8.0, 8.0], [48.0, 56.0]]) * view.scale + view.offset
        box = np.sort(ends, axis=0)[:, ::-1].reshape(-1)
        assert np.allclose(box, target["boxes"][0], atol=1e-4)  # float32
    # As the document says, the default normalisation is the one that the example gives the model.
    assert (space["loader"].collate.mean, space["loader"].collate.std) == (space["mean"], space["std"])


def test_the_config_lines_switch_it_on(tmp_path: Path) -> None:
    pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    from ikd_fast.mmdet.dali.build import is_dali

    from mmengine.config import Config

    (code,) = [block for block in BLOCKS if "train_dataloader = " in block]
    (tmp_path / "base.py").write_text(
        "train_dataloader = dict(batch_size=3, sampler=dict(type='KeyedSampler'))\n"
    )
    (tmp_path / "c.py").write_text(f"_base_ = './base.py'\n{code}")
    loader = Config.fromfile(tmp_path / "c.py").train_dataloader
    assert is_dali(loader)
    assert (loader.batch_size, loader.sampler.type) == (3, "KeyedSampler")


def test_the_transforms_are_those_that_it_follows() -> None:
    pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    from ikd_fast.mmdet.dali.host_transforms import _HOSTS

    followed = set(re.findall(r"`(\w+)`", row("transforms")[1]))
    assert followed == {kind.__name__.removesuffix("Transform") for kind in _HOSTS}
    assert not followed & set(re.findall(r"`(\w+)`", row("transforms")[2]))


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT))))
def test_links_exist(link: str) -> None:
    assert (DOC.parent / link).is_file()


def test_the_table_is_that_of_the_committed_result() -> None:
    result = json.loads((DOC.parent / "results" / "loaders" / "loaders.json").read_text())
    inside = TEXT.partition(BEGIN)[2].partition(END)[0]
    assert inside.strip() == markdown(result).strip()
    assert result["machine"]["load"] <= IDLE
