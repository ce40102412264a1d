"""``KorniaBatchAugment`` in mmdet's data preprocessor: flip and cutout of Table 3, and whatever moves boxes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("kornia", reason="needs kornia >= 0.9: pip install 'ikd_fast[kornia]'")
pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.mmdet import KorniaBatchAugment
from tests.mmdet.conftest import _mmdet_scope, coco_root, retinanet, run, sample_of, stock_config, with_ikd  # noqa: F401

from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData, PixelData

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
UNITS = dict(mean=MEAN, std=STD)
FLIP = dict(type="KorniaBatchAugment", augs=[dict(type="RandomHorizontalFlip", p=0.5)])
CUTOUT = dict(
    type="KorniaBatchAugment", seed=1, **UNITS,
    augs=[dict(type="RandomErasing", scale=(0.1, 0.1), ratio=(1.0, 1.0), value=0.5, p=1.0)],
)  # fmt: skip
SIZES = [(40, 56), (48, 64), (48, 50), (33, 64), (40, 40), (48, 64)]


def build(config, epoch=0):
    module = MODELS.build(config)
    module.set_progress(epoch, 0)
    return module


def batch(sizes=SIZES):
    """Normalised images padded with zeros to 64 x 64, boxes as plain tensors: what batch augments are given."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.zeros(len(sizes), 3, 64, 64)
    samples = []
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for i, (h, w) in enumerate(sizes):
        pixels = torch.randint(0, 256, (3, h, w), generator=g).float()
        inputs[i, :, :h, :w] = (pixels - mean) / std
        sample = sample_of(i, [[2.0, 3.0, 20.5, 30.0], [25.0, 10.0, float(w), 22.25]], (h, w))
        masks = np.zeros((2, h, w), np.uint8)
        masks[0, 3:30, 2:20], masks[1, 10:22, 25:] = 1, 1
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor
        sample.gt_instances.labels = torch.tensor([0, 1])
        sample.gt_instances.masks = BitmapMasks(masks, h, w)
        sample.ignored_instances = InstanceData(
            bboxes=torch.tensor([[0.0, 0.0, 4.0, 5.0]]), labels=torch.tensor([2])
        )
        sample.gt_sem_seg = PixelData(sem_seg=torch.randint(0, 7, (1, h, w), generator=g))
        samples.append(sample)
    return inputs, samples


def mirrored_by_hand(boxes, width):
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def test_flip_is_a_flip_by_hand():
    inputs, samples = batch()
    before = inputs.clone()
    images, out = build(FLIP)(inputs, samples)
    flipped = [bool(s.metainfo.get("flip", False)) for s in out]
    assert set(flipped) == {True, False}
    for i, (h, w) in enumerate(SIZES):
        old, new = samples[i], out[i]
        turn = (lambda x: x.flip(-1)) if flipped[i] else (lambda x: x)
        assert torch.equal(images[i, :, :h, :w], turn(before[i, :, :h, :w]))
        assert not images[i, :, h:].any()
        assert not images[i, :, :, w:].any()
        for name in ("gt_instances", "ignored_instances"):
            a, b = old.get(name).bboxes, new.get(name).bboxes
            torch.testing.assert_close(b, mirrored_by_hand(a, w) if flipped[i] else a, atol=0, rtol=0)
        assert new.gt_instances.labels.tolist() == [0, 1]
        assert new.img_shape == (h, w)
        assert np.array_equal(
            new.gt_instances.masks.masks, old.gt_instances.masks.masks[:, :, :: -1 if flipped[i] else 1]
        )
        assert torch.equal(new.gt_sem_seg.sem_seg, turn(old.gt_sem_seg.sem_seg))
        assert new.metainfo.get("flip_direction") == ("horizontal" if flipped[i] else None)
        assert "flip" not in old.metainfo
    assert torch.equal(inputs, before)


