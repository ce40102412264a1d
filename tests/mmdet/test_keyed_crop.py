"""KeyedRandomCrop: geometry against hand-computed cases, draws that depend on nothing but seed, image and epoch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import ikd_fast.mmdet
from ikd_fast.mmdet.transforms import CropDraw, KeyedRandomCrop

from mmdet.datasets.transforms import PackDetInputs
from mmdet.structures.bbox import HorizontalBoxes


def results(width: int = 96, height: int = 80, image_id: int = 3, boxes=((10, 20, 30, 60),), **extra):
    rng = np.random.default_rng(image_id)
    count = len(boxes)
    return {
        "img": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "img_path": f"/somewhere/train/{image_id}.png",
        "img_id": image_id,
        "img_shape": (height, width),
        "ori_shape": (height, width),
        "gt_bboxes": HorizontalBoxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        "gt_bboxes_labels": np.arange(count),
        "gt_ignore_flags": np.zeros(count, bool),
        **extra,
    }


def crop(**kwargs) -> KeyedRandomCrop:
    transform = KeyedRandomCrop(**{"size": 64, "scale": (0.8, 1.6), **kwargs})
    transform.set_epoch(0)
    return transform


@pytest.mark.parametrize(
    ("hflip", "vflip", "expected"),
    [
        # window 20..70 x 10..60 at scale 2: box (30, 20, 50, 50) -> (20, 20, 60, 80) of 100 x 100
        (False, False, [20, 20, 60, 80]),
        (True, False, [40, 20, 80, 80]),
        (False, True, [20, 20, 60, 80]),
        (True, True, [40, 20, 80, 80]),
    ],
)
def test_boxes_by_hand(hflip: bool, vflip: bool, expected: list[int]) -> None:
    draw = CropDraw((20, 10, 70, 60), (100, 100), hflip, vflip, 1.0)
    # the second is 8 of 20 pixels wide inside: 40 %; the third 35 %; the last is outside
    given = np.array([[30, 20, 50, 50], [8, 10, 28, 30], [7, 10, 27, 30], [80, 10, 90, 30]], np.float32)
    boxes, keep = draw.boxes(given, min_kept=0.4)
    assert keep.tolist() == [0, 1]
    second = [0, 0, 16, 40]
    if hflip:
        second[0], second[2] = 84, 100
    if vflip:
        second[1], second[3] = 60, 100
    assert boxes.tolist() == [expected, second]


def test_leftovers_below_a_pixel_are_dropped() -> None:
    draw = CropDraw((0, 0, 50, 50), (25, 25), False, False, 1.0)
    assert draw.boxes(np.array([[10, 10, 11, 40], [10, 10, 12, 40]]), min_kept=0.0)[1].tolist() == [1]


def test_pixels_by_hand() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(4, 6, 1).repeat(3, axis=2)
    window = image[1:3, 2:5]
    same = CropDraw((2, 1, 5, 3), (3, 2), False, False, 1.0)
    np.testing.assert_array_equal(same.pixels(image), window)
    np.testing.assert_array_equal(
        CropDraw((2, 1, 5, 3), (3, 2), True, True, 1.0).pixels(image), window[::-1, ::-1]
    )
    np.testing.assert_array_equal(
        CropDraw((2, 1, 5, 3), (3, 2), False, False, 1.5).pixels(image), np.round(window * 1.5)
    )
    bright = CropDraw((0, 0, 6, 4), (6, 4), False, False, 50.0).pixels(image)
    assert bright.max() == 255


def test_boxes_follow_the_pixels() -> None:
    """A bright rectangle on black is found where its box says, for many draws."""
    for epoch in range(40):
        transform = crop(size=64, min_kept=0.0, brightness=0.0, scale=(0.5, 3.0))
        transform.set_epoch(epoch)
        given = results(boxes=((24, 16, 60, 56),))
        given["img"][:] = 0
        given["img"][16:56, 24:60] = 200
        out = transform.transform(given)
        rows, columns = (np.flatnonzero((out["img"][..., 0] >= 100).any(axis)) for axis in (1, 0))
        if len(out["gt_bboxes"]) == 0:
            assert len(rows) <= 1 or len(columns) <= 1
            continue
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # half a source pixel of bilinear blur is at most 1.5 output pixels at scale 3
        np.testing.assert_allclose(out["gt_bboxes"].tensor[0].numpy(), found, atol=1.6)


def test_meta_is_right_for_what_reads_it() -> None:
    transform = crop(brightness=0.0)
    for epoch in range(20):
        transform.set_epoch(epoch)
        given = results(boxes=((30, 25, 60, 50),))
        before = given["gt_bboxes"].tensor.clone()
        out = transform.transform(given)
        assert out["img_shape"] == out["img"].shape[:2]
        assert out["flip"] == (out["flip_direction"] is not None)
        matrix = out["homography_matrix"]
        corners = np.array([[x, y, 1] for x in before[0, 0::2] for y in before[0, 1::2]]) @ matrix.T
        h, w = out["img_shape"]
        low, high = corners[:, :2].min(0).clip(0, (w, h)), corners[:, :2].max(0).clip(0, (w, h))
        if len(out["gt_bboxes"]):
            np.testing.assert_allclose(out["gt_bboxes"].tensor[0].numpy(), [*low, *high], atol=1e-3)
            if np.prod(high - low) == pytest.approx(np.prod(np.ptp(corners[:, :2], axis=0))):
                # nothing clipped: the area in the annotation's own pixels comes back
                area = np.prod(high - low) / np.prod(out["scale_factor"])
                assert area == pytest.approx(30 * 25, rel=1e-5)
    packed = PackDetInputs()(out)["data_samples"]
    assert packed.scale_factor == out["scale_factor"]
    assert packed.flip == out["flip"]


def test_a_full_window_has_the_asked_size_and_a_short_one_keeps_the_scale() -> None:
    transform = crop(size=64, scale=(1.0, 1.0))
    assert transform.draw(1, 200, 100).size == (64, 64)
    assert transform.draw(1, 200, 40).size == (64, 40)
    assert crop(size=64, scale=(2.0, 2.0)).draw(1, 20, 100).size == (40, 64)


def test_draws_are_in_range_and_uniform() -> None:
    transform = crop(size=64, scale=(0.8, 1.6), brightness=0.2)
    draws = [transform.draw(key, 300, 200) for key in range(2000)]
    logs = np.log([d.scale_factor[0] for d in draws])
    # log-uniform: mean of the logs is the middle; standard error of 2000 draws is 0.0045, four of them
    assert np.mean(logs) == pytest.approx((np.log(0.8) + np.log(1.6)) / 2, abs=0.018)
    assert min(d.window[0] for d in draws) == 0
    assert max(d.window[2] for d in draws) == 300
    for share in (np.mean([d.hflip for d in draws]), np.mean([d.vflip for d in draws])):
        assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(2000))
    assert 0.8 <= min(d.gain for d in draws) < 0.81
    assert 1.19 < max(d.gain for d in draws) <= 1.2


def test_the_key_is_seed_image_and_epoch() -> None:
    base, width, height = crop(seed=5), 300, 200
    assert crop(seed=5).draw(7, width, height) == base.draw(7, width, height)
    assert crop(seed=6).draw(7, width, height) != base.draw(7, width, height)
    assert base.draw(8, width, height) != base.draw(7, width, height)
    first = base.draw(7, width, height)
    base.set_epoch(1)
    assert base.draw(7, width, height) != first


def test_where_the_data_lies_does_not_matter() -> None:
    here, there = results(), results()
    there["img_path"] = "/mnt/elsewhere/train/3.png"
    np.testing.assert_array_equal(crop().transform(here)["img"], crop().transform(there)["img"])


class Images(Dataset):
    def __init__(self, transform: KeyedRandomCrop) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> np.ndarray:
        return self.transform.transform(results(200, 150, image_id=i))["img"]


def loaded(workers: int, epochs: int) -> list[list[torch.Tensor]]:
    transform = crop()
    loader = DataLoader(
        Images(transform), batch_size=2, num_workers=workers, persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    rows = []
    for epoch in range(epochs):
        transform.set_epoch(epoch)
        rows.append(list(loader))
    return rows


def test_workers_that_persist_draw_as_the_main_process() -> None:
    alone, two = loaded(0, 3), loaded(2, 3)
    for a, b in zip(alone, two, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)
    assert not torch.equal(alone[0][0], alone[1][0])


def test_labels_and_flags_go_with_their_boxes() -> None:
    boxes = ((0, 0, 8, 8), (40, 30, 60, 50), (88, 72, 96, 80))
    transform = crop(size=80, scale=(1.0, 1.0), brightness=0)
    seen = set()
    for epoch in range(60):
        transform.set_epoch(epoch)
        out = transform.transform(results(boxes=boxes))
        assert len(out["gt_bboxes"]) == len(out["gt_bboxes_labels"]) == len(out["gt_ignore_flags"])
        for box, label in zip(out["gt_bboxes"].tensor, out["gt_bboxes_labels"], strict=True):
            sides = (box[2:] - box[:2]).tolist()
            assert max(sides) <= (8 if label in (0, 2) else 20)
        seen |= set(out["gt_bboxes_labels"].tolist())
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 0}, "at least 1 pixel, got 0"),
        ({"scale": (1.4, 0.75)}, r"0 < low <= high, got \(1.4, 0.75\)"),
        ({"brightness": 1.5}, r"brightness must be in 0..1, got 1.5"),
        ({"min_kept": -0.1}, "min_kept must be in 0..1"),
    ],
)
def test_bad_arguments(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyedRandomCrop(**kwargs)


def test_what_it_cannot_do_it_refuses() -> None:
    with pytest.raises(TypeError, match="expects uint8 images, got float32"):
        crop().transform({**results(), "img": np.zeros((8, 8, 3), np.float32)})
    with pytest.raises(ValueError, match="with_bbox=True"):
        crop().transform(results(gt_masks=object()))
    with pytest.raises(RuntimeError, match="nobody has told it the epoch"):
        KeyedRandomCrop().transform(results())


def test_registered_by_importing_the_adapter() -> None:
    from mmdet.registry import TRANSFORMS

    built = TRANSFORMS.build(dict(type="KeyedRandomCrop", size=32))
    assert isinstance(built, ikd_fast.mmdet.KeyedRandomCrop)
    assert "size=32" in repr(built)
    assert copy.copy(built).size == 32
