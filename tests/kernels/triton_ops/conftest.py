"""Kernels run on the GPU where there is one, else in Triton's interpreter; buffers can be poisoned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def pytest_collect_file() -> None:
    """Skip the folder, with the reason, where no module of it could be imported."""
    pytest.importorskip(
        "triton", minversion="3.6", reason="kernels need triton >= 3.6 (Linux): pip install 'triton>=3.6'"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """``cuda``, or ``cpu`` in the interpreter, which tests/conftest.py asks for where there is no GPU."""
    from ikd_fast.kernels.ops.backend import interpreted

    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device, and TRITON_INTERPRET switches the interpreter off")
    return torch.device("cuda")


def _spoil(x: Tensor) -> Tensor:
    """NaN, or the largest integer: what no kernel writes by chance."""
    if x.dtype.is_floating_point:
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


class _PoisonedTorch:
    """``torch`` as the launchers see it, except that an allocation is never zeros by luck."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> Tensor:
        return _spoil(torch.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> Tensor:
        return _spoil(torch.empty_like(*args, **kwargs))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer of the launchers starts as NaN (integers: their largest value): what is not written shows."""
    from ikd_fast.kernels.triton_ops import launch

    monkeypatch.setattr(launch, "torch", _PoisonedTorch())