def test_cutout_is_one_grey_square_and_nothing_else():
    inputs, samples = batch()
    images, out = build(CUTOUT)(inputs, samples)
    grey = torch.tensor([(127.5 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    for i, (h, w) in enumerate(SIZES):
        hole = ((images[i] - grey.view(3, 1, 1)).abs() < 1e-5).all(0)
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        side = (0.1 * h * w) ** 0.5
        assert hole.sum() == rows * columns
        assert abs(int(rows) - side) <= 1
        assert abs(int(columns) - side) <= 1
        assert torch.equal(images[i, :, ~hole], inputs[i, :, ~hole])
        assert torch.equal(out[i].gt_instances.bboxes, samples[i].gt_instances.bboxes)
        erased = out[i].gt_instances.masks.masks
        expected = samples[i].gt_instances.masks.masks * ~hole[:h, :w].numpy()
        assert np.array_equal(erased, expected)
        assert "flip" not in out[i].metainfo
        assert torch.equal(out[i].gt_sem_seg.sem_seg[0] == 255, hole[:h, :w])


def test_an_image_gets_the_same_alone_in_another_order_and_in_another_place():
    config = dict(type="KorniaBatchAugment", seed=3, **UNITS, augs=[
        dict(type="RandomAffine", degrees=20.0, scale=(0.8, 1.2), p=0.7), dict(type="ColorJiggle", brightness=0.2, p=0.7)])  # fmt: skip
    inputs, samples = batch()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images, out = build(config)(inputs, samples)
    assert torch.equal(torch.get_rng_state(), state)
    back, out_back = build(config)(inputs.flip(0), samples[::-1])
    assert torch.equal(back.flip(0), images)
    for i in range(len(SIZES)):
        alone, (sample,) = build(config)(inputs[i : i + 1], samples[i : i + 1])
        assert torch.equal(alone[0], images[i])
        for other in (out_back[-1 - i], sample):
            assert torch.equal(other.gt_instances.bboxes, out[i].gt_instances.bboxes)
    assert not torch.equal(build(config, epoch=1)(inputs, samples)[0], images)
    assert not torch.equal(build(config | dict(seed=4))(inputs, samples)[0], images)
    for i, (h, w) in enumerate(SIZES):
        assert not images[i, :, h:].any()
        assert not images[i, :, :, w:].any()


def test_emptied_boxes_go_with_labels_and_masks():
    inputs, samples = batch([(48, 64)] * 8)
    config = dict(type="KorniaBatchAugment", augs=[dict(type="RandomCrop", size=(40, 24), p=1.0)])
    images, out = build(config)(inputs, samples)
    counts = []
    for image, sample in zip(images, out, strict=True):
        assert sample.img_shape == (40, 24)
        assert not image[:, 40:].any()
        assert not image[:, :, 24:].any()
        found = sample.gt_instances
        counts.append(len(found))
        assert found.masks.masks.shape == (len(found), 40, 24)
        for box, label, mask in zip(found.bboxes, found.labels, found.masks.masks, strict=True):
            ys, xs = np.nonzero(mask)
            if len(xs):  # a box can overlap by half a pixel that its mask has not
                seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
                # The boxes' far edges lie up to half a pixel beyond their masks.
                torch.testing.assert_close(box, seen, atol=0.51, rtol=0)
            width = 18.5 if label == 0 else 39.0
            assert 0 < box[2] - box[0] <= min(width, 24)
    assert min(counts) < 2 <= max(counts)
    strict = build(config | dict(min_kept=0.9))(inputs, samples)[1]
    assert sum(len(s.gt_instances) for s in strict) < sum(counts)


def test_meta_follows():
    inputs, samples = batch([(48, 64)])
    samples[0].set_metainfo(
        dict(flip=True, flip_direction="horizontal", homography_matrix=np.eye(3, dtype=np.float32))
    )
    config = dict(type="KorniaBatchAugment", augs=[dict(type="RandomVerticalFlip", p=1.0)])
    _, (sample,) = build(config)(inputs, samples)
    assert (sample.flip, sample.flip_direction) == (True, "diagonal")
    assert np.allclose(sample.homography_matrix, [[1, 0, 0], [0, -1, 48], [0, 0, 1]], atol=1e-4)
    _, (twice,) = build(FLIP | dict(augs=[dict(type="RandomHorizontalFlip", p=1.0)]))(inputs, [sample])
    assert (twice.flip, twice.flip_direction) == (True, "vertical")


def test_polygons_and_padded_masks():
    inputs, samples = batch([(40, 56)])
    polygon = [np.array([2.0, 3, 20, 3, 20, 30, 2, 30])]
    samples[0].gt_instances.masks = PolygonMasks([polygon, polygon], 40, 56)
    config = FLIP | dict(augs=[dict(type="RandomHorizontalFlip", p=1.0)])
    _, (sample,) = build(config)(inputs, samples)
    columns = sample.gt_instances.masks.masks[0].any(0).nonzero()[0]
    # Rasterising a polygon may include its last column.
    assert (columns.min(), columns.max()) in ((36, 53), (35, 53))
    padded = BitmapMasks(np.ones((2, 64, 64), np.uint8), 64, 64)
    samples[0].gt_instances.masks = padded
    _, (sample,) = build(config)(inputs, samples)
    assert sample.gt_instances.masks.masks.shape == (2, 64, 64)
    assert sample.gt_instances.masks.masks[:, :40, :56].all()
    samples[0].gt_instances = samples[0].gt_instances[:0]
    _, (sample,) = build(config)(inputs, samples)
    assert len(sample.gt_instances) == 0


@pytest.mark.slow
def test_within_the_distiller_both_branches_see_the_same(coco_root):  # noqa: F811
    """After the crop, before the noise: images without and with noise, and boxes, are all mirrored alike."""
    from tests.mmdet.test_ways_in import EPOCH, SETTINGS, loader

    flip = FLIP | dict(augs=[dict(type="RandomHorizontalFlip", p=1.0)])

    def preprocess(batch_augments):
        pre = MODELS.build(dict(
            type="IKDDetDataPreprocessor", augment=dict(type="AdaptiveFreqAug", **SETTINGS), return_geo=True,
            bgr_to_rgb=True, pad_size_divisor=32, batch_augments=batch_augments, **UNITS))  # fmt: skip
        pre.set_progress(EPOCH, 0)
        for augment in pre.batch_augments or []:
            augment.set_progress(EPOCH, 0)
        return next(pre(data, True) for data in loader(coco_root, 12))

    plain, flipped = preprocess(None), preprocess([flip])
    assert flipped["plan"] == plain["plan"]
    assert (flipped["plan"].sigma > 0).any()
    for i, (a, b) in enumerate(zip(plain["data_samples"], flipped["data_samples"], strict=True)):
        h, w = a.img_shape
        assert b.img_shape == (h, w)
        assert torch.equal(flipped["geo"][i, :, :h, :w], plain["geo"][i, :, :h, :w].flip(-1))
        assert torch.equal(b.gt_instances.bboxes, mirrored_by_hand(a.gt_instances.bboxes, w))
        noise = flipped["inputs"][i] - flipped["geo"][i]
        assert bool(noise.any()) == bool(plain["plan"].sigma[i] > 0)
        assert not flipped["inputs"][i, :, h:].any()
        # Noise comes after and is not mirrored: the same, but where the sum is clamped at 0 or 255.
        unclamped = plain["inputs"][i, :, :h, :w] - plain["geo"][i, :, :h, :w]
        same = (noise[:, :h, :w] - unclamped).abs() < 1e-5
        assert same.float().mean() > 0.9


@pytest.mark.slow
def test_table_3_flip_and_cutout_train(coco_root, tmp_path):  # noqa: F811
    config = stock_config(coco_root, epochs=1)
    config["model"] = retinanet(batch_augments=[FLIP, CUTOUT])
    runner, logs = run(with_ikd(config), tmp_path / "ikd")
    assert len(logs) == 3
    assert all(np.isfinite(v) for log in logs for v in log.values())
    parts = [m for m in runner.model.modules() if isinstance(m, KorniaBatchAugment)]
    assert [p.progress.epoch for p in parts] == [0, 0]
    assert not [k for k in runner.model.state_dict() if "batch_augments" in k]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(augs=[dict(type="RandomErasing")]), "mean=.*value_range"),
        (dict(augs=[dict(type="RandomElasticTransform")]), "leave it out"),
        (dict(augs=[dict(type="RandomHorizontalFlip")], min_kept=2), "min_kept"),
        (dict(augs=[dict(type="RandomErasing")], mean=[0.485] * 3, std=[0.229] * 3), "times 255"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type="KorniaBatchAugment", **config))


def test_bad_batches():
    inputs, samples = batch([(48, 64)])
    with pytest.raises(RuntimeError, match="IKDHook"):
        MODELS.build(FLIP)(inputs, samples)
    with pytest.raises(ValueError, match="found .* to"):
        build(CUTOUT)(inputs * 100, samples)
    with pytest.raises(ValueError, match="enlarge images in the pipeline"):
        build(dict(type="KorniaBatchAugment", augs=[dict(type="PadTo", size=(70, 70))]))(inputs, samples)
    samples[0].proposals = InstanceData(bboxes=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="proposals"):
        build(FLIP)(inputs, samples)


def test_without_kornia_it_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "kornia" or n.startswith("ikd_fast.kornia")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ModuleNotFoundError, match=r"ikd_fast\[kornia\]"):
        MODELS.build(FLIP)
