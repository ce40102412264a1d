"""The same key gives the same plan whichever way an image comes in, and samples follow it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ikd_fast.mmdet  # noqa: F401
from ikd_fast import AdaptiveFreqAug
from ikd_fast.augment import AugPlan
from ikd_fast.mmdet.samples import crop_sample, image_key
from tests.mmdet.conftest import IMAGES, draw, stock_config

from mmcv.transforms import Compose
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import PixelData

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
UNITS = dict(mean=MEAN, std=STD, bgr_to_rgb=True, pad_size_divisor=32)
EPOCH, SEED = 3, 5
SETTINGS = dict(noise_prob=0.8, hflip_prob=0.5, seed=SEED, area_threshold=40**2)


def loader(root, batch_size, workers=0, extra=(), masks=False):
    config = stock_config(root, batch_size=batch_size, pipeline_extra=extra, masks=masks)["train_dataloader"]
    config.update(
        num_workers=workers,
        persistent_workers=workers > 0,
        sampler=dict(type="DefaultSampler", shuffle=False),
    )
    return Runner.build_dataloader(Config(config), seed=0)


def core_plans(root) -> dict[int, tuple]:
    """Straight from the annotations: boxes at 80/96 scale, the scale divided out of the areas."""
    aug = AdaptiveFreqAug(**SETTINGS)
    plans = {}
    for i in range(IMAGES):
        _, boxes = draw(i)
        key = image_key(dict(img_id=i, img_path=str(root / "images" / f"{i}.png")))
        plan = aug.plan(
            [torch.tensor(boxes) * (80 / 96)], [(80, 80)], [key], EPOCH, scale=[(80 / 96, 80 / 96)]
        )
        plans[i] = facts(plan, 0)
    return plans


def facts(plan: AugPlan, i: int) -> tuple:
    return int(plan.branch[i]), tuple(plan.window[i].tolist()), bool(plan.flip[i]), float(plan.sigma[i])


def test_every_way_in_makes_the_core_plan(coco_root):
    expected = core_plans(coco_root)
    assert {branch for branch, *_ in expected.values()} == {0, 1, 2}
    # 1. the data preprocessor, in batches of 1, 3 and 8
    for batch_size in (1, 3, 8):
        pre = MODELS.build(
            dict(
                type="IKDDetDataPreprocessor",
                augment=dict(type="AdaptiveFreqAug", **SETTINGS),
                return_geo=True,
                **UNITS,
            )
        )
        pre.set_progress(EPOCH, 0)
        for data in loader(coco_root, batch_size):
            ids = [s.img_id for s in data["data_samples"]]
            out = pre(data, True)
            for row, i in enumerate(ids):
                assert facts(out["plan"], row) == expected[i]
                x0, y0, x1, y1 = expected[i][1]
                assert out["data_samples"][row].img_shape == (y1 - y0, x1 - x0)
    # 2. as a batch augment, boxes taken from the "device"; its plans are recorded as they are executed
    for batch_size in (1, 3, 8):
        pre = MODELS.build(
            dict(
                type="DetDataPreprocessor",
                batch_augments=[dict(type="AdaptiveFreqAug", mean=MEAN, std=STD, **SETTINGS)],
                **UNITS,
            )
        )
        augment, plans = pre.batch_augments[0].augment, []
        apply = augment.apply
        augment.apply = lambda x, t, plan, apply=apply, plans=plans: (plans.append(plan), apply(x, t, plan))[
            1
        ]
        pre.batch_augments[0].set_progress(EPOCH, 0)
        for data in loader(coco_root, batch_size):
            ids = [s.img_id for s in data["data_samples"]]
            samples = pre(data, True)["data_samples"]
            for row, i in enumerate(ids):
                assert facts(plans[-1], row) == expected[i]
                assert samples[row].ikd_window == expected[i][1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loader_executes_the_core_plan_to_the_pixel(coco_root, workers, batch_size):
    """Branch, window, flip and noise are all in the uint8 image: it must be the core's, also in workers that stay alive."""
    aug = AdaptiveFreqAug(**SETTINGS)
    expected = {}
    for data in loader(coco_root, 4):
        for image, sample in zip(data["inputs"], data["data_samples"], strict=True):
            boxes = torch.tensor(draw(sample.img_id)[1]) * (80 / 96)
            key = image_key(sample.metainfo)
            plan = aug.plan([boxes], [(80, 80)], [key], EPOCH, scale=[(80 / 96, 80 / 96)])
            labels = torch.zeros(len(boxes), dtype=torch.long)
            (out,), _ = aug.apply([image], [dict(boxes=boxes, labels=labels)], plan)
            expected[sample.img_id] = out
    one = loader(coco_root, batch_size, workers, extra=[dict(type="AdaptiveFreqAug", **SETTINGS)])
    (transform,) = [t for t in one.dataset.pipeline.transforms if hasattr(t, "set_epoch")]
    for epoch in (0, EPOCH):
        transform.set_epoch(epoch)
        seen = {
            sample.img_id: image
            for data in one
            for image, sample in zip(data["inputs"], data["data_samples"], strict=True)
        }
    assert seen.keys() == expected.keys()
    for i, image in expected.items():
        assert torch.equal(seen[i], image)


