"""What every test shares: at most two threads, and the folder of design texts where a checkout has one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

THREADS = 2
ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported, and inherited by the processes that tests start.
# Threads that spin while they wait cost a busy machine several times what they save.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_count = min(THREADS, int(os.environ.get("OMP_NUM_THREADS", THREADS)))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch follows either
    os.environ[_name] = str(min(_count, int(os.environ.get(_name, _count))))

import torch  # noqa: E402  (reads them once)

# Triton reads it once, when it is imported, which the conftest of a folder named on the command line does before
# `pytest_configure`: without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    config.addinivalue_line("markers", "slow: takes more than a few seconds (still part of `make test`)")
    config.addinivalue_line("markers", "configs: a step of every paper-scale config (`make configs`)")
    config.addinivalue_line("markers", "distributed: starts several processes (`make distributed`)")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """``../shared`` beside the checkout; a test that needs it is skipped by name elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(
            "needs the folder ../shared beside the checkout, which only the maintainers' machines have"
        )
    return folder
