"""The container makes the core's plan and pixels, says where things went, and replays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("kornia", reason="needs kornia >= 0.9: pip install 'ikd_fast[kornia]'")

import kornia.augmentation as K
from kornia.geometry.boxes import Boxes
from kornia.geometry.transform import warp_perspective

from ikd_fast import AdaptiveFreqAug
from ikd_fast.kornia import AdaptiveFreqAugmentation

SETTINGS = dict(noise_prob=0.9, hflip_prob=0.5, seed=3)
IDS, EPOCH = list(range(11, 19)), 4


def batch():
    """8 images, up to 3 boxes each: every second one has a large object; the last has none."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 48, 64, generator=g)
    boxes = torch.zeros(8, 3, 4)
    keep = torch.zeros(8, 3, dtype=torch.bool)
    for i in range(7):
        side = 36.0 if i % 2 == 0 else 9.0
        corner = torch.rand(2, generator=g) * 10
        boxes[i, 0] = torch.tensor([*corner, *(corner + side)])
        boxes[i, 2] = torch.tensor([50.0, 30.0, 62.5, 44.25])
        keep[i, 0] = keep[i, 2] = True
    masks = torch.rand(8, 2, 48, 64, generator=g) > 0.5
    return images, boxes, keep, masks


def core(images, boxes, keep):
    aug = AdaptiveFreqAug(value_range=(0, 1), **SETTINGS)
    targets = [{"boxes": b[k], "labels": k.nonzero()[:, 0]} for b, k in zip(boxes, keep, strict=True)]
    plan = aug.plan_for(images, targets, IDS, EPOCH)
    return plan, *aug.apply(images, targets, plan)


def test_plan_pixels_and_boxes_are_those_of_the_core():
    images, boxes, keep, masks = batch()
    before = [t.clone() for t in (images, boxes, masks)]
    plan, expected, targets = core(images, boxes, keep)
    aug = AdaptiveFreqAugmentation(data_keys=["input", "bbox_xyxy", "mask"], **SETTINGS)
    out, out_boxes, out_masks = aug(images, boxes, masks, image_ids=IDS, epoch=EPOCH, keep=keep)
    assert set(plan.branch.tolist()) == {1, 2} or set(plan.branch.tolist()) == {0, 1, 2}
    assert plan.flip.any()
    assert not plan.flip.all()
    assert aug.params == plan
    assert torch.equal(out, expected)
    assert aug.sizes == plan.out_sizes == [t["size"] for t in targets]
    for i, target in enumerate(targets):
        assert aug.keep[i].nonzero()[:, 0].tolist() == target["labels"].tolist()
        assert torch.equal(out_boxes[i, aug.keep[i]], target["boxes"])
        assert not out_boxes[i, ~aug.keep[i]].any()
    assert out_masks.dtype == torch.bool
    assert all(torch.equal(a, b) for a, b in zip((images, boxes, masks), before, strict=True))


def test_transform_matrix_is_what_kornia_warps_by():
    images, boxes, keep, masks = batch()
    aug = AdaptiveFreqAugmentation(data_keys=["image", "bbox_xyxy", "mask"], **SETTINGS)
    _, _, moved = aug(images, boxes, masks, image_ids=IDS, epoch=EPOCH, keep=keep)
    plan, geometric, _ = core(images, boxes, keep)
    geometric = aug.augment.apply_geometry(images, [{"boxes": torch.zeros(0, 4)}] * 8, plan)[0]
    warped = warp_perspective(images, aug.transform_matrix, (48, 64), align_corners=True)
    warped_masks = warp_perspective(
        masks.float(), aug.transform_matrix, (48, 64), mode="nearest", align_corners=True
    )
    for i, (h, w) in enumerate(aug.sizes):
        # Bilinear sampling at whole pixels: only rounding of coordinates up to 64 (ulp 4e-6) times a step of at most 1.
        torch.testing.assert_close(warped[i, :, :h, :w], geometric[i, :, :h, :w], atol=1e-4, rtol=0)
        assert torch.equal(warped_masks[i, :, :h, :w] > 0.5, moved[i, :, :h, :w])
        assert not moved[i, :, h:].any()
        assert not moved[i, :, :, w:].any()


def test_replay_needs_no_key():
    images, boxes, keep, _ = batch()
    aug = AdaptiveFreqAugmentation(**SETTINGS)
    first = aug(images, boxes, image_ids=IDS, epoch=EPOCH, keep=keep)
    plan, stays = aug.params, aug.keep
    other = aug(images, boxes, image_ids=IDS, epoch=EPOCH + 1, keep=keep)
    assert not torch.equal(other[0], first[0])
    again = aug(images, boxes, params=plan, keep=keep)
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])
    assert torch.equal(aug.keep, stays)
    with pytest.raises(ValueError, match="epoch"):
        aug(images, boxes, image_ids=IDS, keep=keep)