def test_pixels_agree_between_the_ways(coco_root):
    """Noise is keyed in the loader's channel order: preprocessor and transform differ by the transform's uint8 rounding only."""
    settings = SETTINGS | dict(noise_prob=1.0, noise_std=8.0)
    pre = MODELS.build(
        dict(type="IKDDetDataPreprocessor", augment=dict(type="AdaptiveFreqAug", **settings), **UNITS)
    )
    pre.set_progress(EPOCH, 0)
    a = [pre(data, True) for data in loader(coco_root, 4)]
    one = loader(coco_root, 4, extra=[dict(type="AdaptiveFreqAug", **settings)])
    one.dataset.pipeline.transforms[3].set_epoch(EPOCH)
    plain = MODELS.build(dict(type="DetDataPreprocessor", **UNITS))
    b = [plain(data, True) for data in one]
    std = torch.tensor(STD).view(3, 1, 1)
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        for i, (s, t) in enumerate(zip(x["data_samples"], y["data_samples"], strict=True)):
            assert torch.equal(s.gt_instances.bboxes, t.gt_instances.bboxes)
            assert torch.equal(s.gt_instances.labels, t.gt_instances.labels)
            h, w = s.img_shape
            worst = max(worst, float(((x["inputs"][i] - y["inputs"][i])[:, :h, :w] * std).abs().max()))
            assert float(x["inputs"][i][:, h:].abs().sum() + x["inputs"][i][:, :, w:].abs().sum()) == 0
    # Rounding to whole grey levels moves a value by at most 0.5.
    assert 0.3 < worst <= 0.5 + 1e-3


def test_noise_is_added_on_x_data_only_and_has_its_sigma(coco_root):
    pre = MODELS.build(
        dict(
            type="IKDDetDataPreprocessor",
            augment=dict(type="AdaptiveFreqAug", noise_prob=1.0, noise_std=5.0),
            return_geo=True,
            **UNITS,
        )
    )
    pre.set_progress(0, 0)
    diffs = []
    for data in loader(coco_root, 4):
        out = pre(data, True)
        for i in range(4):
            h, w = out["data_samples"][i].img_shape
            diff = (out["inputs"][i] - out["geo"][i])[:, :h, :w] * torch.tensor(STD).view(3, 1, 1)
            if float(out["plan"].sigma[i]) > 0:
                diffs.append(diff.flatten())
            else:
                assert float(diff.abs().max()) == 0
    noise = torch.cat(diffs).double()
    # Images lie in 60..250: 5 sigma below 255 and above 0, so nothing is clamped away. 4 standard errors each.
    n = len(noise)
    assert abs(float(noise.mean())) < 4 * 5 / n**0.5
    assert float(noise.std()) == pytest.approx(5, abs=4 * 5 / (2 * n) ** 0.5 + 0.02)


