"""Pixel units: what a grey level is, and float images that do not say what they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from ikd_fast.pixels import PixelUnits

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def test_scales_by_hand() -> None:
    image = torch.zeros(3, 4, 5)
    unit = PixelUnits(value_range=(-1, 1))
    assert unit.grey_level(image).flatten().tolist() == pytest.approx([2 / 255])
    assert [b.item() for b in unit.bounds(image)] == [-1, 1]
    norm = PixelUnits(mean=MEAN, std=STD)
    assert norm.grey_level(image).shape == (3, 1, 1)
    assert norm.grey_level(image).flatten().tolist() == pytest.approx([1 / s for s in STD])
    low, high = norm.bounds(image)
    assert low.flatten().tolist() == pytest.approx([-m / s for m, s in zip(MEAN, STD, strict=True)])
    assert high.flatten().tolist() == pytest.approx([(255 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    # uint8 is 0..255 whatever was declared
    for unit in (PixelUnits(), norm):
        low, high = unit.bounds(image.byte())
        assert (unit.grey_level(image.byte()).item(), low.item(), high.item()) == (1, 0, 255)


@pytest.mark.parametrize("unit", [PixelUnits((0, 1)), PixelUnits((-1, 1)), PixelUnits(mean=MEAN, std=STD)])
def test_round_trip(unit: PixelUnits) -> None:
    pixels = torch.arange(3 * 256, dtype=torch.uint8).view(3, 16, 16)
    image = unit.from_pixels(pixels)
    unit.check(image)
    assert torch.equal(unit.from_pixels(unit.to_pixels(image), torch.uint8), pixels)
    assert torch.equal(unit.to_pixels(pixels), pixels.float())
    if unit.mean is not None:
        want = (pixels.float() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        # two float32 formulas of one number below 3
        torch.testing.assert_close(image, want, rtol=0, atol=1e-6)


def test_equality_copy_and_pickle() -> None:
    unit = PixelUnits(mean=list(MEAN), std=list(STD))
    unit.grey_level(torch.zeros(3, 1, 1))
    assert unit == PixelUnits(mean=MEAN, std=STD) == pickle.loads(pickle.dumps(unit)) == copy.deepcopy(unit)
    assert unit != PixelUnits((0, 1))


def test_constants_made_in_inference_mode_serve_training() -> None:
    unit = PixelUnits(mean=MEAN, std=STD)
    with torch.inference_mode():
        unit.grey_level(torch.zeros(3, 1, 1))
    x = torch.ones(3, 2, 2, requires_grad=True)
    (x * unit.grey_level(x)).sum().backward()
    assert x.grad[0, 0, 0].item() == pytest.approx(1 / STD[0])


@pytest.mark.parametrize(
    ("unit", "image", "error", "message"),
    [
        (
            PixelUnits(),
            torch.tensor([0.25, 200.0]).view(1, 1, 2),
            ValueError,
            r"found 0\.25 to 200; write value_range",
        ),
        (
            PixelUnits((0, 1)),
            torch.full((3, 2, 2), 7.5),
            ValueError,
            r"0 to 1 \(value_range\), found 7\.5 to 7\.5",
        ),
        (PixelUnits((0, 1)), torch.tensor([[[float("nan")]]]), ValueError, "found nan to nan"),
        (PixelUnits((0, 255)), torch.tensor([[[float("inf")]]]), ValueError, "found inf to inf"),
        (PixelUnits(mean=MEAN, std=STD), torch.full((3, 2, 2), 200.0), ValueError, r"mean=\(123.*found 200"),
        (PixelUnits(mean=MEAN, std=STD), torch.zeros(1, 2, 2), ValueError, "3 channels, the images have 1"),
        (
            PixelUnits((0, 1)),
            torch.zeros(3, 2, 2, dtype=torch.int32),
            TypeError,
            r"uint8 .* got torch\.int32",
        ),
    ],
)
def test_check_names_what_it_found(unit: PixelUnits, image: torch.Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        unit.check(image)
    with pytest.raises(error, match=r"images\[1\]"):
        unit.check(
            [torch.zeros(3, 1, 1, dtype=torch.uint8), image] if image.shape[0] == 3 else [image.byte(), image]
        )


def test_one_channel_out_of_its_own_range() -> None:
    """2.3 is within the first channel's range (up to 2.25 would not be) and beyond half a level of none: per channel."""
    image = torch.zeros(3, 2, 2)
    image[2] = 2.6
    PixelUnits(mean=MEAN, std=STD).check(image)  # (255 - 103.53) / 57.375 = 2.64
    image[0] = 2.6  # (255 - 123.675) / 58.395 = 2.25
    with pytest.raises(ValueError, match=r"found 0 to 2\.6"):
        PixelUnits(mean=MEAN, std=STD).check(image)


def test_images_that_look_like_another_range_warn_once() -> None:
    unit = PixelUnits((0, 255))
    with pytest.warns(UserWarning, match=r"largest value is 1; .*value_range=\(0, 1\)"):
        unit.check(torch.ones(3, 2, 2))
    unit.check(torch.ones(3, 2, 2))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"value_range": (1, 1)}, r"lowest < highest, got \(1, 1\)"),
        ({"value_range": (0, 1), "mean": MEAN, "std": STD}, "got both"),
        ({"mean": MEAN}, "go together"),
        ({"mean": MEAN, "std": (1, 2)}, "got 3 and 2"),
        ({"mean": MEAN, "std": (1, 0, 1)}, "std must be positive"),
    ],
)
def test_bad_declarations(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelUnits(**args)
    with pytest.raises(ValueError, match="must say their scale"):
        PixelUnits().from_pixels(torch.zeros(3, 1, 1))
