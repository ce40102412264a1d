"""MGD's keyed mask: the word behind each position, the zero fraction, independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from ikd_fast.kernels import Stream, keyed_mask, mask_maps, philox4x32
from tests.tolerances import gradcheck


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_each_position_is_its_philox_word() -> None:
    image, level, seed, epoch, ratio = (3 << 32) + 9, 2, (1 << 32) + 5, 4, 0.65
    height, width, width4 = 3, 6, 8
    got = keyed_mask([image], height, width, ratio=ratio, level=level, seed=seed, epoch=epoch)[0, 0]
    for y in range(height):
        for x in range(width):
            index = y * width4 + x
            counter = (index // 4, image & 0xFFFFFFFF, (image >> 32) ^ (Stream.MASK + 256 * level), epoch)
            word = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[index % 4]
            u = (word >> 8) * 2.0**-24
            assert got[y, x] == (0.0 if u > 1 - ratio else 1.0), (y, x)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.45, 0.65, 0.9, 1.0])
def test_fraction_of_zeros(ratio) -> None:
    mask = keyed_mask(range(8), 100, 101, ratio=ratio, seed=11, epoch=2)
    zeros = 1.0 - mask.mean().item()
    # Four standard deviations of a binomial share; at 1.0, u = 0 alone survives (2^-24 of the draws).
    assert abs(zeros - ratio) <= 4 * math.sqrt(ratio * (1 - ratio) / mask.numel()) + 1e-5
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_a_mask_depends_on_nothing_else_in_the_batch() -> None:
    kwargs = {"ratio": 0.5, "seed": 3, "epoch": 1, "level": 1}
    batch = keyed_mask([5, 6, 7], 12, 10, **kwargs)
    for i, image in enumerate([5, 6, 7]):
        assert torch.equal(keyed_mask([image], 12, 10, **kwargs)[0], batch[i])
    assert torch.equal(keyed_mask([7, 5], 12, 10, **kwargs), batch[[2, 0]])
    # Rows begin on a block boundary: a narrower map of the same padded row length sees the same draws.
    assert torch.equal(keyed_mask([5], 12, 9, **kwargs)[0], batch[0, :, :, :9])


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 2}, {"level": 2}, {"image_ids": [6]}])
def test_masks_of_other_keys_are_uncorrelated(change) -> None:
    kwargs = {"image_ids": [5], "seed": 3, "epoch": 1, "level": 1, "height": 100, "width": 100, "ratio": 0.5}
    a, b = keyed_mask(**kwargs), keyed_mask(**{**kwargs, **change})
    agreement = (a == b).float().mean().item()
    assert abs(agreement - 0.5) < 4 * 0.5 / 100  # four standard deviations over 1e4 positions


def test_one_draw_for_all_channels_and_no_other_change() -> None:
    x = torch.randn(2, 7, 5, 6, dtype=torch.bfloat16)
    out = mask_maps(x, [1, 2], ratio=0.4, level=3, seed=8, epoch=9)
    mask = keyed_mask([1, 2], 5, 6, ratio=0.4, level=3, seed=8, epoch=9)
    assert out.dtype == torch.float32
    assert torch.equal(out, x.float() * mask)


def test_gradient_is_the_mask() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda x: mask_maps(x, [1, 2], ratio=0.5), x)
    mask_maps(x, [1, 2], ratio=0.5).sum().backward()
    assert torch.equal(x.grad, keyed_mask([1, 2], 4, 5, ratio=0.5, dtype=torch.float64).expand_as(x))


def test_empty_and_errors() -> None:
    assert keyed_mask([], 4, 5, ratio=0.5).shape == (0, 1, 4, 5)
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in 0\.\.1"):
            keyed_mask([1], 4, 4, ratio=ratio)
    with pytest.raises(ValueError, match="one image id for each of the 2 images, got 1"):
        mask_maps(torch.zeros(2, 1, 2, 2), [1], ratio=0.5)
    with pytest.raises(ValueError, match="epoch must be in"):
        keyed_mask([1], 4, 4, ratio=0.5, epoch=-1)
