"""uint8 images reach the nets in one pass: the same batch as augmenting, scaling and stacking them step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast import AdaptiveFreqAug
from ikd_fast.distill.prepare import prepare_batch
from ikd_fast.pixels import PixelUnits

UNITS = {
    "normalised": PixelUnits(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
    "0..1": PixelUnits(value_range=(0, 1)),
    "-1..1": PixelUnits(value_range=(-1, 1)),
    "0..255": PixelUnits(value_range=(0, 255)),
}
SIZES = [(40, 61), (64, 33), (50, 50), (31, 47)]
BOXES = [[[2.0, 2, 38, 39]], [[1.0, 1, 9, 9]], [[0.0, 0, 45, 45]], [[3.0, 3, 12, 12]]]
IDS = [4, 9, 2, 7]


def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g) for h, w in SIZES]


def targets() -> list[dict]:
    return [{"boxes": torch.tensor(b), "labels": torch.zeros(len(b), dtype=torch.long)} for b in BOXES]


def prepare(given, wanted, units, augment):
    return prepare_batch(
        given, wanted, image_ids=IDS, epoch=3, step=0, active=True, augment=augment, units=units, pad_divisor=32,
        device=torch.device("cpu"),
    )  # fmt: skip


def by_steps(given, sizes, units) -> Tensor:
    """Scaled image by image, zeros at the bottom right."""
    height, width = (-(-max(x.shape[k] for x in given) // 32) * 32 for k in (1, 2))
    out = torch.zeros(len(given), 3, height, width)
    for row, image, (h, w) in zip(out, given, sizes, strict=True):
        row[:, :h, :w] = units.from_pixels(image)[:, :h, :w]
    return out


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_augmented_list(name, rng) -> None:
    units = UNITS[name]
    aug = AdaptiveFreqAug(noise_prob=1.0, hflip_prob=0.5, seed=5, rng=rng)
    given = images()
    before = [x.clone() for x in given]
    batch = prepare(given, targets(), units, aug)
    plan = batch.plan
    assert plan.crop_frac > 0 < plan.noise_frac
    assert 0 < plan.flip.sum() < 4
    geo, moved = aug.apply_geometry(given, targets(), plan)
    noisy = aug.apply_noise(geo, plan)
    # (p - mean) / std and p * scale + offset, in float32, of values up to 255
    close = {"rtol": 1e-6, "atol": 1e-6 * max(1.0, units.numbers(torch.float32)[2][0])}
    torch.testing.assert_close(batch.clean, by_steps(noisy, plan.out_sizes, units), **close)
    torch.testing.assert_close(batch.geo, by_steps(geo, plan.out_sizes, units), **close)
    assert batch.sizes == plan.out_sizes
    for a, b in zip(batch.targets, moved, strict=True):
        assert a["size"] == b["size"]
        assert torch.equal(a["boxes"], b["boxes"])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("augment", [None, AdaptiveFreqAug(noise_prob=0.0, crop_prob=0.0)])
def test_without_noise_clean_and_geo_are_one_tensor(augment) -> None:
    units = UNITS["normalised"]
    batch = prepare(images(), targets(), units, augment)
    assert batch.clean is batch.geo
    torch.testing.assert_close(batch.geo, by_steps(images(), SIZES, units), rtol=1e-6, atol=1e-6)


def test_a_padded_stack_keeps_its_sides_and_its_padding_is_zero() -> None:
    units = UNITS["normalised"]
    stack = torch.full((4, 3, 70, 64), 200, dtype=torch.uint8)
    for row, image in zip(stack, images(), strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    sized = [{**t, "size": s} for t, s in zip(targets(), SIZES, strict=True)]
    aug = AdaptiveFreqAug(noise_prob=1.0, hflip_prob=0.5, seed=5)
    batch, ragged = prepare(stack, sized, units, aug), prepare(images(), targets(), units, aug)
    assert batch.clean.shape == (4, 3, 96, 64)
    for full, small in ((batch.clean, ragged.clean), (batch.geo, ragged.geo)):
        for i, (h, w) in enumerate(batch.sizes):
            assert torch.equal(full[i, :, :h, :w], small[i, :, :h, :w])
            assert not full[i, :, h:].any()
            assert not full[i, :, :, w:].any()
