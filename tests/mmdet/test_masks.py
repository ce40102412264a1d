"""Masks go where the pixels go: crop, flip and padding against polygons clipped, and bitmaps cut, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.mmdet.samples import image_key

from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData

SIDES = (90, 110)
# Large boxes at the border, so that every crop of 0.8 cuts some and drops others.
SETTINGS = dict(noise_prob=0.0, hflip_prob=0.5, area_threshold=20**2, seed=1)
KINDS = ("polygon", "bitmap")


def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    angles = [2 * math.pi * k / 24 for k in range(24)]
    return np.array([v for a in angles for v in (cx + rx * math.cos(a), cy + ry * math.sin(a))])


RINGS = [ellipse(55, 45, 40, 30), ellipse(4, 5, 3, 4), ellipse(100, 80, 9, 9), ellipse(20, 70, 19, 15)]
BOXES = [
    [float(ring[0::2].min()), float(ring[1::2].min()), float(ring[0::2].max()), float(ring[1::2].max())]
    for ring in RINGS
]


def masks_of(kind: str) -> PolygonMasks | BitmapMasks:
    polygons = PolygonMasks([[ring] for ring in RINGS], *SIDES)
    return polygons if kind == "polygon" else BitmapMasks(polygons.to_ndarray(), *SIDES)


def clipped(ring: np.ndarray, window: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    """Sutherland and Hodgman: a convex ring cut by the four sides of the window."""
    points = list(zip(ring[0::2], ring[1::2], strict=True))
    x0, y0, x1, y1 = window
    for axis, limit, sign in ((0, x0, 1), (0, x1, -1), (1, y0, 1), (1, y1, -1)):
        out = []
        for a, b in zip(points, points[1:] + points[:1], strict=True):
            da, db = sign * (a[axis] - limit), sign * (b[axis] - limit)
            if da >= 0:
                out.append(a)
            if da * db < 0:
                t = da / (da - db)
                out.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        points = out
    return points


def area(points: list[tuple[float, float]]) -> float:
    return 0.5 * abs(
        sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))
    )


def sample_of(i: int, kind: str) -> DetDataSample:
    sample = DetDataSample(
        metainfo=dict(
            img_id=i, img_path=f"m/{i}.png", img_shape=SIDES, ori_shape=SIDES, scale_factor=(1.0, 1.0)
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor(BOXES)), labels=torch.arange(len(BOXES)), masks=masks_of(kind)
    )
    sample.ignored_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.long)
    )
    return sample


def preprocessor(n: int, kind: str, **changes) -> tuple[list, list]:
    pre = MODELS.build(
        dict(
            type="IKDDetDataPreprocessor", augment=dict(type="AdaptiveFreqAug", **SETTINGS), return_geo=True,
            pad_size_divisor=32, **changes,
        )
    )  # fmt: skip
    pre.set_progress(0, 0)
    data = dict(
        inputs=[torch.zeros(3, *SIDES, dtype=torch.uint8) for _ in range(n)],
        data_samples=[sample_of(i, kind) for i in range(n)],
    )
    out = pre(data, True)
    windows = [
        (tuple(w), bool(f)) for w, f in zip(out["plan"].window.tolist(), out["plan"].flip, strict=True)
    ]
    return [(s.gt_instances.labels, s.gt_instances.masks) for s in out["data_samples"]], windows


def transform(n: int, kind: str) -> list:
    one = TRANSFORMS.build(dict(type="AdaptiveFreqAug", **SETTINGS))
    one.set_epoch(0)
    found = []
    for i in range(n):
        results = one.transform(
            dict(
                img=np.zeros((*SIDES, 3), np.uint8), img_id=i, img_path=f"m/{i}.png", gt_bboxes=np.array(BOXES, np.float32),
                gt_bboxes_labels=np.arange(len(BOXES)), gt_ignore_flags=np.zeros(len(BOXES), bool), gt_masks=masks_of(kind),
            )
        )  # fmt: skip
        found.append((torch.as_tensor(results["gt_bboxes_labels"]), results["gt_masks"]))
    return found


def check(labels: torch.Tensor, masks, window, flip: bool, kind: str) -> None:
    x0, y0, x1, y1 = window
    whole = masks_of("bitmap").masks.astype(bool)
    for label, index in zip(labels.tolist(), range(len(masks)), strict=True):
        expected = whole[label][y0:y1, x0:x1]
        expected = expected[:, ::-1] if flip else expected
        got = masks[[index]].to_ndarray()[0][: y1 - y0, : x1 - x0].astype(bool)
        if kind == "bitmap":
            assert (got == expected).all()
            continue
        # Rasterising a cut polygon again may turn pixels of its outline, and no others.
        inner = ~grown(~expected)
        assert (got <= grown(expected)).all()
        assert (inner <= got).all()
        points = [(p[0] - x0, p[1] - y0) for p in clipped(RINGS[label], window)]
        points = [(x1 - x0 - x, y) for x, y in points] if flip else points
        rings = np.concatenate([ring.reshape(-1, 2) for ring in masks.masks[index]])
        # Both cut the same float64 corners: what differs is rounding.
        np.testing.assert_allclose(rings.min(0), np.min(points, axis=0), atol=1e-9)
        np.testing.assert_allclose(rings.max(0), np.max(points, axis=0), atol=1e-9)
        assert masks.areas[index] == pytest.approx(area(points), rel=1e-9)


def grown(mask: np.ndarray) -> np.ndarray:
    """With every pixel's eight neighbours."""
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.max([padded[dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)], axis=0)


