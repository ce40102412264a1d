"""The library's two ways through the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ikd_fast import AdaptiveFreqAug
from ikd_fast.kernels import augment_batch

from .work import DIVISOR, MEAN, SIGMA, STD, Work


def build_fused(work: Work) -> Callable[[], Tensor]:
    """``augment_batch``: the chain as one operation."""
    arguments = work.plan.kernel_args()
    return lambda: augment_batch(
        work.images, **arguments, layout="HWC", swap_channels=True, mean=MEAN, std=STD, divisor=DIVISOR
    )


def normalise(images: Sequence[Tensor], padded: tuple[int, int]) -> Tensor:
    """uint8 BGR ``[h, w, 3]`` to the padded stack, each value written once and normalised in place."""
    out = torch.zeros(len(images), 3, *padded)
    for image, row in zip(images, out, strict=True):
        h, w, _ = image.shape
        for c in range(3):
            row[c, :h, :w].copy_(image[..., 2 - c]).sub_(MEAN[c]).div_(STD[c])
    return out


def build_apply(work: Work) -> Callable[[], Tensor]:
    """``AdaptiveFreqAug.apply``, which moves the boxes too, then normalise, pad and stack."""
    aug = AdaptiveFreqAug(noise_prob=1.0, noise_std=SIGMA, rng=work.plan.rng)
    return lambda: normalise(aug.apply(work.images, work.targets, work.plan)[0], work.padded)


def build_noise(work: Work) -> Callable[[], Tensor]:
    """Noise alone on the first image, uint8 to uint8."""
    aug = AdaptiveFreqAug(noise_prob=1.0, noise_std=SIGMA, rng=work.plan.rng)
    plan = work.plan.select([0])
    return lambda: aug.apply_noise(work.images[:1], plan)[0]
