"""docs/losses.md: every loss, preset, config and argument it names is there, and its code runs as it stands."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ikd_fast
from ikd_fast.losses import KDLoss, build_loss, loss_class, loss_names
from ikd_fast.losses.presets import PRESETS
from tests.losses.setups import context, pyramid

DOC = Path(__file__).parents[2] / "docs" / "losses.md"
TEXT = DOC.read_text()
LINKS = sorted(set(re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)))
CONFIGS = Path(__file__).parents[2] / "configs" / "ikd"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, its header and rule left out."""
    part = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    assert all(len(row) == len(cells[0]) for row in cells), heading
    return cells[2:]


def library() -> list[str]:
    """Not the losses that other tests register."""
    return [name for name in loss_names() if loss_class(name).__module__.startswith("ikd_fast.losses")]


def test_every_loss_has_a_full_row_and_is_exported():
    found = {row[0].strip("`").removeprefix("ikd_fast."): row for row in rows("The losses")}
    assert sorted(found) == library()
    for name, row in found.items():
        assert all(row)
        assert getattr(ikd_fast, name) is loss_class(name)
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", row[-1]) or (name, row[-1]) == (
            "FGDLoss",
            "1",
        )


@pytest.mark.parametrize("row", rows("The losses"), ids=lambda row: row[0])
def test_the_defaults_are_the_losses_own(row):
    """`name value` in the column of defaults is what an object without arguments has."""
    loss = build_loss({"type": row[0].strip("`").removeprefix("ikd_fast.")})
    for name, value in re.findall(r"\b([a-z]\w+|p) (\d[\d.e-]*)", row[4]):
        assert getattr(loss, name) == float(value), name
    for values in re.findall(r"weight \(([\d, ]+)\)", row[4]):
        assert loss.weight == tuple(map(float, values.split(",")))
    for name, value in re.findall(r"`(\w+)=(?:\"(\w+)\"|True)`", row[4]):
        assert getattr(loss, name) == (value or True), name


def shown(values: dict) -> str:
    """A preset's numbers as the table writes them."""
    parts = [
        f"{key} {value:g}" for key, value in values.items() if key != "levels" and not isinstance(value, bool)
    ]
    parts += [key for key, value in values.items() if value is True]
    levels = values["levels"]
    return ", ".join([*parts, "all levels" if levels is None else f"levels 0 to {max(levels)}"])


def test_the_presets_are_as_written():
    header = next(line for line in TEXT.splitlines() if line.startswith('| | `"'))
    families = re.findall(r'"(\w+)"', header)
    assert sorted(families) == sorted(PRESETS)
    table = {row[0].strip("`"): row[1:] for row in rows("Presets")}
    assert set(table) == {name for values in PRESETS.values() for name in values}
    for name, cells in table.items():
        for preset, cell in zip(families, cells, strict=True):
            assert cell == (shown(PRESETS[preset][name]) if name in PRESETS[preset] else ""), (name, preset)
            if name == "IKD":
                continue
            if not cell:
                with pytest.raises(ValueError, match=f"preset '{preset}' has no numbers for '{name}'"):
                    build_loss({"type": name, "preset": preset})
                continue
            loss = build_loss({"type": name, "preset": preset})
            assert {key: getattr(loss, key) for key in PRESETS[preset][name]} == PRESETS[preset][name]


@pytest.mark.parametrize("link", [link for link in LINKS if not link.startswith("https://")])
def test_links_exist(link):
    assert (DOC.parent / link).is_file()


def test_symbols_import():
    for symbol in set(re.findall(r"`(ikd_fast(?:\.\w+)+)", TEXT)):
        if symbol.startswith("ikd_fast.mmdet"):
            pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
        parts = symbol.split(".")
        for n in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:n]))
            except ModuleNotFoundError:
                continue
            break
        for part in parts[n:]:
            found = getattr(found, part)


def headers(name: str) -> str:
    """The comment at the top of a config."""
    lines = (CONFIGS / f"{name}.py").read_text().splitlines()
    return " ".join(line.strip("# ") for line in lines if line.startswith("#"))


def test_every_config_is_in_the_paper_or_here():
    paper = (DOC.parent / "paper.md").read_text()
    shipped = {path.stem for path in CONFIGS.glob("*.py")}
    assert {name for name in shipped if f"/{name}.py)" not in paper + TEXT} == set()


