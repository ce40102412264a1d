"""Small results made by hand."""

from __future__ import annotations

import copy
from typing import Any


def row(
    group: str, side: str, times: tuple[float, float, float], role: str = "peer", **more: Any
) -> dict[str, Any]:
    """``times``: first quartile, median, third quartile in seconds."""
    q1, median, q3 = times
    measured = {"median": median, "q1": q1, "q3": q3, "min": q1 / 2, "rounds": 7}
    return {"group": group, "side": side, "role": role, "targets": {}, "notes": {}, **measured, **more}


def result(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = {
        "schema": 1,
        "created": "2025-01-31T12:00:00+00:00",
        "machine": {
            "cpu": "Some CPU",
            "cores": 2,
            "threads": 2,
            "memory_gib": 15.6,
            "system": "Linux",
            "arch": "x86_64",
            "load": 0.1,
            "gpu": None,
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6", "ikd_fast": "0.1.0"},
        "commit": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": list(rows),
        "skipped": [],
    }
    return copy.deepcopy({**made, **changes})


def sorting(ours: float = 0.010, peer: float = 0.030) -> dict[str, Any]:
    """One group: ours with a target of 2 against "theirs", 20 % of spread on each side."""

    def around(t: float) -> tuple[float, float, float]:
        return 0.8 * t, t, 1.2 * t

    return result(
        row("sorting", "quick", around(ours), "ours", targets={"theirs": 2.0}, notes={"items": 5}),
        row("sorting", "theirs", around(peer)),
    )


def raw() -> dict[str, Any]:
    """What pytest-benchmark writes, shortened to what the conversion reads, and some more."""
    stats = {"min": 0.5, "q1": 1.0, "median": 2.0, "q3": 3.0, "max": 9.0, "rounds": 8, "iqr": 2.0}

    def entry(name: str, group: str | None, params: dict | None, **extra: Any) -> dict[str, Any]:
        return {
            "group": group,
            "name": f"test_{name}",
            "fullname": f"benchmarks/bench_{name}.py::test_{name}",
            "params": params,
            "param": "-".join(map(str, (params or {}).values())) or None,
            "extra_info": extra,
            "stats": stats,
            "options": {"timer": "process_time" if name == "c" else "perf_counter"},
        }

    made = result()
    return {
        "datetime": made["created"],
        "machine_info": {
            "ikd_fast": made["machine"],
            "versions": made["versions"],
            "cpu": {"brand_raw": "Some CPU"},
        },
        "commit_info": {"id": made["commit"]["id"], "dirty": True, "time": None},
        "benchmarks": [
            entry(
                "a", "labelled", {"form": "x"}, side="mine", role="ours", targets={"other": 2}, gigaflop=3.5
            ),
            entry("a", "labelled", {"form": "y"}, side="other", role="peer", targets={}),
            entry("b", "plain", {"size": "small", "form": "fused"}),
            entry("b", "plain", {"size": "small", "form": "loops"}),
            entry("c", None, None),
        ],
        "skipped": [{"name": "bench_d.py::test_d", "reason": "kornia is not installed"}],
    }
