"""Tables, ratios, comparison and picture of results whose numbers are worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.report import main
from benchmarks.tables import compare, duration, markdown, speed, targets

from .made import raw, result, row, sorting


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.0, "1 s"),
        (61.4, "61.4 s"),
        (0.9999, "1 s"),
        (0.0123, "12.3 ms"),
        (0.123456, "123 ms"),
        (9.876e-5, "98.8 us"),
        (2e-9, "2 ns"),
        (0.0, "0 s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_speed_is_the_ratio_of_medians_with_the_far_ends_of_the_quartiles() -> None:
    ours, peer = sorting()["benchmarks"]
    # 30 / 10; 0.8 * 30 / (1.2 * 10); 1.2 * 30 / (0.8 * 10)
    assert speed(ours, peer) == pytest.approx((3.0, 2.0, 4.5))


@pytest.mark.parametrize(("peer", "verdict"), [(0.030, "met"), (0.020, "met"), (0.0199, "**below**")])
def test_target_is_met_from_the_target_on(peer: float, verdict: str) -> None:
    (line,) = targets(sorting(peer=peer))
    assert line[:3] == ["sorting", "quick", "theirs"]
    assert line[-2:] == ["2", verdict]


def test_target_against_a_peer_that_did_not_run_is_left_out() -> None:
    data = sorting()
    del data["benchmarks"][1]
    assert targets(data) == []


def test_markdown_has_every_figure() -> None:
    data = sorting()
    reason = "kornia is not installed"
    data["skipped"] = [{"name": f"bench_x.py::test_x[{case}]", "reason": reason} for case in ("a", "b-c")]
    text = markdown(data)
    assert "| **quick** | 10 ms | 4 ms | 7 | theirs 3.00 (2.00 .. 4.50) | items 5 |" in text
    assert "| theirs | 30 ms | 12 ms | 7 |  |  |" in text
    assert "| sorting | quick | theirs | 3.00 (2.00 .. 4.50) | 2 | met |" in text
    assert "commit `0123456789`." in text
    assert "torch 2.13.0" in text
    assert "| bench_x.py::test_x | 2 | kornia is not installed |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_busy_machine_is_named() -> None:
    assert "busy" not in markdown(sorting())
    busy = sorting()
    busy["machine"]["load"] = 1.4
    assert "**The machine was busy** (load average 1.4 before the run)" in markdown(busy)
    assert "**The machine was busy**" in compare(sorting(), busy)


def test_markdown_leaves_out_empty_columns() -> None:
    text = markdown(result(row("alone", "only", (1.0, 2.0, 3.0), "ours")))
    assert "| side | median | IQR | rounds |\n" in text
    assert "## Targets" not in text
    assert "## Not run" not in text


def _spread(before: tuple[float, float, float], after: tuple[float, float, float]) -> str:
    text = compare(result(row("g", "s", before, "ours")), result(row("g", "s", after, "ours")))
    (line,) = [line for line in text.splitlines() if line.startswith("| g | s |")]
    return line


@pytest.mark.parametrize(
    ("after", "ratio", "flag"),
    [
        ((1.5, 2.5, 3.5), "1.25", ""),  # quartiles overlap
        ((3.0, 4.0, 5.0), "2.00", ""),  # and here they touch
        ((3.1, 4.0, 5.0), "2.00", "**slower**"),
        ((0.5, 0.8, 0.9), "0.40", "**faster**"),
    ],
)
def test_compare_flags_changes_beyond_the_spread(
    after: tuple[float, float, float], ratio: str, flag: str
) -> None:
    assert _spread((1.0, 2.0, 3.0), after).endswith(f"| {ratio} | {flag} |")


def test_compare_names_what_differs() -> None:
    before, after = sorting(), sorting()
    after["machine"]["cores"] = 4
    after["versions"]["kornia"] = "0.9.0"
    after["commit"]["id"] = "fedcba9876543210"
    after["benchmarks"][1]["side"] = "others"
    text = compare(before, after)
    assert text.startswith("# `fedcba9876` of 2025-01-31 against `0123456789` of 2025-01-31")
    assert "**Different machine**: cores 2 -> 4." in text
    assert "**Different versions**: kornia None -> 0.9.0." in text
    assert "Only before: sorting: theirs." in text
    assert "Only after: sorting: others." in text
    assert "| sorting | quick | 10 ms | 10 ms | 1.00 |  |" in text


def test_command_writes_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "raw.json"
    source.write_text(json.dumps(raw()))
    assert main([str(source), "--out", str(tmp_path / "out"), "--save", str(tmp_path / "kept")]) == 0
    table = (tmp_path / "out" / "report.md").read_text()
    assert table in capsys.readouterr().out
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(p.name for p in (tmp_path / "kept" / "some-cpu-2-cores").iterdir())
    assert names == [f"2025-01-31-0123456789.{end}" for end in ("json", "md", "png")]


def test_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("a", sorting()), ("b", sorting(ours=0.020))):
        (tmp_path / name).write_text(json.dumps(data))
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| sorting | quick | 10 ms | 20 ms | 2.00 | **slower** |" in text
    assert (tmp_path / "compare.md").read_text() in text


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "expected either one RESULT.json or --compare" in capsys.readouterr().err
    bad = sorting()
    bad["schema"] = 7
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    assert main([str(tmp_path / "bad.json")]) == 2
    assert "schema: expected 1, got 7" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
