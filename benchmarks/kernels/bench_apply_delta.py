"""apply_delta and fgsm_step_packed on the CPU beside plain PyTorch on the same records."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.baselines.packed_delta import plain_apply, plain_step, straight_map
from benchmarks.comparison import TIMED, assert_same, label
from ikd_fast.kernels import DeltaCodes, apply_delta, fgsm_step_packed

pytestmark = pytest.mark.benchmark(**TIMED)

SIZE, FRAME = (800, 1333), (800, 1344)
MIRRORED = [False, True]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CODES = DeltaCodes.of(eps=8, step=2)
UNITS = {
    "grey_level": [1 / s for s in STD],
    "low": [-m / s for m, s in zip(MEAN, STD, strict=True)],
    "high": [(255 - m) / s for m, s in zip(MEAN, STD, strict=True)],
}
MAPS = [straight_map(SIZE, FRAME, mirror) for mirror in MIRRORED]


def records() -> list[Tensor]:
    return [CODES.start((3, *SIZE), seed=0, id=i, epoch=0) for i in range(len(MIRRORED))]


@pytest.mark.parametrize("side", ["apply_delta", "PyTorch"])
def test_apply(benchmark, side: str) -> None:
    images = torch.randn(len(MIRRORED), 3, *FRAME, generator=torch.Generator().manual_seed(0))
    packed = records()
    units = [torch.tensor(v).view(3, 1, 1) for v in UNITS.values()]
    run = {
        "apply_delta": lambda: apply_delta(images, packed, MAPS, CODES, **UNITS),
        "PyTorch": lambda: plain_apply(images, packed, SIZE, MIRRORED, CODES, *units),
    }
    assert_same({name: form() for name, form in run.items()}, atol=1e-6)  # one sum in float32
    work = f"4-bit perturbations on {len(MIRRORED)} images {SIZE[0]}x{SIZE[1]}"
    label(benchmark, f"apply {work}", side, peer=side == "PyTorch")
    benchmark(run[side])


@pytest.mark.parametrize("side", ["fgsm_step_packed", "PyTorch"])
def test_step(benchmark, side: str) -> None:
    gradient = torch.randn(len(MIRRORED), 3, *FRAME, generator=torch.Generator().manual_seed(0))
    packed, step = records(), torch.full((len(MIRRORED),), 2.0)
    run = {
        "fgsm_step_packed": lambda: fgsm_step_packed(gradient, packed, MAPS, CODES, step),
        "PyTorch": lambda: plain_step(gradient, packed, SIZE, MIRRORED, CODES, step),
    }
    assert_same({name: torch.stack(form()) for name, form in run.items()}, atol=0.0)
    work = f"4-bit perturbations of {len(MIRRORED)} images {SIZE[0]}x{SIZE[1]}"
    label(benchmark, f"step {work}", side, peer=side == "PyTorch")
    benchmark(run[side])
