"""AdaptiveFreqAug from decoded images to the network's input, beside kornia, mmdet, albumentations and plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.baselines import albumentations_pipeline, kornia_policy, mmdet_pipeline, ours, plain_torch
from benchmarks.baselines.work import BRANCHES, MEAN, SIGMA, SIZE, STD, Work, make_work
from benchmarks.comparison import TIMED, assert_noise, assert_same, label

pytestmark = [
    pytest.mark.benchmark(**TIMED),
    pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning"),  # of imagecorruptions
]

# name: (what builds it, generator of the plan, ours)
SIDES: dict[str, tuple[Callable[[Work], Callable[[], Tensor]], str, bool]] = {
    "augment_batch, torch": (ours.build_fused, "torch", True),
    "augment_batch, philox": (ours.build_fused, "philox", True),
    "AdaptiveFreqAug.apply, torch": (ours.build_apply, "torch", True),
    "AdaptiveFreqAug.apply, philox": (ours.build_apply, "philox", True),
    "mmdet": (mmdet_pipeline.build, "torch", False),
    "kornia": (kornia_policy.build, "torch", False),
    "albumentations": (albumentations_pipeline.build, "torch", False),
    "PyTorch, eager": (plain_torch.build, "torch", False),
    "PyTorch, compiled": (plain_torch.build_compiled, "torch", False),
}
TARGETS = {
    "whole chain": {"kornia": 1.0, "mmdet": 1.0},
    "crop": {"kornia": 1.0, "mmdet": 1.0},
    "noise": {"kornia": 1.0, "mmdet": 4.0},
}
# What the sides do beyond rounding: the published noise truncates the sum (half a level darker), albumentations the noise
# towards zero (variance sigma^2 - sigma sqrt(2 / pi) + 1/3, 1.9 % off sigma).
NOISE_BOUNDS = {"mmdet": {"bias": 0.6}, "albumentations": {"slack": 0.025}}
ROWS_CHECKED = 300


@functools.cache
def work(branches: tuple[str, ...], rng: str) -> Work:
    return make_work(branches, rng=rng)


def grey_noise(out: Tensor, clean: Tensor) -> Tensor:
    """What was added to a uint8 BGR image, in grey levels, from the normalised stack's row of it."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    clean = clean[:ROWS_CHECKED].permute(2, 0, 1).flip(0)
    return out[:, : clean.shape[1], : clean.shape[2]] * std + mean - clean


def check(branch: str, side: str, run: Callable[[], Tensor]) -> None:
    """On mid-grey images, where no noise is clipped: the same crop as plain PyTorch, noise of the same distribution."""
    given = work(BRANCHES[branch], SIDES[side][1])
    kept = [image.clone() for image in given.images]
    for image in given.images:
        image.copy_(image // 4 + 96)
    try:
        out, reference = run(), plain_torch.build(given)()
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        for i, sigma in enumerate(given.sigmas):
            if sigma:
                assert_noise(grey_noise(out[i], given.images[i]), sigma, **NOISE_BOUNDS.get(side, {}))
                h, w, _ = given.images[i].shape
                assert not out[i, :, h:].any()
                assert not out[i, :, :, w:].any()
            else:
                # two roundings of values up to 2.7
                assert_same({"PyTorch": reference[i], side: out[i]}, atol=2e-6)
    finally:
        for image, old in zip(given.images, kept, strict=True):
            image.copy_(old)


# A crop draws no noise, whatever the generator.
CASES = [(b, s) for b in BRANCHES for s in SIDES if not (b == "crop" and s.endswith("philox"))]


@pytest.mark.parametrize(("branch", "side"), CASES)
def test_chain(benchmark, branch: str, side: str) -> None:
    build, rng, is_ours = SIDES[side]
    run = build(work(BRANCHES[branch], rng))
    check(branch, side, run)
    group = f"AdaptiveFreqAug, {branch}: {len(BRANCHES[branch])} images {SIZE[0]}x{SIZE[1]} uint8 to a float32 batch, CPU"
    wanted = TARGETS[branch] if is_ours and (branch != "noise" or rng == "torch") else {}
    label(benchmark, group, side, peer=not is_ours, targets=wanted)
    benchmark(run)


NOISE_ALONE: dict[str, tuple[Callable[[], Callable[[], Tensor | np.ndarray]], bool]] = {
    "AdaptiveFreqAug.apply_noise, torch": (lambda: ours.build_noise(work(("noise",), "torch")), True),
    "AdaptiveFreqAug.apply_noise, philox": (lambda: ours.build_noise(work(("noise",), "philox")), True),
    "mmdet Corrupt": (lambda: mmdet_pipeline.build_noise(work(("noise",), "torch").images[0]), False),
    "kornia": (lambda: kornia_policy.build_noise(work(("noise",), "torch").images[0]), False),
    "albumentations": (
        lambda: albumentations_pipeline.build_noise(work(("noise",), "torch").images[0]),
        False,
    ),
}


@pytest.mark.parametrize("side", NOISE_ALONE)
def test_noise_alone(benchmark, side: str) -> None:
    build, is_ours = NOISE_ALONE[side]
    run = build()
    image = work(("noise",), "philox" if side.endswith("philox") else "torch").images[0]
    kept = image.clone()
    image.copy_(kept // 4 + 96)
    out = torch.as_tensor(run())
    assert out.dtype == torch.uint8
    assert out.shape == image.shape
    # Rounding to whole levels adds a variance of 1/12, far below one percent of sigma.
    noise = (out[:ROWS_CHECKED].double() - image[:ROWS_CHECKED].double()).permute(2, 0, 1)
    assert_noise(noise, SIGMA, **NOISE_BOUNDS.get(side.removesuffix(" Corrupt"), {}))
    image.copy_(kept)
    label(
        benchmark, f"noise alone, one image {SIZE[0]}x{SIZE[1]}x3 uint8 to uint8, CPU", side, peer=not is_ours
    )
    benchmark(run)
