"""The three parts of a run, each within its share of the time: tests, operations, training step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .budget import Budget
from .checks import GPU_TESTS, KERNEL_TESTS, Outcome, problem_of, run_tests, test_files
from .measure import measure, row
from .meter import Meter, Spread
from .problem import DRY, Problem, Scale
from .problems import all_problems
from .steps import DRY_STEP, full_scale, measure_steps

OPS = (
    "pyramid_l2", "fgd", "masked_l2", "channel_kl", "attention_stats", "pearson", "ssim", "augment_batch", "add_noise",
    "apply_delta", "fgsm_step", "input_diversity", "sign_step",
)  # fmt: skip
# The slowest of a problem's sides apart from compiling.
PROBLEM_SECONDS = 6.0


@dataclass(frozen=True)
class Limits:
    """Seconds: of the run, of its tests, and what is set apart for the training step."""

    total: float
    tests: float
    step: float


@dataclass
class Found:
    """Rows in the format of the schema, what was skipped, the outcome of the tests, the copy's bytes a second."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    tests: list[Outcome] = field(default_factory=list)
    copy: float | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Every test passed, something was measured, and nothing was skipped for an error other than too little memory."""
        errors = [s for s in self.skipped if "Error" in s["reason"] and "OutOfMemoryError" not in s["reason"]]
        failed = errors or any(o.problem for o in self.tests)
        return bool(self.rows) and not failed


def run_all(device: torch.device, smoke: bool, limits: Limits, log: Path) -> Found:
    budget, found = Budget(limits.total), Found()
    cuda = device.type == "cuda"
    meter = Meter(device) if not smoke else Meter(device, rounds=5, seconds=0.0)

    budget.section(limits.tests)
    files = test_files([KERNEL_TESTS, GPU_TESTS]) if cuda else [KERNEL_TESTS / "test_launch.py"]
    workers = max(1, min(len(files), len(os.sched_getaffinity(0)) // 2))
    found.tests = run_tests(files, budget.left, workers, log)

    budget.section(limits.total - budget.used - limits.step)
    found.copy = meter.copy_bandwidth()
    if found.copy:
        seconds = 2 * 2**31 / found.copy
        spread = Spread(seconds, seconds, seconds, seconds, meter.rounds)
        found.rows.append(
            row("device copy of 2 GiB", "copy", "ours", spread, {"bytes_per_second": round(found.copy)})
        )
    # A dry run tests the launcher alone, so it cannot forbid a figure; there are none in it.
    problems = {op: problem_of(op, found.tests) if cuda else "" for op in OPS}
    for op, reason in problems.items():
        if reason:
            budget.skip(f"{op}: all figures", f"its tests did not pass: {reason}")
    for problem in all_problems(DRY if smoke else Scale(), device, "triton"):
        if problems[problem.op] or not budget.allows(problem.group, PROBLEM_SECONDS):
            continue
        found.rows += measure(meter, problem, budget, found.copy, _compile(problem))

    budget.section(limits.total)
    if cuda and (reason := problem_of("*", found.tests)):
        budget.skip("training step", f"not every test passed: {reason}")
    else:
        found.rows += measure_steps(meter, DRY_STEP if smoke else full_scale(), device, budget)
    found.skipped, found.seconds = budget.skipped, round(budget.used, 1)
    return found


def _compile(problem: Problem) -> bool:
    """Compiled peers take the compiler a minute each: only where a target names them."""
    return bool(set(problem.compiled) & set(problem.targets))
