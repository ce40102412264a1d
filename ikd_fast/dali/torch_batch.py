"""Batches for loops in plain PyTorch: a normalised, padded stack, targets as torchvision's detectors take them, and the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ikd_fast.augment import AugPlan
from ikd_fast.kernels import augment_batch

from .coco import whole
from .engine import to_torch
from .host_sample import HostSample

PIXELS = ("augment_batch", "dali")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TorchBatch:
    """From host samples and DALI's images to ``(images, targets, plan)``.

    Args:
        mean, std: of the normalisation, 0..255 units, in the images' channel order. The default is ImageNet's, RGB.
        divisor: the stack's sides are multiples of it.
        dtype: of the stack: float32, float16 or bfloat16.
        pixels: who mirrors, adds noise, normalises and pads. ``"augment_batch"``: one pass of ours over DALI's memory, noise keyed by
            the image. ``"dali"``: DALI's own operators; their noise is not keyed, so that it differs from run to run.
    """

    mean: Sequence[float] = (123.675, 116.28, 103.53)
    std: Sequence[float] = (58.395, 57.12, 57.375)
    divisor: int = 32
    dtype: torch.dtype = torch.float32
    pixels: str = "augment_batch"

    def __post_init__(self) -> None:
        if self.pixels not in PIXELS:
            raise ValueError(
                f"DALIDetLoader: pixels must be one of {', '.join(map(repr, PIXELS))}, got {self.pixels!r}"
            )
        if isinstance(self.divisor, bool) or not isinstance(self.divisor, int) or self.divisor < 1:
            raise ValueError(
                f"DALIDetLoader: divisor must be a whole number of pixels >= 1, got {self.divisor!r}"
            )
        if self.dtype not in DTYPES:
            raise TypeError(
                f"DALIDetLoader: dtype must be float32, float16 or bfloat16 of torch, got {self.dtype!r}"
            )
        three = all(isinstance(v, (tuple, list)) and len(v) == 3 for v in (self.mean, self.std))
        if not three or not all(0 < s < math.inf for s in self.std):
            raise ValueError(
                f"DALIDetLoader: expected three means and three std > 0, got mean={self.mean}, std={self.std}"
            )

    def __call__(self, samples: list[HostSample], outputs: Any) -> tuple[Tensor, list[dict], AugPlan]:
        targets = [sample.payload[0] for sample in samples]
        plan = AugPlan.cat([sample.payload[1] for sample in samples])
        if self.pixels == "dali":
            return to_torch(outputs.as_tensor()).to(self.dtype), targets, plan
        images = augment_batch(
            [to_torch(outputs[i]) for i in range(len(samples))],
            **whole(plan).kernel_args(),
            mean=self.mean,
            std=self.std,
            divisor=self.divisor,
            dtype=self.dtype,
        )
        return images, targets, plan