@pytest.mark.parametrize("form", ["list", "Boxes of a list", "Boxes", "dict", "single"])
def test_other_forms_of_the_same_boxes(form):
    images, boxes, keep, _ = batch()
    dense = AdaptiveFreqAugmentation(**SETTINGS)
    expected_image, expected = dense(images, boxes, image_ids=IDS, epoch=EPOCH, keep=keep)
    rows = [b[k] for b, k in zip(boxes, keep, strict=True)]
    wanted = [b[k] for b, k in zip(expected, dense.keep, strict=True)]
    call = dict(image_ids=IDS, epoch=EPOCH)
    if form == "single":
        aug = AdaptiveFreqAugmentation(**SETTINGS)
        image, out = aug(images[0], rows[0], image_ids=IDS[:1], epoch=EPOCH)
        assert torch.equal(image, expected_image[0])
        assert torch.equal(out[aug.keep[0]], wanted[0])
        return
    if form == "dict":
        aug = AdaptiveFreqAugmentation(data_keys=None, **SETTINGS)
        out = aug({"image": images, "bbox_xyxy": boxes, "path": "a.png"}, keep=keep, **call)
        assert out["path"] == "a.png"
        assert torch.equal(out["image"], expected_image)
        assert torch.equal(out["bbox_xyxy"], expected)
        return
    labels = [torch.arange(len(r)) for r in rows]
    aug = AdaptiveFreqAugmentation(data_keys=["image", "bbox_xyxy", "label"], **SETTINGS)
    given = {
        "list": rows,
        "Boxes of a list": Boxes.from_tensor(rows, mode="xyxy") if form != "list" else None,
        "Boxes": Boxes.from_tensor(
            torch.where(keep[..., None], boxes, torch.tensor([0.0, 0, 1, 1])), mode="xyxy"
        ),
    }[form]
    if form == "Boxes":
        labels = [torch.arange(3)] * 8
        call["keep"] = keep
    image, out, out_labels = aug(images, given, labels, **call)
    assert torch.equal(image, expected_image)
    got = out if form == "list" else out.to_tensor("xyxy")
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # Boxes stores x2 - 1
    assert [len(v) for v in out_labels] == [len(b) for b in wanted]


def test_inclusive_boxes_chain_with_kornias_containers():
    """A mirror by this container and one by kornia's: back where it was, boxes and pixels."""
    images, boxes, keep, masks = batch()
    inclusive = boxes.clone()
    inclusive[keep] -= torch.tensor([0.0, 0, 1, 1])
    aug = AdaptiveFreqAugmentation(
        data_keys=["input", "bbox_xyxy", "mask"],
        box_mode="xyxy_plus",
        noise_prob=0,
        crop_prob=0,
        hflip_prob=1.0,
    )
    out = aug(images, inclusive, masks, image_ids=IDS, epoch=EPOCH, keep=keep)
    chain = K.AugmentationSequential(K.RandomHorizontalFlip(p=1.0), data_keys=aug.data_keys)
    back_image, back_boxes, back_masks = chain(*out)
    assert torch.equal(back_image, images)
    assert torch.equal(back_masks, masks)
    torch.testing.assert_close(back_boxes[aug.keep], inclusive[keep], atol=1e-4, rtol=0)
    once = K.AugmentationSequential(K.RandomHorizontalFlip(p=1.0), data_keys=["input", "bbox_xyxy"])
    torch.testing.assert_close(once(images, inclusive)[1][keep], out[1][keep], atol=1e-4, rtol=0)


def test_padded_images_and_rows_that_do_not_count():
    images, boxes, keep, _ = batch()
    images[:, :, 46:] = 0
    aug = AdaptiveFreqAugmentation(**(SETTINGS | dict(noise_prob=1.0)))
    small = boxes.clone()
    small[..., 3] = small[..., 3].clamp(max=46)
    out, _ = aug(images, small, image_ids=IDS, epoch=EPOCH, keep=keep, sizes=[(46, 64)] * 8)
    assert aug.params.sizes.tolist() == [[46, 64]] * 8
    assert not out[:, :, 46:].any()
    # An ignored large box leaves the small ones to decide: noise, not crop.
    aug(
        images,
        small,
        image_ids=IDS,
        epoch=EPOCH,
        keep=keep,
        ignore=torch.tensor([[True, False, False]]).repeat(8, 1),
    )
    assert set(aug.params.branch.tolist()) == {2}
    # A resize by 1/8 divided out makes them large in the annotation's pixels.
    aug(images, small, image_ids=IDS, epoch=EPOCH, keep=keep, scale=[(0.125, 0.125)] * 8)
    assert 2 not in aug.params.branch[:7].tolist()


def test_inside_a_container_it_says_why_not():
    aug = AdaptiveFreqAugmentation(**SETTINGS)
    with pytest.raises(ValueError, match="before or after"):
        nn.Sequential(aug)(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="before or after"):
        K.AugmentationSequential(aug, data_keys=["input", "bbox_xyxy"])(
            torch.rand(1, 3, 8, 8), torch.tensor([[[1.0, 1, 5, 5]]])
        )
    with pytest.raises(ValueError, match="data_keys needs 'bbox_xyxy'"):
        AdaptiveFreqAugmentation(data_keys=["image"])(torch.rand(1, 3, 8, 8), image_ids=[1], epoch=0)


@pytest.mark.parametrize(
    ("kwargs", "call", "message"),
    [
        (dict(data_keys=["image", "keypoints"]), None, "keypoints"),
        (dict(data_keys=["image", "input"]), None, "each once"),
        (dict(box_mode="xywh"), None, "xyxy_plus"),
        (dict(box_format="cxcywh_norm"), None, "pixels"),
        ({}, dict(boxes=torch.zeros(2, 1, 4)), r"\[1, M, 4\]"),
        ({}, dict(boxes="b"), "str"),
        ({}, dict(keep=torch.ones(1, 2)), "keep: expected bool"),
        ({}, dict(image=torch.rand(1, 3, 8, 8) * 255), "value_range"),
    ],
)
def test_bad_input_says_what_was_expected(kwargs, call, message):
    if call is None:
        with pytest.raises(ValueError, match=message):
            AdaptiveFreqAugmentation(**kwargs)
        return
    aug = AdaptiveFreqAugmentation(noise_prob=1.0, **kwargs)
    image = call.pop("image", torch.rand(1, 3, 8, 8))
    boxes = call.pop("boxes", torch.tensor([[[1.0, 1, 5, 5]]]))
    with pytest.raises((ValueError, TypeError), match=message):
        aug(image, boxes, image_ids=[1], epoch=0, **call)
