"""Result files: what is valid, what the conversion keeps, and that every committed file is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from benchmarks.machine import machine, slug, versions
from benchmarks.results import ROOT, convert, load, save
from benchmarks.schema import validate

from .made import raw, result, row, sorting

COMMITTED = sorted(ROOT.rglob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_committed_results_are_valid_and_where_they_belong(path: Path) -> None:
    data = json.loads(path.read_text())
    validate(data)
    assert path.parent == ROOT / slug(data["machine"])
    assert data["commit"]["id"].startswith(path.stem.rpartition("-")[2])
    for group in {r["group"] for r in data["benchmarks"]}:
        roles = [r["role"] for r in data["benchmarks"] if r["group"] == group]
        assert "ours" in roles, f"{group}: nothing of ours"


def test_results_folder_holds_results_only() -> None:
    others = [p.name for p in ROOT.rglob("*") if p.is_file() and p.suffix not in (".json", ".md", ".png")]
    assert not others


def _set(data: dict[str, Any], path: list[str | int], value: Any) -> None:
    for step in path[:-1]:
        data = data[step]
    data[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 2, "schema: expected 1, got 2"),
        (["schema"], True, "schema: expected .*int.*, got True"),
        (["created"], "2025-01-31", "created: expected an ISO 8601 time with its zone"),
        (["created"], "yesterday", "created: expected an ISO 8601 time"),
        (["machine", "load"], -1, "machine.load: expected an average of 0 or more, got -1"),
        (["machine", "cores"], "2", "machine.cores: expected .*int.*, got '2'"),
        (["machine", "node"], "host", "machine: expected keys .* unknown \\['node'\\]"),
        (["machine", "cpu"], "as in /home/someone/cpu", "machine.cpu: expected no file path"),
        (["commit"], {"id": "1"}, "commit: expected keys .* missing \\['dirty'\\]"),
        (["versions"], {"python": "3"}, "versions: expected an entry 'torch', got \\['python'\\]"),
        (["benchmarks"], [], "benchmarks: expected at least one, got none"),
        (["benchmarks", 1, "side"], "quick", "benchmarks\\[1\\]: expected each side of a group once"),
        (
            ["benchmarks", 0, "role"],
            "mine",
            "benchmarks\\[0\\].role: expected one of 'ours', 'peer', got 'mine'",
        ),
        (["benchmarks", 0, "median"], 9.0, "benchmarks\\[0\\]: expected 0 < min <= q1 <= median <= q3"),
        (["benchmarks", 0, "min"], 0.0, "benchmarks\\[0\\]: expected 0 < min"),
        (["benchmarks", 0, "q3"], float("nan"), "benchmarks\\[0\\]: expected 0 < min"),
        (["benchmarks", 0, "rounds"], 4, "benchmarks\\[0\\].rounds: expected 5 or more, got 4"),
        (["benchmarks", 0, "targets"], {"theirs": 0}, "targets\\['theirs'\\]: expected a ratio > 0, got 0"),
        (["benchmarks", 0, "notes"], {"a": [1]}, "notes\\['a'\\]: expected a number or a text"),
        (["skipped"], [{"name": "x"}], "skipped\\[0\\]: expected keys"),
    ],
)
def test_what_is_wrong_is_named(path: list[str | int], value: Any, message: str) -> None:
    data = sorting()
    validate(data)
    _set(data, path, value)
    with pytest.raises(ValueError, match=message):
        validate(data)


@pytest.mark.parametrize("data", [[], "text", None])
def test_result_must_be_an_object(data: Any) -> None:
    with pytest.raises(ValueError, match="result: expected an object"):
        validate(data)


def test_conversion_keeps_labels_times_and_facts() -> None:
    data = convert(raw())
    validate(data)
    times = {"median": 2.0, "q1": 1.0, "q3": 3.0, "min": 0.5, "rounds": 8}
    assert data["benchmarks"] == [
        {
            "group": "labelled",
            "side": "mine",
            "role": "ours",
            "targets": {"other": 2},
            "notes": {"gigaflop": 3.5},
            **times,
        },
        {"group": "labelled", "side": "other", "role": "peer", "targets": {}, "notes": {}, **times},
        # without labels: the parameter that differs within the group, the first is ours
        {"group": "plain", "side": "fused", "role": "ours", "targets": {}, "notes": {}, **times},
        {"group": "plain", "side": "loops", "role": "peer", "targets": {}, "notes": {}, **times},
        {
            "group": "test_c",
            "side": "test_c",
            "role": "ours",
            "targets": {},
            "notes": {"timer": "process_time"},
            **times,
        },
    ]
    assert data["commit"] == {"id": "0123456789abcdef", "dirty": True}
    assert data["skipped"] == [{"name": "bench_d.py::test_d", "reason": "kornia is not installed"}]


def test_saved_file_comes_back(tmp_path: Path) -> None:
    data = convert(raw())
    path = save(data, tmp_path)
    assert path == tmp_path / "some-cpu-2-cores" / "2025-01-31-0123456789.json"
    assert load(path) == data
    (tmp_path / "raw.json").write_text(json.dumps(raw()))
    assert load(tmp_path / "raw.json") == data


def test_json_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    with pytest.raises(ValueError, match="other.json: expected a result file or the --benchmark-json of"):
        load(path)


def test_facts_of_this_machine_make_a_valid_result() -> None:
    facts = machine("Some CPU")
    data = result(row("g", "s", (1.0, 2.0, 3.0), "ours"), machine=facts, versions=versions())
    validate(data)
    assert facts["threads"] <= facts["cores"]
    assert slug({**facts, "gpu": None, "cores": 2}) == "some-cpu-2-cores"


def test_peers_are_pinned_and_move_no_other_pin(repo_root: Path) -> None:
    folder = repo_root / "requirements"

    def names(path: Path) -> dict[str, list[Requirement]]:
        found: dict[str, list[Requirement]] = {}
        for line in path.read_text().splitlines():
            if text := line.partition("#")[0].strip():
                requirement = Requirement(text)
                found.setdefault(requirement.name.lower().replace("_", "-"), []).append(requirement)
        return found

    peers = names(folder / "bench.txt")
    assert {"albumentations", "torchattacks", "imagecorruptions", "triton-augment"} <= set(peers)
    assert {"kornia", "mmdet"} <= set(names(folder / "dev.txt"))  # peers too, which the tests need
    assert all(str(r.specifier).startswith("==") for pins in peers.values() for r in pins)
    for other in folder.rglob("*.txt"):
        if other.name != "bench.txt":
            assert not set(peers) & set(names(other)), other.name
