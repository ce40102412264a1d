"""mmdet's transforms without pixels against the same transforms with them: every number but the pixels is equal."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)
from ikd_fast.attack.memory import View
from ikd_fast.augment import Branch
from ikd_fast.dali.steps import resize, run, table, view_of
from ikd_fast.mmdet.dali.host_transforms import host_transforms
from ikd_fast.mmdet.dali.source import prepare
from ikd_fast.mmdet.progress import sample_epoch
from tests.dali.made import IMAGES, dataset, write_set

from mmdet.registry import DATASETS, TRANSFORMS

RESIZE = dict(type="Resize", scale=(70, 50), keep_ratio=True)
EVERY_WAY = ["horizontal", "vertical", "diagonal"]
ADAPTIVE = dict(type="AdaptiveFreqAug", area_threshold=500, noise_prob=0.7, hflip_prob=0.5, seed=4)
PIPELINES = {
    "nothing": [],
    "resize": [RESIZE],
    "resize, any ratio": [dict(type="Resize", scale=(70, 51), keep_ratio=False)],
    "resize, a factor": [dict(type="Resize", scale_factor=1.37)],
    "resize, two factors, kept": [dict(type="Resize", scale_factor=(1.4, 0.8), keep_ratio=True)],
    "resize, boxes not clipped": [dict(type="Resize", scale=(70, 50), clip_object_border=False)],
    "range": [dict(type="RandomResize", scale=(80, 60), ratio_range=(0.4, 1.9), keep_ratio=True)],
    "range, any ratio": [dict(type="RandomResize", scale=[(80, 60), (50, 33)], keep_ratio=False)],
    "choice": [dict(type="RandomChoiceResize", scales=[(90, 40), (30, 31), (64, 64)], keep_ratio=True)],
    "flips": [RESIZE, dict(type="RandomFlip", prob=[0.3, 0.3, 0.3], direction=EVERY_WAY)],
    "flips of the original": [dict(type="RandomFlip", prob=0.6), RESIZE],
    "crop": [RESIZE, dict(type="RandomCrop", crop_size=(36, 28))],
    "crop, a share": [
        dict(type="RandomFlip", prob=0.5),
        dict(type="RandomCrop", crop_type="relative_range", crop_size=(0.5, 0.6), allow_negative_crop=True),
        RESIZE,
    ],
    "crop larger than the image": [dict(type="RandomCrop", crop_size=(500, 30)), RESIZE],
    "published": [
        dict(type="RandomChoiceResize", scales=[(48, 90), (60, 90)], keep_ratio=True),
        dict(type="RandomCrop", crop_type="absolute_range", crop_size=(20, 50), allow_negative_crop=True),
        dict(type="RandomChoiceResize", scales=[(48, 70), (60, 70)], keep_ratio=True),
        dict(type="RandomFlip", prob=0.5),
    ],
    "one of two ways": [
        dict(
            type="RandomChoice",
            transforms=[
                [dict(type="RandomChoiceResize", scales=[(48, 90), (60, 90)], keep_ratio=True)],
                [
                    RESIZE,
                    dict(type="RandomCrop", crop_size=(30, 40), allow_negative_crop=True),
                    dict(type="Resize", scale=(60, 44)),
                ],
            ],
        ),
        dict(type="RandomFlip", prob=0.5),
    ],
    "filter": [RESIZE, dict(type="FilterAnnotations", min_gt_bbox_wh=(9, 9))],
    "adaptive": [RESIZE, dict(type="RandomFlip", prob=0.5, direction=EVERY_WAY), ADAPTIVE],
    "keyed": [
        dict(type="KeyedRandomness", transforms=[RESIZE, dict(type="RandomFlip", prob=0.5), ADAPTIVE], seed=8)
    ],
}
BOXES_ONLY = {
    "keyed crop": [dict(type="KeyedRandomCrop", size=40, scale=(0.6, 1.7), seed=2)],
    "keyed crop and more": [
        dict(type="KeyedRandomCrop", size=64, brightness=0.0, min_kept=0.0),
        dict(type="RandomFlip", prob=0.5),
    ],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("host"))


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - mmdet's transforms draw from it
    torch.manual_seed(seed)


def assert_same(mine, theirs, what: str) -> None:
    """Two values of mmdet, to the bit."""
    if hasattr(theirs, "tensor"):
        mine, theirs = mine.tensor, theirs.tensor
    if type(theirs).__name__ == "PolygonMasks":
        assert (mine.height, mine.width) == (theirs.height, theirs.width), what
        for a, b in zip(mine.masks, theirs.masks, strict=True):
            assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True)), what
        return
    if type(theirs).__name__ == "BitmapMasks":
        mine, theirs = mine.masks, theirs.masks
    assert np.array_equal(np.asarray(mine), np.asarray(theirs)), (what, mine, theirs)


def both(root, transforms, masks=False, polygons=False):
    """(host sample or Skipped or None, mmdet's item) of every image in three epochs, from the same draws."""
    config = dataset(root, transforms, masks, polygons)
    theirs, mine = (DATASETS.build(copy.deepcopy(config)) for _ in range(2))
    prepare(mine)
    assert len(mine) == IMAGES
    for epoch in range(3):
        for i in range(IMAGES):
            with sample_epoch(epoch):
                seeded(100 * epoch + i)
                item = theirs.prepare_data(i)
                after = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
                seeded(100 * epoch + i)
                packed = mine.prepare_data(i)
                # The same numbers were drawn, so that what is drawn next is the same too.
                assert (random.random(), np.random.rand(), torch.rand(1).item()) == after  # noqa: NPY002
            yield packed, item


FLIPS = {"flips": 4, "adaptive": 4, "published": 2, "keyed": 2}
"""Flip directions that come up."""
CASES = [(name, masks) for name in PIPELINES for masks in ("boxes", "bitmaps", "polygons")]
CASES += [(name, "boxes") for name in BOXES_ONLY]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_all_but_the_pixels_is_mmdets(root, name: str, kind: str) -> None:
    seen, directions, branches = 0, set(), set()
    transforms = (PIPELINES | BOXES_ONLY)[name]
    for packed, item in both(root, transforms, kind != "boxes", kind == "polygons"):
        assert (packed is None) == (item is None)
        if item is None:
            continue
        seen += 1
        pixels, mine, theirs = packed["ikd_dali"], packed["data_samples"], item["data_samples"]
        assert "inputs" not in packed
        if pixels.plan is None:
            made = run(cv2.imread(theirs.img_path), table(theirs.ori_shape, pixels.steps), pixels.gain)
            assert np.array_equal(made.transpose(2, 0, 1), item["inputs"].numpy())
        for part in ("gt_instances", "ignored_instances"):
            a, b = getattr(mine, part), getattr(theirs, part)
            assert set(a.keys()) == set(b.keys())
            for key in b.keys():  # noqa: SIM118 - InstanceData iterates over rows
                assert_same(a[key], b[key], f"{part}.{key}")
        for key in theirs.metainfo:
            assert_same(mine.metainfo[key], theirs.metainfo[key], key)
        directions.add(theirs.metainfo.get("flip_direction"))
        branches.add(None if pixels.plan is None else int(pixels.plan.branch[0]))
        assert pixels.encoded.tobytes() == Path(theirs.img_path).read_bytes()
    assert seen > IMAGES
    if name in FLIPS:
        assert len(directions) == FLIPS[name]
    assert branches == ({None, Branch.NOISE} if name in ("adaptive", "keyed") else {None})


def test_the_steps_are_the_homography_that_mmdet_records(root) -> None:
    """Two notes of the same geometry: ours as steps, mmdet's as a float32 matrix, whose last digit is 1e-5 pixels here."""
    seen = 0
    for name, transforms in (PIPELINES | BOXES_ONLY).items():
        for packed, item in both(root, transforms):
            if item is None or name == "nothing":
                continue
            theirs = item["data_samples"]
            view = view_of(theirs.ori_shape, packed["ikd_dali"].steps)
            recorded = View.from_homography(
                packed["data_samples"].homography_matrix, theirs.ori_shape, tuple(item["inputs"].shape[1:])
            )
            assert view.size == recorded.size
            assert view.scale == pytest.approx(recorded.scale, rel=1e-5)
            assert view.offset == pytest.approx(recorded.offset, abs=1e-3)
            seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([dict(type="PhotoMetricDistortion")], r"pipeline\[2\] is PhotoMetricDistortion, which DALI's graph has no count"),
        ([RESIZE, dict(type="Pad", size_divisor=32)], r"pipeline\[3\] is Pad.*it has AdaptiveFreqAug, Filter"),
        ([dict(type="RandomAffine")], r"is RandomAffine.*leave type='DALIDetLoader' out of train_dataloader"),
        ([dict(type="CutOut", n_holes=1, cutout_shape=(4, 4))], "is CutOut"),
        ([dict(type="RandomChoice", transforms=[[RESIZE], [dict(type="CutOut", n_holes=1, cutout_shape=(4, 4))]])],
         r"pipeline\[2\].transforms\[1\]\[0\] is CutOut"),
        ([dict(type="Resize", scale=(9, 9), backend="pillow")], r"pipeline\[2\] asks for 'bilinear' of 'pillow'"),
        ([dict(type="Resize", scale=(9, 9), interpolation="area")], r"cv2's bilinear does; .*asks for 'area' of 'cv2'"),
        (
            [dict(type="RandomResize", scale=(9, 9), ratio_range=(1, 2), interpolation="nearest")],
            r"pipeline\[2\].resize asks for 'nearest'",
        ),
        (
            [dict(type="KeyedRandomness", transforms=[RESIZE, dict(type="Corrupt", corruption="fog")])],
            r"pipeline\[2\].transforms\[1\] is Corrupt",
        ),
        ([ADAPTIVE, RESIZE], r"AdaptiveFreqAug comes last, before PackDetInputs: .*\['Resize'\] follow it"),
        (
            [dict(type="KeyedRandomness", transforms=[ADAPTIVE, dict(type="RandomFlip", prob=0.5)])],
            r"AdaptiveFreqAug comes last.*\['RandomFlip'\]",
        ),
    ],
)  # fmt: skip
def test_what_dali_cannot_do_is_named(root, transforms, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(DATASETS.build(dataset(root, transforms)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(color_type="grayscale"), r"pipeline\[0\] asks for color_type='grayscale', to_float32=False"),
        (dict(color_type="color_ignore_orientation"), "color_ignore_orientation"),
        (dict(to_float32=True), "to_float32=True"),
    ],
)
def test_readers_that_do_something_else(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host_transforms([TRANSFORMS.build(dict(type="LoadImageFromFile", **change))])


@pytest.mark.parametrize("kept", [slice(1, None), slice(0, -1), slice(0, 0)])
def test_a_pipeline_begins_with_the_file_and_ends_packed(root, kept: slice) -> None:
    transforms = DATASETS.build(dataset(root, [RESIZE])).pipeline.transforms[kept]
    with pytest.raises(
        ValueError, match=r"expects a pipeline from LoadImageFromFile to PackDetInputs, got \["
    ):
        host_transforms(transforms)


def test_semantic_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipeline\[0\] is LoadAnnotations\(with_seg=True\)"):
        host_transforms([TRANSFORMS.build(dict(type="LoadAnnotations", with_seg=True))])


def test_a_data_set_with_its_transforms_pickles(root) -> None:
    """Loader workers may be spawned instead of forked."""
    data = DATASETS.build(
        dataset(root, [RESIZE, dict(type="RandomFlip", prob=0.5), *BOXES_ONLY["keyed crop"]])
    )
    data.pipeline.transforms[-2]._epoch = None  # shared memory pickles while a process is being spawned only
    prepare(data)
    again = pickle.loads(pickle.dumps(data.pipeline))
    assert [type(t) for t in again.transforms] == [type(t) for t in data.pipeline.transforms]
    again.transforms[-2] = again.transforms[2]
    seeded(0)
    assert again(data.get_data_info(0))["ikd_dali"].steps[0] == resize((50, 70))
    assert copy.deepcopy(data.pipeline).transforms[0].transform.args[0] is not data.pipeline.transforms[0]
