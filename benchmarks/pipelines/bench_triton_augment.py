"""Crop, flip and normalise on the shapes that triton-augment publishes; GPU only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import triton_augment_fused
from benchmarks.baselines.work import MEAN, STD
from benchmarks.comparison import TIMED, assert_same, label
from ikd_fast.kernels import augment_batch

pytestmark = [
    pytest.mark.benchmark(**TIMED),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="triton-augment needs a CUDA device"),
]

N = 32
SHAPES = {256: 224, 600: 512, 1280: 1024}  # side of the image: side of the crop


@dataclass(frozen=True)
class Problem:
    """The same pixels as uint8 ``[H, W, 3]`` images and as a float32 stack in 0..1, on the device."""

    images: list[Tensor]
    stack: Tensor
    corners: list[tuple[int, int]]
    flips: list[bool]
    crop: int


@functools.lru_cache(maxsize=1)
def problem(side: int) -> Problem:
    g = torch.Generator().manual_seed(0)
    crop = SHAPES[side]
    pixels = torch.randint(256, (N, side, side, 3), dtype=torch.uint8, generator=g).cuda()
    corners = [tuple(xy) for xy in torch.randint(side - crop + 1, (N, 2), generator=g).tolist()]
    flips = torch.randint(2, (N,), generator=g).bool().tolist()
    return Problem(
        list(pixels), pixels.permute(0, 3, 1, 2).float().div(255).contiguous(), corners, flips, crop
    )


def build_ours(p: Problem, dtype: torch.dtype) -> Callable[[], Tensor]:
    window = torch.tensor([(x, y, x + p.crop, y + p.crop) for x, y in p.corners])
    plan = {"window": window, "flip": torch.tensor(p.flips), "sigma": torch.zeros(N), "ids": torch.arange(N)}
    return lambda: augment_batch(
        p.images, **plan, seed=0, epoch=0, mean=MEAN, std=STD, divisor=1, dtype=dtype
    )


SIDES: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "augment_batch, uint8 to bfloat16": lambda p: build_ours(p, torch.bfloat16),
    "augment_batch, uint8 to float32": lambda p: build_ours(p, torch.float32),
    "triton-augment, float32": lambda p: triton_augment_fused.build(
        p.stack, p.corners, p.flips, (p.crop, p.crop)
    ),
}


def synchronised(run: Callable[[], Tensor]) -> Tensor:
    out = run()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("image", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_crop_flip_normalise(benchmark, image: int, side: str) -> None:
    p = problem(image)
    run = SIDES[side](p)
    wanted = torch.stack(
        [
            (s[:, y : y + p.crop, x : x + p.crop].flip(-1) if flip else s[:, y : y + p.crop, x : x + p.crop])
            for s, (x, y), flip in zip(p.stack, p.corners, p.flips, strict=True)
        ]
    )
    mean, std = (torch.tensor(v, device="cuda").view(3, 1, 1) / 255 for v in (MEAN, STD))
    # Values reach 2.7: bfloat16 keeps eight bits of them.
    assert_same({"PyTorch": (wanted - mean) / std, side: run()}, atol=2e-2 if "bfloat16" in side else 1e-5)
    is_ours = side.startswith("augment_batch")
    targets = {"triton-augment, float32": 2.0 if "bfloat16" in side else 1.0} if is_ours else {}
    group = f"crop, flip, normalise: {N} images {image}x{image} to {p.crop}x{p.crop}, GPU"
    label(benchmark, group, side, peer=not is_ours, targets=targets)
    benchmark(synchronised, run)