def test_without_augment_it_is_mmdets_own(coco_root):
    ours = MODELS.build(dict(type="IKDDetDataPreprocessor", **UNITS))
    theirs = DetDataPreprocessor(**UNITS)
    for data in loader(coco_root, 4):
        a, b = ours(copy.deepcopy(data), True), theirs(copy.deepcopy(data), True)
        assert set(a) == {"inputs", "data_samples"}
        assert torch.equal(a["inputs"], b["inputs"])
        assert [s.metainfo for s in a["data_samples"]] == [s.metainfo for s in b["data_samples"]]
    for data in loader(coco_root, 4):  # and in evaluation also with an augmentation
        ours = MODELS.build(
            dict(type="IKDDetDataPreprocessor", augment=dict(type="AdaptiveFreqAug"), **UNITS)
        )
        assert torch.equal(
            ours(copy.deepcopy(data), False)["inputs"], theirs(copy.deepcopy(data), False)["inputs"]
        )


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_geometry_is_mmdets_own_chain_on_cropped_and_mirrored_images(coco_root, kind):
    """uint8 images take one pass here, others mmengine's own way; ``geo`` is mmdet's to the bit either way."""
    settings = SETTINGS | dict(hflip_prob=0.5)
    augment = dict(type="AdaptiveFreqAug", **settings)
    ours = MODELS.build(dict(type="IKDDetDataPreprocessor", augment=augment, return_geo=True, **UNITS))
    ours.set_progress(EPOCH, 0)
    theirs, flips = DetDataPreprocessor(**UNITS), 0
    for data in loader(coco_root, 4):
        if kind == "float":
            data["inputs"] = [x.float() for x in data["inputs"]]
        given = copy.deepcopy(data)
        out = ours(data, True)
        plan = out["plan"]
        for i, (x0, y0, x1, y1) in enumerate(plan.window.tolist()):
            image = given["inputs"][i][:, y0:y1, x0:x1]
            given["inputs"][i] = image.flip(-1) if plan.flip[i] else image
            flips += int(plan.flip[i])
        assert torch.equal(out["geo"], theirs(given, True)["inputs"])
        assert "flips" not in out
        for sample, other in zip(out["data_samples"], given["data_samples"], strict=True):
            assert sample.batch_input_shape == tuple(out["geo"].shape[-2:])
            assert sample.pad_shape == theirs_pad(sample.img_shape)
            assert other.img_id == sample.img_id
    assert flips > 0


def theirs_pad(shape):
    return tuple(-(-side // 32) * 32 for side in shape)


def test_masks_follow_boxes_through_preprocessor_and_transform(coco_root):
    settings = SETTINGS | dict(noise_prob=0.0)
    pre = MODELS.build(
        dict(type="IKDDetDataPreprocessor", augment=dict(type="AdaptiveFreqAug", **settings), **UNITS)
    )
    pre.set_progress(EPOCH, 0)
    one = loader(coco_root, 4, extra=[dict(type="AdaptiveFreqAug", **settings)], masks=True)
    one.dataset.pipeline.transforms[3].set_epoch(EPOCH)
    checked = 0
    for source in (
        [pre(d, True)["data_samples"] for d in loader(coco_root, 4, masks=True)],
        [d["data_samples"] for d in one],
    ):
        for sample in [s for samples in source for s in samples]:
            boxes = sample.gt_instances.bboxes
            boxes = boxes if isinstance(boxes, torch.Tensor) else boxes.tensor
            masks = (
                sample.gt_instances.masks.to_bitmap().masks
                if hasattr(sample.gt_instances.masks, "to_bitmap")
                else sample.gt_instances.masks.masks
            )
            assert masks.shape[1:] == sample.img_shape
            for box, mask in zip(boxes.tolist(), masks, strict=True):
                ys, xs = np.nonzero(mask)
                if len(ys) == 0:
                    continue
                found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                # Polygons are rasterised: their edges may fall on either side of a pixel.
                assert np.abs(np.array(found) - np.array(box)).max() <= 1.5
                checked += 1
    assert checked > 30


def sample_with(window, flip):
    sample = DetDataSample(metainfo=dict(img_shape=(10, 20), img_id=1))
    from mmengine.structures import InstanceData

    masks = np.zeros((3, 10, 20), np.uint8)
    boxes = torch.tensor([[2.0, 1.0, 6.0, 5.0], [0.0, 0.0, 3.0, 2.0], [10.0, 4.0, 20.0, 10.0]])
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([7, 8, 9]), masks=BitmapMasks(masks, 10, 20)
    )
    sample.ignored_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, 20.0, 10.0]]), labels=torch.tensor([1])
    )
    sample.gt_sem_seg = PixelData(sem_seg=torch.arange(200).view(1, 10, 20))
    plan = AdaptiveFreqAug(seed=0).plan([boxes], [(10, 20)], [1], 0)
    plan = AugPlan(
        **{
            **{f: getattr(plan, f) for f in plan.__dataclass_fields__},
            "window": torch.tensor([window]),
            "flip": torch.tensor([flip]),
        }
    )
    return sample, crop_sample(sample, plan, 0)


