"""From pytest-benchmark's JSON to the result file of ``schema.py``, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .machine import slug
from .schema import VERSION, validate

ROOT = Path(__file__).parent / "results"
_LABELS = ("side", "role", "targets")


def convert(raw: dict[str, Any]) -> dict[str, Any]:
    """Result of a ``--benchmark-json`` file.

    A benchmark without a label goes by those of its parameters that differ within its group; the group's first is ours.
    """
    seen: set[str] = set()
    rows = []
    for entry in raw["benchmarks"]:
        stats, extra = entry["stats"], entry["extra_info"]
        group = entry["group"] or entry["name"]
        notes = {name: value for name, value in extra.items() if name not in _LABELS}
        if (timer := entry["options"]["timer"]) != "perf_counter":
            notes["timer"] = timer
        fellows = [e for e in raw["benchmarks"] if e["group"] == entry["group"]]
        rows.append(
            {
                "group": group,
                "side": extra.get("side") or _parameters(entry, fellows) or entry["name"],
                "role": extra.get("role") or ("peer" if group in seen else "ours"),
                "targets": extra.get("targets") or {},
                **{name: stats[name] for name in ("median", "q1", "q3", "min", "rounds")},
                "notes": notes,
            }
        )
        seen.add(group)
    return {
        "schema": VERSION,
        "created": raw["datetime"],
        "machine": raw["machine_info"]["ikd_fast"],
        "versions": raw["machine_info"]["versions"],
        "commit": {"id": raw["commit_info"]["id"], "dirty": raw["commit_info"]["dirty"]},
        "benchmarks": rows,
        "skipped": raw.get("skipped", []),
    }


def _parameters(entry: dict[str, Any], fellows: list[dict[str, Any]]) -> str:
    own = entry["params"] or {}
    varying = [
        name for name, value in own.items() if any((f["params"] or {}).get(name) != value for f in fellows)
    ]
    return ", ".join(str(own[name]) for name in varying)


def load(path: Path | str) -> dict[str, Any]:
    """A result file, or pytest-benchmark's JSON of a run of ours; validated."""
    data = json.loads(Path(path).read_text())
    if "schema" not in data:
        if "ikd_fast" not in data.get("machine_info", {}):
            raise ValueError(
                f"{Path(path).name}: expected a result file or the --benchmark-json of `pytest benchmarks/`, got keys {sorted(data)}"
            )
        data = convert(data)
    validate(data)
    return data


def save(result: dict[str, Any], root: Path = ROOT) -> Path:
    """``root/<machine>/<day>-<commit>.json``."""
    validate(result)
    folder = root / slug(result["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['created'][:10]}-{result['commit']['id'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
