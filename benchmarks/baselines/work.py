"""What every side of the augmentation benchmarks is given: decoded images and what shall happen to each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ikd_fast import AdaptiveFreqAug, AugPlan

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DIVISOR, SIGMA = 32, 20.4
SIZE = (800, 1333)
BRANCHES = {"crop": ("crop", "crop"), "noise": ("noise", "noise"), "whole chain": ("crop", "noise")}


@dataclass(frozen=True)
class Work:
    """Crop or noise, BGR to RGB, normalise, zero-pad to a multiple of 32, stack to float32 ``[N, 3, H, W]``.

    Attributes:
        images: N uint8 ``[H, W, 3]``, blue first, as OpenCV decodes them.
        targets: N dicts with ``boxes``.
        plan: which images are cropped, and where; which get noise.
    """

    images: list[Tensor]
    targets: list[dict]
    plan: AugPlan

    @property
    def windows(self) -> list[tuple[int, int, int, int]]:
        return [tuple(w) for w in self.plan.window.tolist()]

    @property
    def sigmas(self) -> list[float]:
        return self.plan.sigma.tolist()

    @property
    def padded(self) -> tuple[int, int]:
        """(H, W) of the batch."""
        heights, widths = zip(*self.plan.out_sizes, strict=True)
        return tuple(-(-max(side) // DIVISOR) * DIVISOR for side in (heights, widths))  # type: ignore[return-value]


def make_work(branches: tuple[str, ...], size: tuple[int, int] = SIZE, rng: str = "philox") -> Work:
    """Images of random pixels with one box each: large where the image shall be cropped, small where it gets noise."""
    g = torch.Generator().manual_seed(0)
    h, w = size
    sides = [min(h, w) / 2 if branch == "crop" else 16.0 for branch in branches]
    boxes = [torch.tensor([[w / 3, h / 4, w / 3 + side, h / 4 + side]]) for side in sides]
    images = [torch.randint(256, (h, w, 3), dtype=torch.uint8, generator=g) for _ in branches]
    aug = AdaptiveFreqAug(noise_prob=1.0, noise_std=SIGMA, rng=rng)
    plan = aug.plan(boxes, [size] * len(boxes), ids=list(range(1, len(boxes) + 1)), epoch=0)
    targets = [{"boxes": b, "labels": torch.zeros(1, dtype=torch.int64)} for b in boxes]
    return Work(images, targets, plan)