@pytest.mark.parametrize("row", rows("Configurations"), ids=lambda row: f"{row[0]}, {row[1]}")
def test_configs_say_the_same_as_their_row(row):
    links = dict(re.findall(r"\[([a-zA-Z ]+)\]\(\.\./configs/ikd/(.+?)\.py\)", row[2]))
    assert "no published run" in headers(links["with IKD"])
    if "alone" not in links:
        assert row[3] == "no published run"
        return
    assert links["with IKD"] == re.sub(r"_(\dx_coco)$", r"_ikd_\1", links["alone"])
    text = headers(links["alone"])
    paper, published = (
        re.search(p, text) for p in (r"Paper: ([\d.]+) COCO", r"Published: ((?:[^.]|\.\d)+)\.")
    )
    parts = [f"{paper[1]} (IKD's Table 1)"] if paper else []
    assert row[3] == "; ".join(parts + ([published[1]] if published else []))


@pytest.mark.parametrize("row", rows("From other code"), ids=lambda row: row[0][:40])
def test_what_arguments_became_exists(row):
    named = re.findall(r"`(\w+)\((\w+)=", row[1])
    assert named or "adv=dict" in row[1] or row[1].startswith("not needed")
    for owner, argument in named:
        if owner == "IKDDistiller":
            pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
            from ikd_fast.mmdet import IKDDistiller as kind
        else:
            kind = loss_class(owner)
        assert argument in inspect.signature(kind).parameters, row


@pytest.fixture(scope="module")
def own() -> type[KDLoss]:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "register_loss" in block]
    space: dict = {"__name__": "docs_losses"}
    exec(compile(code, "losses.md", "exec"), space)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 15
    return space["CosineLoss"]


def test_ones_own_loss_in_15_lines(own):
    """Built by name, its value by hand in float64, its gradient the student's alone, its align layer trained."""
    loss = build_loss(dict(type="CosineLoss", weight=2.0, levels=[0, 1]))
    assert type(loss) is own
    s, t = [x.requires_grad_() for x in pyramid(4, 1)], pyramid(4, 2)
    got = loss(s, t, context())
    assert list(got) == ["0", "1"]
    for level in (0, 1):
        a, b = (x[level].detach().double().numpy() for x in (s, t))
        cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        assert float(got[str(level)].detach()) == pytest.approx(2 * (1 - cosine.mean()), rel=1e-5)  # float32
    sum(got.values()).backward()
    assert s[0].grad.abs().max() > 0
    assert s[2].grad is None
    wide = own()
    wide.bind([3, 3, 3], [4, 4, 4])
    wide(pyramid(3, 1), t, context())["2"].backward()
    assert wide.align["2"].weight.grad.abs().max() > 0


def test_ones_own_loss_in_a_step(own):
    """Beside FGD in ``IKD``, under the names that the document gives."""
    net, teacher = (torch.nn.Sequential(torch.nn.Conv2d(3, c, 3, 4, 1), torch.nn.ReLU()) for c in (4, 6))
    ikd = ikd_fast.IKD(
        net, teacher, features="1", losses=[ikd_fast.FGDLoss(), own()], task_loss=lambda net, x, y: net(x).mean(),
    )  # fmt: skip
    targets = [dict(boxes=torch.tensor([[2.0, 2.0, 20.0, 20.0]]), labels=torch.tensor([0]))] * 2
    out = ikd.step(torch.rand(2, 3, 32, 32), targets, image_ids=[0, 1], epoch=0)
    assert {"kd/fgd", "kd/cosine"} <= out.terms.keys()
    out.total.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["L1Loss", "L2Loss", "SSIMLoss"])
def test_in_an_mmdet_config_a_name_is_the_librarys_also_where_mmdet_has_it(name):
    pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    from ikd_fast.mmdet.settings import build_kd_loss

    assert type(build_kd_loss(dict(type=name))) is getattr(ikd_fast, name)


def test_the_list_of_two_losses_is_the_configs(own):
    pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    from mmengine.config import Config

    (code,) = [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.S) if b.startswith("losses = [")]
    space: dict = {}
    exec(compile(code, "losses.md", "exec"), space)
    config = Config.fromfile(CONFIGS / "retinanet_x101-64x4d_r50_fgd-cwd_ikd_2x_coco.py")
    assert [dict(loss) for loss in config.model.losses] == space["losses"]
