"""One problem measured: every side is checked against the reference first, then timed on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .budget import Budget, reason_of
from .meter import Meter, Spread
from .problem import Problem

# Set apart for a compiled peer: the compiler cannot be interrupted.
COMPILE_SECONDS = 40.0


def relative_error(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest ``|output - truth| / |truth|`` of the outputs, each as a vector; NaN where one is not finite.

    >>> relative_error([torch.tensor([3.0, 4.1])], [torch.tensor([3.0, 4.0])])
    0.02
    """
    if len(outputs) != len(truth):
        raise ValueError(f"expected {len(truth)} outputs, got {len(outputs)}")
    worst = 0.0
    for out, want in zip(outputs, truth, strict=True):
        if out.shape != want.shape:
            raise ValueError(f"expected an output of shape {tuple(want.shape)}, got {tuple(out.shape)}")
        want = want.double()
        error = float(((out.double() - want).norm() / want.norm().clamp_min(1e-30)).item())
        worst = error if math.isnan(error) or error > worst else worst
        if math.isnan(worst):
            break
    return round(worst, 9)


def row(
    group: str,
    side: str,
    role: str,
    spread: Spread,
    notes: dict[str, Any],
    targets: dict[str, float] | None = None,
) -> dict[str, Any]:
    """A benchmark as ``benchmarks/schema.py`` has it; notes that are None are left out."""
    return {
        "group": group,
        "side": side,
        "role": role,
        "targets": targets or {},
        "median": spread.median,
        "q1": spread.q1,
        "q3": spread.q3,
        "min": spread.min,
        "rounds": spread.rounds,
        "notes": {name: value for name, value in notes.items() if value is not None},
    }


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 2)


def measure_side(
    meter: Meter, problem: Problem, run: Callable[[Any], Any], sets: Sequence[Any], copy: float | None
) -> tuple[Spread, dict[str, Any]]:
    """Wall time, and the notes: times in microseconds, memory in bytes."""
    meter.warm(run, sets)
    wall = meter.wall(run, sets)
    host = meter.host(run, sets)
    launches = meter.launches(run, sets[0])
    gpu = meter.gpu(run, sets, host, launches)
    peak = meter.peak(run, sets[0])
    notes = {
        "gpu_us": _microseconds(gpu.median if gpu else None),
        "gpu_q1_us": _microseconds(gpu.q1 if gpu else None),
        "gpu_q3_us": _microseconds(gpu.q3 if gpu else None),
        "host_us": _microseconds(host),
        "moved_bytes": problem.moved,
        "copy_share": round(problem.moved / gpu.median / copy, 4) if gpu and copy else None,
        "launches": launches,
        "syncs": meter.syncs(run, sets[0]),
        "peak_extra_bytes": peak,
        "peak_of_maps": round(peak / problem.maps, 3) if peak is not None and problem.maps else None,
    }
    return wall, notes


def measure(
    meter: Meter, problem: Problem, budget: Budget, copy: float | None, compile_peers: bool
) -> list[dict[str, Any]]:
    """The rows of a problem. A side that fails, disagrees with the reference or no longer fits is listed as skipped."""
    try:
        sets = [problem.make(seed) for seed in range(meter.sets_for(problem.inputs))]
        truth = problem.reference(sets[0])
    except Exception as error:
        budget.skip(problem.group, reason_of(error))
        return []
    name, ours = problem.ours
    sides = [(name, ours), *problem.peers.items()]
    if compile_peers:
        sides += problem.compiled.items()
    rows = []
    for side, run in sides:
        title = f"{problem.group}: {side}"
        if not budget.allows(title, COMPILE_SECONDS if side in problem.compiled else 3.0):
            continue
        try:
            error = relative_error(run(sets[0]), truth)
            if not error <= problem.tolerance:
                raise ArithmeticError(
                    f"error {error:g} against the reference, expected at most {problem.tolerance:g}"
                )
            wall, notes = measure_side(meter, problem, run, sets, copy)
        except Exception as failure:
            budget.skip(title, reason_of(failure))
            continue
        notes["error"] = error
        rows.append(
            row(
                problem.group,
                side,
                "ours" if run is ours else "peer",
                wall,
                notes,
                problem.targets if run is ours else None,
            )
        )
    measured = {r["side"] for r in rows}
    for r in rows:
        r["targets"] = {peer: target for peer, target in r["targets"].items() if peer in measured}
    del sets, truth
    if meter.cuda:
        torch.cuda.empty_cache()
    return rows
