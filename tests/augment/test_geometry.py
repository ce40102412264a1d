"""Boxes, masks and pixels after the crop and the flip."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ikd_fast.augment import AdaptiveFreqAug, AugPlan, Branch

H, W = 40, 56


@st.composite
def integer_boxes(draw) -> list[list[int]]:
    boxes = []
    for _ in range(draw(st.integers(1, 6))):
        x0, y0 = draw(st.integers(0, W - 1)), draw(st.integers(0, H - 1))
        boxes.append([x0, y0, draw(st.integers(x0 + 1, W)), draw(st.integers(y0 + 1, H))])
    return boxes


def box_masks(boxes: list[list[int]]) -> torch.Tensor:
    masks = torch.zeros(len(boxes), H, W, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def bounding_box(mask: torch.Tensor) -> list[float]:
    ys, xs = mask.nonzero().T
    return [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]


def cropping(**options) -> AdaptiveFreqAug:
    return AdaptiveFreqAug(rule=lambda areas: "crop", **{"crop_ratio": 0.7, "hflip_prob": 0.5, **options})


@given(boxes=integer_boxes(), key=st.integers(0, 2**64 - 1), stacked=st.booleans())
@settings(deadline=None, max_examples=120)
def test_boxes_bound_their_masks(boxes: list[list[int]], key: int, stacked: bool) -> None:
    masks, image = box_masks(boxes), torch.arange(3 * H * W).remainder(251).to(torch.uint8).view(3, H, W)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.arange(len(boxes)),
        "masks": masks,
    }
    aug = cropping()
    plan = aug.plan([target["boxes"]], [(H, W)], [key], 0)
    images, (out,) = aug.apply(image[None] if stacked else [image], [target], plan)
    x0, y0, x1, y1 = plan.window[0].tolist()
    h, w = out["size"]
    assert (h, w) == (y1 - y0, x1 - x0)
    # by hand: pixels of the window, mirrored; a box stays if a pixel of it does
    pixels, cut = image[:, y0:y1, x0:x1], masks[:, y0:y1, x0:x1]
    if plan.flip[0]:
        pixels, cut = pixels.flip(-1), cut.flip(-1)
    assert torch.equal(images[0][:, :h, :w], pixels)
    kept = [i for i in range(len(boxes)) if cut[i].any()]
    assert kept
    assert out["labels"].tolist() == kept
    assert torch.equal(out["masks"][:, :h, :w], cut[kept])
    assert out["boxes"].tolist() == [bounding_box(cut[i]) for i in kept]
    if stacked:
        assert images.shape == (1, 3, H, W)
        assert out["masks"].shape == (len(kept), H, W)
        rest = torch.ones(H, W, dtype=torch.bool)
        rest[:h, :w] = False
        assert images[0][:, rest].sum() == 0 == out["masks"][:, rest].sum()


def test_cxcywh_norm_equals_xyxy() -> None:
    rng = np.random.default_rng(1)
    low = rng.uniform(0, [W - 4, H - 4], (40, 2))
    xyxy = torch.tensor(np.concatenate([low, low + rng.uniform(2, 12, (40, 2))], 1))
    side = torch.tensor([W, H])
    norm = torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2 / side, (xyxy[:, 2:] - xyxy[:, :2]) / side], 1)
    image = torch.zeros(3, H, W, dtype=torch.uint8)
    a = cropping().plan([xyxy], [(H, W)], [6], 0)
    b = cropping(box_format="cxcywh_norm").plan([norm], [(H, W)], [6], 0)
    assert a == b
    _, (one,) = cropping().apply([image], [{"boxes": xyxy}], a)
    _, (two,) = cropping(box_format="cxcywh_norm").apply([image], [{"boxes": norm}], a)
    h, w = one["size"]
    centre, half = two["boxes"][:, :2] * torch.tensor([w, h]), two["boxes"][:, 2:] * torch.tensor([w, h]) / 2
    assert 0 < len(one["boxes"]) < 40
    # float64 on both sides: a few roundings of numbers below 60
    torch.testing.assert_close(torch.cat([centre - half, centre + half], 1), one["boxes"], rtol=0, atol=1e-12)


def fixed_plan(window: list[int], flip: bool = False, n: int = 1) -> AugPlan:
    whole = window == [0, 0, W, H]
    return AugPlan(
        ids=torch.arange(n),
        branch=torch.full((n,), int(Branch.KEEP if whole else Branch.CROP)),
        window=torch.tensor([window] * n),
        flip=torch.tensor([flip] * n),
        sigma=torch.zeros(n),
        sizes=torch.tensor([[H, W]] * n),
        epoch=0,
        seed=0,
    )


TARGET = {
    "boxes": np.array([[0, 0, 10, 10], [8, 9, 20, 30], [30, 5, 50, 35]], np.float32),
    "labels": [7, 8, 9],
    "iscrowd": torch.tensor([0, 1, 0]),
    "scores": np.array([0.1, 0.2, 0.3]),
    "names": ["a", "b", "c"],
    "orig_size": torch.tensor([80, 112, 3]),
    "path": ("x", "y", "z"),
    "caption": "abc",
}


def test_what_follows_the_boxes() -> None:
    _, (out,) = AdaptiveFreqAug().apply(
        [torch.zeros(3, H, W, dtype=torch.uint8)], [TARGET], fixed_plan([10, 10, 40, 40], flip=True)
    )
    # by hand: [8,9,20,30] -> [-2,-1,10,20] -> [0,0,10,20] -> mirrored in 30: [20,0,30,20]
    assert out["boxes"].tolist() == [[20, 0, 30, 20], [0, 0, 10, 25]]
    assert isinstance(out["boxes"], np.ndarray)
    assert out["boxes"].dtype == np.float32
    assert (out["labels"], out["names"]) == ([8, 9], ["b", "c"])
    assert out["iscrowd"].tolist() == [1, 0]
    assert out["scores"].tolist() == [0.2, 0.3]
    assert out["size"] == (30, 30)
    # facts about the image, tuples and strings stay, though their length is the number of boxes
    assert out["orig_size"].tolist() == [80, 112, 3]
    assert (out["path"], out["caption"]) == (("x", "y", "z"), "abc")


def test_flip_alone_keeps_every_box() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [-4, 3, 7, 9]], dtype=torch.int64)
    image = torch.arange(3 * H * W).remainder(256).to(torch.uint8).view(3, H, W)
    (flipped,), (out,) = AdaptiveFreqAug().apply(
        [image], [{"boxes": boxes}], fixed_plan([0, 0, W, H], flip=True)
    )
    assert torch.equal(flipped, image.flip(-1))
    assert out["boxes"].tolist() == [[46, 0, 56, 10], [49, 3, 60, 9]]
    assert out["boxes"].dtype == torch.int64


def test_drop_removes_boxes_that_cover_nothing() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 9], [2, 2, 9, 9], [70, 70, 80, 80]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 3])}
    aug = AdaptiveFreqAug(noise_prob=0, on_degenerate="drop", seed=0)
    _, (out,) = aug([torch.zeros(3, H, W, dtype=torch.uint8)], [target], image_ids=[1], epoch=0)
    assert out["boxes"].tolist() == [[2, 2, 9, 9]]
    assert out["labels"].tolist() == [2]


def test_layouts_give_the_same_pixels() -> None:
    chw = torch.randint(0, 256, (3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hwc = chw.permute(1, 2, 0).contiguous()
    frozen = hwc.numpy().copy()
    frozen.setflags(write=False)
    aug, boxes = cropping(noise_prob=1), [[2, 2, 50, 38]]
    targets = [{"boxes": torch.tensor(boxes)}]
    plan = aug.plan([boxes], [(H, W)], [9], 0)
    want = aug.apply([chw], targets, plan)[0][0]
    for given_image in (hwc, frozen, frozen[:, ::-1].copy()[:, ::-1]):
        got = aug.apply([given_image], targets, plan)[0][0]
        assert type(got) is type(given_image)
        assert torch.equal(torch.as_tensor(got).permute(2, 0, 1), want)
    # both ends 3: read as [3, H, W]
    tiny = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    plan3 = AdaptiveFreqAug(hflip_prob=1).plan([[]], [(3, 3)], [1], 0)
    (flipped,), _ = AdaptiveFreqAug().apply([tiny], [{"boxes": []}], plan3)
    assert torch.equal(flipped, tiny.flip(-1))


def test_no_boxes_and_padded_stack() -> None:
    """Only the valid part of a padded image is cropped; the padding stays padding."""
    aug = cropping(hflip_prob=1.0)
    stack = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    stack[0, :, :H, :W] = 9
    stack[1] = 5
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 4:30, 4:30] = 1
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "masks": masks, "size": torch.tensor([H, W])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)},
    ]
    images, out = aug(stack, targets, image_ids=[1, 2], epoch=0)
    h, w = out[0]["size"]
    assert (h, w) != (H, W)
    assert (images[0, :, :h, :w] == 9).all()
    assert images[0].sum() == 9 * 3 * h * w
    assert bounding_box(out[0]["masks"][0]) == out[0]["boxes"][0].tolist()
    assert out[1]["size"] == (64, 64)
    assert out[1]["boxes"].shape == (0, 4)
    channels_last = stack.contiguous(memory_format=torch.channels_last)
    again, _ = aug(channels_last, targets, image_ids=[1, 2], epoch=0)
    assert again.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(again, images)


def test_crops_share_no_memory_with_the_input() -> None:
    """Rows of an HWC image, or of one mask, are contiguous as they are: a view unless copied."""
    hwc, mask = torch.ones(H, W, 3, dtype=torch.uint8), np.ones((1, H, W), bool)
    target = {"boxes": torch.tensor([[2.0, 2, 30, 30]]), "masks": mask}
    (image,), (out,) = AdaptiveFreqAug().apply([hwc], [target], fixed_plan([0, 5, W, 25]))
    image.zero_()
    out["masks"][:] = False
    assert hwc.min() == 1
    assert mask.all()


def snapshot(value):
    return copy.deepcopy(value)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (np.ndarray, torch.Tensor)):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
        )
    return a == b


@pytest.mark.parametrize("form", ["list", "hwc", "stack"])
def test_inputs_are_never_changed(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randint(0, 256, (12, 3, H, W), dtype=torch.uint8, generator=generator)
    images = stack if form == "stack" else list(stack)
    if form == "hwc":
        images = [x.permute(1, 2, 0).numpy().copy() for x in images]
    targets = [{**snapshot(TARGET), "masks": np.ones((3, H, W), bool)} for _ in range(12)]
    for i in range(0, 12, 2):
        targets[i]["boxes"] = np.array([[1, 1, 5, 5]] * 3, np.float32)
    before = snapshot((images, targets))
    aug = AdaptiveFreqAug(area_threshold=500, noise_prob=0.7, hflip_prob=0.5, crop_prob=0.7)
    out, new_targets = aug(images, targets, image_ids=range(12), epoch=0)
    assert set(aug.plan_for(images, targets, range(12), 0).branch.tolist()) == set(Branch)
    for image, target in zip(out, new_targets, strict=True):  # nor by writing into what was changed
        if target["size"] != (H, W):
            image[:] = 0
            target["boxes"][:] = -1
            target["masks"][:] = 0
            target["labels"].clear()
    assert same((images, targets), before)
