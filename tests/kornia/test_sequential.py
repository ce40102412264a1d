"""Draws keyed by the image; boxes that enclose the pixels they enclosed before."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("kornia", reason="needs kornia >= 0.9: pip install 'ikd_fast[kornia]'")

import kornia.augmentation as K

from ikd_fast.kernels.reference.philox import Stream, draw
from ikd_fast.kornia import KeyedSequential, build_augmentations

JITTER = [dict(type="RandomHorizontalFlip", p=0.5), dict(type="ColorJiggle", brightness=[0.8, 1.2], p=0.8)]


def extent(mask: torch.Tensor) -> list[float]:
    """xyxy edges of the pixels that are set."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)]


@pytest.mark.parametrize(
    "aug",
    [
        dict(type="RandomHorizontalFlip", p=1.0),
        dict(type="RandomVerticalFlip", p=1.0),
        dict(type="RandomRotation90", times=(1, 3), p=1.0),
        dict(type="RandomCrop", size=(30, 26), p=1.0),
        dict(type="RandomCrop", size=(50, 46), padding=8, p=1.0),
        dict(type="CenterCrop", size=(32, 32)),
        dict(type="PadTo", size=(60, 50)),
    ],
    ids=lambda a: a["type"],
)
def test_a_box_goes_where_its_pixels_go(aug):
    """Whole-pixel moves: the box of a drawn rectangle equals the extent of the rectangle's pixels afterwards."""
    image = torch.zeros(3, 40, 40)
    image[:, 14:22, 11:20] = 1
    box = torch.tensor([[11.0, 14, 20, 22]])
    for i in range(4):
        out = KeyedSequential([aug])(image, box, image[:1], image_id=i, epoch=0)
        seen = extent(out.image[0] > 0.5)
        h, w = out.image.shape[-2:]
        clipped = out.boxes[0].clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        torch.testing.assert_close(clipped, torch.tensor(seen), atol=1e-3, rtol=0)
        assert extent(out.masks[0] > 0.5) == seen
        corners = torch.tensor([[11.0, 14, 1], [20, 22, 1]]) @ out.matrix.T
        torch.testing.assert_close(
            torch.cat([corners[:, :2].amin(0), corners[:, :2].amax(0)]), out.boxes[0], atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["RandomHorizontalFlip", "RandomAffine"])
def test_the_callers_autocast_does_not_round_coordinates(name, dtype):
    """Trainers call the data preprocessor under autocast; at a width of 1333 bfloat16 has steps of 8 pixels."""
    aug = dict(type=name, p=1.0) | (dict(degrees=10.0) if name == "RandomAffine" else {})
    image = torch.rand(3, 40, 1333, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[101.0, 5, 333, 25]])
    run = KeyedSequential([aug])
    plain = run(image, box, image[:1], image_id=3, epoch=0)
    with torch.autocast("cpu", dtype=dtype):
        out = run(image, box, image[:1], image_id=3, epoch=0)
    if name == "RandomHorizontalFlip":
        assert out.boxes.tolist() == [[1333.0 - 333, 5, 1333 - 101, 25]]
    for a, b in ((out.image, plain.image), (out.boxes, plain.boxes), (out.masks, plain.masks)):
        assert torch.equal(a, b)


def test_an_image_draws_the_same_wherever_it_is_and_nobody_else_notices():
    run = KeyedSequential(JITTER, seed=5)
    images = torch.rand(6, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[1.0, 2, 7, 9]])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [run(images[i], box, image_id=i, epoch=2).image for i in range(6)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = [run(images[i], box, image_id=i, epoch=2).image for i in reversed(range(6))][::-1]
    assert all(map(torch.equal, first, again))
    assert any(
        not torch.equal(a, run(x, box, image_id=i, epoch=3).image)
        for i, (a, x) in enumerate(zip(first, images, strict=True))
    )
    with_masks = run(images[0], box, torch.ones(2, 12, 14), image_id=0, epoch=2)
    assert torch.equal(with_masks.image, first[0])


def test_pixels_are_those_of_kornia_under_the_same_seed():
    image = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
    out = KeyedSequential([dict(type="RandomErasing", p=1.0, value=0.25)], seed=7)(
        image, torch.zeros(0, 4), image_id=3, epoch=1
    )
    with torch.random.fork_rng(devices=[]):
        high, low = (int(u * 2.0**24) for u in draw(7, 3, 1, Stream.KORNIA, 1)[2:])
        torch.manual_seed(high << 24 | low)
        expected = K.RandomErasing(p=1.0, value=0.25)(image[None])[0]
    assert torch.equal(out.image, expected)
    assert not torch.equal(out.image, image)
    assert out.changed
    assert not out.moved


def test_how_often():
    run = KeyedSequential([dict(type="RandomHorizontalFlip", p=0.3)])
    image, box = torch.rand(3, 4, 4), torch.zeros(0, 4)
    count = sum(run(image, box, image_id=i, epoch=0).hflips for i in range(300))
    # Binomial(300, 0.3): mean 90, standard deviation 7.9; 4 of them.
    assert abs(count - 90) < 32


def test_half_precision_images_keep_boxes_exact():
    out = KeyedSequential([dict(type="RandomHorizontalFlip", p=1.0)])(
        torch.rand(3, 4, 1000).bfloat16(), torch.tensor([[1.25, 0, 3.5, 2]]), image_id=0, epoch=0
    )
    assert out.image.dtype == torch.bfloat16
    assert out.boxes.tolist() == [[996.5, 0, 998.75, 2]]


@pytest.mark.parametrize(
    ("augs", "message"),
    [
        ([], "at least one"),
        ([dict(type="RandomErase")], "nearest: RandomErasing"),
        ([dict(p=1)], "type='RandomErasing'"),
        ([dict(type="RandomElasticTransform")], "leave it out"),
        ([K.RandomThinPlateSpline()], "leave it out"),
        ([dict(type="RandomMixUpV2")], "one image at a time"),
        ([dict(type="RandomJigsaw")], "one image at a time"),
        ([K.ImageSequential(K.RandomHorizontalFlip())], "one by one"),
        ([dict(type="RandomAffine3D", degrees=10.0)], "one by one"),
        ([torch.nn.Identity()], "Identity"),
    ],
)
def test_what_cannot_move_boxes_is_refused(augs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_augmentations(augs)
