"""Benchmarks: both sides of a comparison are checked to agree first, warmed, given the same tensors, on two threads at most.

Random numbers are made outside the timed call unless they are the work. Read the median and the interquartile range.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.machine import machine, versions

THREADS = min(2, int(os.environ.get("OMP_NUM_THREADS", 2)))
# Both: torch takes MKL's where it is set.
os.environ.update(OMP_NUM_THREADS=str(THREADS), MKL_NUM_THREADS=str(THREADS))
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for newer versions
os.environ.setdefault("TRITON_AUGMENT_SUPPRESS_FIRST_RUN_MESSAGE", "1")

# Of the last minute, before this run adds to it.
LOAD = round(os.getloadavg()[0], 2)

_skipped: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(THREADS)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[report.nodeid.removeprefix("benchmarks/")] = report.longrepr[2].removeprefix("Skipped: ")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what the figures depend on; leave out what tells on the machine's owner."""
    facts = machine(machine_info["cpu"].get("brand_raw", machine_info["machine"]), load=LOAD)
    for name in ("node", "release", "python_build", "python_compiler"):
        machine_info.pop(name, None)
    machine_info.update(ikd_fast=facts, versions=versions())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch", "error"):
        commit_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["skipped"] = [{"name": name, "reason": reason} for name, reason in sorted(_skipped.items())]