def test_crop_of_a_sample_by_hand():
    sample, out = sample_with((4, 2, 16, 8), False)
    assert out.img_shape == (6, 12)
    assert out.gt_instances.bboxes.tolist() == [[0, 0, 2, 3], [6, 2, 12, 6]]
    assert out.gt_instances.labels.tolist() == [7, 9]
    assert out.ignored_instances.bboxes.tolist() == [[0, 0, 12, 6]]
    assert torch.equal(out.gt_sem_seg.sem_seg[0], torch.arange(200).view(10, 20)[2:8, 4:16])
    for box, mask in zip(out.gt_instances.bboxes.int().tolist(), out.gt_instances.masks.masks, strict=True):
        ys, xs = np.nonzero(mask)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box
    assert sample.img_shape == (10, 20)  # the input is left alone
    assert len(sample.gt_instances) == 3
    assert sample.gt_sem_seg.sem_seg.shape == (1, 10, 20)
    _, flipped = sample_with((4, 2, 16, 8), True)
    assert flipped.gt_instances.bboxes.tolist() == [[10, 0, 12, 3], [0, 2, 6, 6]]
    assert flipped.flip
    for box, mask in zip(
        flipped.gt_instances.bboxes.int().tolist(), flipped.gt_instances.masks.masks, strict=True
    ):
        ys, xs = np.nonzero(mask)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box


def test_keys_do_not_depend_on_where_the_data_lies():
    a = image_key(dict(img_id=3, img_path="/data/coco/train2017/0003.jpg"))
    assert a == image_key(dict(img_id=3, img_path="elsewhere/train2017/0003.jpg"))
    assert a != image_key(dict(img_id=3, img_path="/data/voc/JPEGImages/0003.jpg"))
    assert a != image_key(dict(img_id=4, img_path="/data/coco/train2017/0003.jpg"))
    with pytest.raises(KeyError, match="meta_keys="):
        image_key({})


def test_errors(coco_root):
    with pytest.raises(ValueError, match="augment must be dict"):
        MODELS.build(dict(type="IKDDetDataPreprocessor", augment=dict(type="RandomCrop"), **UNITS))
    transform = TRANSFORMS.build(dict(type="AdaptiveFreqAug"))
    with pytest.raises(RuntimeError, match="IKDHook"):
        transform(
            dict(
                img=np.zeros((40, 40, 3), np.uint8), gt_bboxes=np.zeros((0, 4)), img_id=1, img_path="a/b.png"
            )
        )
    assert isinstance(MODELS.build(dict(type="AdaptiveFreqAug", value_range=(0, 255))), nn.Module)
    assert Compose([transform]).transforms[0] is transform