@pytest.mark.parametrize("kind", KINDS)
def test_preprocessor_and_transform_cut_flip_and_drop(kind):
    n = 6
    found, plans = preprocessor(n, kind, pad_mask=False)
    again = transform(n, kind)
    assert {flip for _, flip in plans} == {True, False}
    dropped = 0
    for (labels, masks), (other_labels, other), (window, flip) in zip(found, again, plans, strict=True):
        assert window != (0, 0, SIDES[1], SIDES[0])
        dropped += len(BOXES) - len(labels)
        assert len(labels) == len(masks)
        assert (masks.height, masks.width) == (window[3] - window[1], window[2] - window[0])
        check(labels, masks, window, flip, kind)
        assert labels.tolist() == other_labels.tolist()
        assert (masks.to_ndarray() == other.to_ndarray()).all()
    assert dropped  # a polygon vanishes with its box


@pytest.mark.parametrize("kind", KINDS)
def test_pad_mask_pads_after_the_crop(kind):
    found, plans = preprocessor(3, kind, pad_mask=True)
    for (labels, masks), (window, flip) in zip(found, plans, strict=True):
        assert (masks.height, masks.width) == (96, 128)
        x0, y0, x1, y1 = window
        bitmaps = masks.to_ndarray()
        assert not bitmaps[:, y1 - y0 :].any()
        assert not bitmaps[:, :, x1 - x0 :].any()
        check(labels, masks, window, flip, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_augment_keeps_masks_of_the_batchs_size(kind):
    """mmdet pads masks before batch augments run; heads that stack them need them to stay that size."""
    pre = MODELS.build(
        dict(
            type="DetDataPreprocessor", pad_size_divisor=32, pad_mask=True,
            batch_augments=[dict(type="AdaptiveFreqAug", value_range=(0, 255), **SETTINGS)],
        )
    )  # fmt: skip
    pre.batch_augments[0].set_progress(0, 0)
    data = dict(
        inputs=[torch.zeros(3, *SIDES, dtype=torch.uint8) for _ in range(3)],
        data_samples=[sample_of(i, kind) for i in range(3)],
    )
    assert len({image_key(s.metainfo) for s in data["data_samples"]}) == 3
    out = pre(data, True)
    assert out["inputs"].shape[-2:] == (96, 128)
    for sample in out["data_samples"]:
        masks = sample.gt_instances.masks
        assert (masks.height, masks.width) == (96, 128)
        check(sample.gt_instances.labels, masks, sample.ikd_window, bool(sample.metainfo.get("flip")), kind)
