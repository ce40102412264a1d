"""Benchmarks: both sides of a comparison are checked to agree first, warmed, given the same tensors, on two threads at most.

Random numbers are made outside the timed call unless they are the work. Read the median and the interquartile range.
"""

from __future__ import annotations

import os

import pytest

THREADS = 2
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = str(min(THREADS, int(os.environ.get(_name, THREADS))))


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import torch

    machine_info["torch"] = {"version": torch.__version__, "threads": torch.get_num_threads()}
