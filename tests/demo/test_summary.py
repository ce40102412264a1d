"""Mean, interval and the schema of ``summary.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import t, tstd

from ikd_fast.demo import summary
from ikd_fast.demo.plan import Settings
from ikd_fast.demo.table import result_table, seeds_table
from ikd_fast.intervals import spread

METRICS = ["AP", "AP50", "AP_S", "AP_M", "AP_L"]
SETTINGS = Settings(steps=400, seed=5, data="d", teacher="t", quick=False)


def scores(ap50: float) -> dict[str, float | None]:
    return {"AP": ap50 / 2, "AP50": ap50, "AP_S": 0.1, "AP_M": 0.2, "AP_L": None}


def row(ap50: float, seconds: float | None) -> dict[str, object]:
    return {"val": scores(ap50), "test": scores(ap50 / 4), "seconds_per_step": seconds}


RESULTS = {
    5: {"teacher": row(0.5, None), "alone": row(0.30, 0.2), "fgd": row(0.34, 0.4), "fgd_ikd": row(0.36, 0.8)},
    6: {"teacher": row(0.5, None), "alone": row(0.32, 0.2), "fgd": row(0.33, 0.4), "fgd_ikd": row(0.33, 0.8)},
    7: {"teacher": row(0.5, None), "alone": row(0.28, 0.2), "fgd": row(0.32, 0.4), "fgd_ikd": row(0.37, 0.8)},
}


def test_spread_is_scipys_interval() -> None:
    points = [0.31, 0.355, 0.29, 0.342]
    s = spread(points)
    low, high = t.interval(0.95, len(points) - 1, loc=s.mean, scale=tstd(points) / math.sqrt(len(points)))
    assert (s.mean, s.low, s.high) == pytest.approx((sum(points) / 4, low, high), rel=1e-12)


def test_one_point_is_its_own_interval() -> None:
    assert spread([0.4]) == (0.4, 0.4, 0.4)


def test_schema(tmp_path: Path) -> None:
    found = summary.build(SETTINGS, 400, {5: RESULTS[5]}, 61.234)
    written = json.loads(summary.write(tmp_path, found).read_text())
    assert written == found
    assert list(written["models"]) == ["teacher", "alone", "fgd", "fgd_ikd"]
    assert all(list(model) == METRICS for model in written["models"].values())
    assert written["models"]["fgd"]["AP50"] == 0.34
    assert written["models"]["fgd"]["AP_L"] is None
    assert written["seconds_per_step"] == {"alone": 0.2, "fgd": 0.4, "fgd_ikd": 0.8}
    assert (written["steps"], written["seed"]) == (400, 5)
    assert {"python", "torch", "mmdet", "mmengine", "pycocotools"} <= set(written["versions"])
    assert "seeds" not in written


def test_schema_of_several_seeds() -> None:
    found = summary.build(SETTINGS, 400, RESULTS, 1.0)["seeds"]
    assert found["list"] == [5, 6, 7]
    alone = found["models"]["alone"]
    assert alone["AP50"]["points"] == [0.30, 0.32, 0.28]
    assert alone["AP50"]["mean"] == pytest.approx(0.30)
    # s = 0.02, t(0.975, 2) = 4.3027: 0.30 +- 4.3027 * 0.02 / sqrt(3)
    assert alone["AP50"]["interval95"] == pytest.approx([0.30 - 0.049683, 0.30 + 0.049683], abs=1e-5)
    assert "AP_L" not in alone


def printed(*tables: object, width: int = 80) -> str:
    console = Console(width=width, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables:
        console.print(table)
    return console.export_text()


def test_the_table_fits_80_columns_with_whole_names() -> None:
    text = printed(result_table(RESULTS[5], steps=400, images={"train": 86, "val": 22, "test": 2}, title="t"))
    for whole in ("student + FGD + IKD", "student alone", "AP_S", "36.0", "9.0", "0.80", "22 val images"):
        assert whole in text
    assert "AP_L" not in text.split("COCO box AP")[0]  # no model has a value: no column
    assert max(map(len, text.splitlines())) <= 80


def test_paired_differences_are_of_the_same_seed() -> None:
    text = printed(seeds_table(RESULTS, steps=400, images={"train": 86, "val": 22}), width=120)
    # fgd_ikd minus fgd: 2, 0, 5 points of AP50; mean 7/3
    lines = [line for line in text.splitlines() if "2.0  0.0  5.0" in line]
    assert len(lines) == 1
    assert "2.3" in lines[0]
