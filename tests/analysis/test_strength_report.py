"""The whole report on a convolution with a template: rows that carry explains, resuming, Markdown and picture."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from ikd_fast import PixelUnits
from ikd_fast.analysis.strength import (
    StrengthBatch,
    StrengthSettings,
    measure_strength,
    report_markdown,
    total_work,
)
from ikd_fast.analysis.strength.measure import attacked_rows, carried
from ikd_fast.analysis.strength.plan import candidates

pytest.importorskip("cv2", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

SIDE, IMAGES, EPS = 24, 3, 8.0
KINDS = ("carry", "carry, feature", "carry, fresh", "carry, crop_align 8")


class Net:
    """Map 0.02 times a 3x3 mirror-symmetric high-pass of the image; class loss its mean square.

    Symmetric, so that a perturbation means the same mirrored, and convolutional, so that it means the same shifted: what is
    carried through flips and crops is worth as much as what stays.
    """

    def __init__(self):
        self.calls = 0
        kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]) * 0.02
        self.kernel = kernel.expand(3, 1, 3, 3)

    def features(self, x):
        self.calls += 1
        return [F.conv2d(x, self.kernel, padding=1, groups=3)]

    def loss_of(self, maps):
        return maps[0].square().flatten(1).mean(1)

    def cls_loss(self, x, targets):
        return self.loss_of(self.features(x))

    def maps_and_loss(self, batch):
        maps = self.features(batch.images)
        return maps, self.loss_of(maps)


class Toy:
    units, rgb, divisor, batches_count = PixelUnits(value_range=(0, 255)), True, 1, 2

    def __init__(self):
        self.victim = Net()
        self.x = torch.rand(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 60 + 90

    def batches(self):
        for rows in ([0, 1], [2]):
            n = len(rows)
            yield StrengthBatch(self.x[rows], None, [(SIDE, SIDE)] * n, rows, [(SIDE, SIDE)] * n, rows)

    def look(self, images, batch, maps):
        return self.victim.loss_of(maps), list(batch.payload)

    def score(self, found):
        assert found == [0, 1, 2]
        return {"AP50": 0.5, "AP": 0.25}


@pytest.fixture(scope="module")
def rows():
    settings = StrengthSettings(eps=(EPS,), seeds=(0,), visits=(1, 2, 4), steps=12)
    done = []
    found = attacked_rows(Toy(), settings, eps=EPS, seed=0, advance=done.append)
    assert sum(done) * 1 + 2 * 2 == pytest.approx(total_work(settings, 2))
    return {row.name: row for row in found}


def test_every_attack_has_its_row_and_its_gradients(rows):
    evals = {name: row.gradient_evals for name, row in rows.items()}
    first = {name: evals.pop(name) for name in list(evals) if name.endswith("visit 1")}
    assert evals == {
        "random sign": 0, "single": 1, "single, feature": 1, "iterative": 5, "iterative, published round trip": 5,
        **{f"{kind}, visit {n}": 1 for kind in KINDS for n in (2, 4)}, "PGD-12": 12,
    }  # fmt: skip
    assert first == {f"{kind}, visit 1": 1 for kind in KINDS}


def test_bounds_hold_for_all_but_the_round_trip(rows):
    for name, row in rows.items():
        if "round trip" in name:
            assert row.linf > EPS
            assert 0 < row.outside < 0.5
        else:
            assert row.linf <= EPS + 1e-4
            assert row.outside == 0
    assert rows["random sign"].mean_abs == pytest.approx(EPS)


def test_stronger_attacks_have_larger_figures(rows):
    loss = {name: row.class_loss for name, row in rows.items()}
    assert loss["random sign"] < loss["iterative"] < loss["PGD-12"]
    assert loss["random sign"] < loss["single"]
    assert loss["iterative, published round trip"] < loss["iterative"]
    assert all(row.metrics == {"AP50": 0.5, "AP": 0.25} for row in rows.values())
    for row in rows.values():
        (level,) = row.levels
        assert level["l2"] == pytest.approx(row.feature_change)
        assert 0 <= level["cosine"] <= 2


def test_measured_visits_leave_the_chain_alone():
    """Visit 4 is the same whether visits 1 to 3 are measured too: each is measured on a memory of its own."""
    found = []
    for visits in ((4,), (1, 2, 3, 4)):
        toy = Toy()
        plan = {c.name: c for c in candidates(StrengthSettings(visits=visits), EPS)}
        batch = next(toy.batches())
        clean = toy.victim.features(batch.images)
        found.append({n: out.images for n, out, _ in carried(toy, plan["carry"], batch, clean, 0)})
    assert torch.equal(found[0][4], found[1][4])
    assert not torch.equal(found[1][1], found[1][4])


def test_report_resumes_and_is_written(tmp_path):
    settings = StrengthSettings(eps=(4.0, 8.0), seeds=(0,), visits=(1, 2), steps=4)
    toy, notes = Toy(), []

    def stop(text):
        notes.append(text)
        if len(notes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_strength(toy, settings, parts=tmp_path, note=stop)
    assert notes[:2] == ["clean images", "eps 8, seed 0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean.json", "eps8-seed0.json"]
    kept = (tmp_path / "eps8-seed0.json").read_text()
    more: list[str] = []
    work: list[float] = []
    report = measure_strength(Toy(), settings, parts=tmp_path, note=more.append, advance=work.append)
    assert more == ["eps 4, seed 0"]
    assert sum(work) == pytest.approx(total_work(settings, 2))
    assert (tmp_path / "eps8-seed0.json").read_text() == kept
    whole = measure_strength(Toy(), settings)
    for a, b in zip(report["rows"], whole["rows"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    json.dumps(report, allow_nan=False)

    text = report_markdown(report)
    lines = text.splitlines()
    assert "## eps 4" in lines
    assert "## eps 8" in lines
    tables = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("\n\n")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables if table)
    assert any(line.startswith("| carry, visit 2 |") for line in lines)

    from PIL import Image

    from ikd_fast.analysis.strength.picture import draw_strength

    with Image.open(draw_strength(tmp_path / "p.png", report)) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 700
