"""CocoImages: which images and boxes there are is decided as in mmdet's CocoDataset; the plan is the core's."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)
from ikd_fast.augment import AdaptiveFreqAug
from ikd_fast.dali import CocoImages, KeyedShardSampler
from ikd_fast.dali.coco import keep_ratio_size
from ikd_fast.dali.host_sample import HostSample, Skipped
from ikd_fast.order import KeyedIndex, image_key
from tests.dali.files import picture, save
from tests.dali.made import write_set

import mmcv
from mmdet.registry import DATASETS

SIZES = {1: (60, 80), 2: (64, 48), 3: (40, 40), 5: (20, 90), 7: (50, 50), 8: (70, 33), 11: (45, 60)}
NAMES = {3: "cat", 9: "dog", 4: "cow"}  # ids with gaps, not in order
BOXES = [
    # image, category, bbox, changes
    (1, 3, [10, 10, 30, 25], {}),
    (1, 9, [5, 5, 50, 40], dict(iscrowd=1)),
    (1, 4, [20, 20, 9, 9], dict(ignore=1)),
    (1, 3, [40, 30, 0.5, 20], {}),
    (2, 9, [-10, 20, 30, 30], {}),
    (2, 9, [60, 5, 10, 10], {}),
    (2, 4, [47.5, 60, 10, 10], {}),
    (3, 9, [5, 5, 10, 10], dict(area=0)),
    (3, 9, [5, 5, -4, 10], {}),
    (5, 3, [5, 5, 10, 10], {}),
    (7, 4, [1, 1, 8, 8], dict(iscrowd=1)),
    (8, 9, [0, 0, 33, 70], {}),
    (8, 3, [-3, -3, 2, 2], {}),
]  # 11: none


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    (root / "images").mkdir()
    images, annotations = [], []
    for i, (height, width) in SIZES.items():
        cv2.imwrite(str(root / "images" / f"{i}.jpg"), picture(height, width, i))
        images.append(dict(id=i, file_name=f"{i}.jpg", width=width, height=height))
    for k, (image, category, (x, y, w, h), changes) in enumerate(BOXES):
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append(
            dict(id=k + 1, image_id=image, category_id=category, bbox=[x, y, w, h], area=abs(w * h), iscrowd=0)
            | dict(segmentation=polygon)
            | changes
        )  # fmt: skip
    categories = [dict(id=i, name=name) for i, name in NAMES.items()]
    (root / "ann.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return root


def mmdets(root, classes, filter_cfg):
    return DATASETS.build(
        dict(
            type="CocoDataset", data_root=str(root), ann_file="ann.json", data_prefix=dict(img="images/"), pipeline=[],
            metainfo=dict(classes=classes), filter_cfg=filter_cfg,
        )
    )  # fmt: skip


def ours(root, **options) -> CocoImages:
    return CocoImages(root / "ann.json", root / "images", **{"resize": None, **options})


@pytest.mark.parametrize("classes", [("cat", "dog", "cow"), ("dog",), ("cat", "cow")])
@pytest.mark.parametrize(("empty", "smallest"), [(True, 32), (False, 0), (True, 46), (False, 21)])
def test_images_boxes_labels_and_flags_are_mmdets(root, classes, empty: bool, smallest: int) -> None:
    """Classes in the file's order: mmdet counts labels in that order, whatever the order of ``classes``."""
    theirs = mmdets(root, classes, dict(filter_empty_gt=empty, min_size=smallest))
    mine = ours(root, classes=classes, filter_empty=empty, min_size=smallest)
    assert len(mine) == len(theirs) > 1
    for record, i in zip(mine.records, range(len(theirs)), strict=True):
        info = theirs.get_data_info(i)
        assert record.image_id == info["img_id"]
        assert record.path == info["img_path"]
        instances = info["instances"]
        boxes = np.array([x["bbox"] for x in instances], np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(record.boxes, boxes)
        assert record.labels.tolist() == [x["bbox_label"] for x in instances]
        assert record.crowd.tolist() == [bool(x["ignore_flag"]) for x in instances]
        assert record.problem == ""


def test_labels_are_places_in_classes(root) -> None:
    mine = ours(root, classes=["dog", "cat"])
    (first,) = [r for r in mine.records if r.image_id == 1]
    assert [mine.classes[k] for k in first.labels] == ["cat", "dog"]
    assert first.labels.tolist() == [1, 0]
    assert ours(root).classes == ("cat", "dog", "cow")


@pytest.mark.parametrize("size", [(480, 640), (333, 500), (1, 900), (800, 1333), (37, 91), (61, 61)])
@pytest.mark.parametrize("limits", [(1333, 800), (800, 1333), (97, 41), (64, 64)])
def test_sides_are_mmcvs(size, limits) -> None:
    (width, height) = mmcv.rescale_size(size[::-1], limits)
    assert keep_ratio_size(size, limits) == (height, width)


def load(images: CocoImages, epoch: int = 0, seed: int = 0) -> list:
    return images.__getitems__([KeyedIndex(i, epoch, seed) for i in range(len(images))])


@pytest.mark.parametrize("epoch", [0, 7])
def test_targets_are_what_the_core_makes_of_them(root, epoch: int) -> None:
    """The plan and the moved targets, from an image that was resized as mmdet does it."""
    augment = AdaptiveFreqAug(noise_prob=1.0, hflip_prob=0.5, area_threshold=400, seed=5)
    images = ours(root, resize=(90, 50), augment=augment, masks=True)
    branches = set()
    for record, sample in zip(images.records, load(images, epoch), strict=True):
        height, width = SIZES[record.image_id]
        w, h = mmcv.rescale_size((width, height), (90, 50))
        scale = (w / width, h / height)
        boxes = torch.from_numpy(record.boxes) * torch.tensor([*scale, *scale])
        boxes[:, 0::2].clamp_(0, w)
        boxes[:, 1::2].clamp_(0, h)
        crowd = torch.from_numpy(record.crowd)
        plan = augment.plan(
            [boxes], [(h, w)], [image_key(record.path, record.image_id)], epoch, scale=[scale], ignore=[crowd]
        )
        moved, sample_plan = sample.payload
        assert sample_plan == plan
        branches.add(int(plan.branch[0]))
        target = dict(boxes=boxes, labels=torch.from_numpy(record.labels), iscrowd=crowd, size=(h, w))
        canvas = torch.zeros(3, h, w, dtype=torch.uint8)
        _, (expected,) = augment.apply([canvas], [target], plan)
        for name in ("boxes", "labels", "iscrowd", "size"):
            same = moved[name] == expected[name]
            assert same.all() if isinstance(same, torch.Tensor) else same
        assert moved["orig_size"] == (height, width)
        assert moved["scale"] == scale
        assert moved["masks"].shape == (len(moved["boxes"]), *moved["size"])
        assert len(moved["area"]) == len(moved["boxes"])
        assert sample.view.size == plan.out_sizes[0] == moved["size"]
        assert sample.view.canonical == (height, width)
        assert (sample.mirror, sample.sigma) == (bool(plan.flip[0]), float(plan.sigma[0]))
    assert len(branches) > 1


def test_masks_cover_their_boxes(root) -> None:
    """Polygons are the boxes themselves: twice as large, a mask is its box to the pixel where that is whole."""
    images = ours(root, resize=(160, 120), masks=True, filter_empty=True)
    sample = load(images)[0]
    moved, _ = sample.payload
    assert moved["size"] == (120, 160)
    x0, y0, x1, y1 = (int(v) for v in moved["boxes"][0])
    expected = torch.zeros(120, 160, dtype=torch.uint8)
    expected[y0:y1, x0:x1] = 1
    assert torch.equal(moved["masks"][0], expected)


def test_a_mirror_without_augmentation_is_keyed(root) -> None:
    images = ours(root, flip_prob=0.5, seed=3)
    flips = [tuple(s.mirror for s in load(images, epoch)) for epoch in range(6)]
    assert flips == [tuple(s.mirror for s in load(images, epoch)) for epoch in range(6)]
    assert len(set(flips)) > 2
    assert all(int(s.payload[1].branch[0]) == 0 for s in load(images))


def broken(root, tmp_path, **change):
    content = json.loads((root / "ann.json").read_text())
    content["annotations"] = [content["annotations"][0] | change, content["annotations"][11]]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    return tmp_path / "ann.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(bbox=[float("nan"), 1, 5, 5]),
            r"annotation 1: expected bbox as four finite numbers, got \[nan",
        ),
        (dict(bbox=[1, 1, float("inf"), 5]), r"four finite numbers, got \[1, 1, inf, 5\]"),
        (dict(bbox=[1, 1, 5]), r"four finite numbers, got \[1, 1, 5\]"),
        (dict(bbox=[1, 1, None, 5]), r"four finite numbers, got \[1, 1, None, 5\]"),
        (dict(segmentation=None), "mask of box 0: expected polygons or RLE"),
        (dict(segmentation=[]), "mask of box 0: expected polygons or RLE"),
        (dict(segmentation=[[1, 2]]), "mask of box 0: expected polygons or RLE"),
        (dict(segmentation={"size": [1, 1]}), "mask of box 0: expected polygons or RLE"),
    ],
)
def test_an_annotation_that_cannot_be_costs_its_image(root, tmp_path, change, message) -> None:
    images = CocoImages(broken(root, tmp_path, **change), root / "images", resize=None, masks=True)
    first, second = load(images)
    assert isinstance(first, Skipped)
    assert first.path.endswith("images/1.jpg")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(first.reason)
    assert isinstance(second, HostSample)


def test_files_that_cannot_be_read_cost_their_place(root, tmp_path) -> None:
    (tmp_path / "1.jpg").write_bytes((root / "images" / "1.jpg").read_bytes()[:-2])
    (tmp_path / "8.jpg").write_bytes(b"")
    images = CocoImages(root / "ann.json", tmp_path, resize=None)
    reasons = {s.path.rpartition("/")[2]: s.reason for s in load(images)}
    assert "truncated" in reasons["1.jpg"]
    assert "empty file" in reasons["8.jpg"]
    assert reasons["2.jpg"] == "No such file or directory"


def test_a_file_of_another_size_than_its_annotation_says(root, tmp_path) -> None:
    """What lies outside the image as it is, is no box of it."""
    cv2.imwrite(str(tmp_path / "1.jpg"), picture(9, 9))
    images = CocoImages(root / "ann.json", tmp_path, resize=None)
    before = images.records[0].boxes
    target = load(images)[0].payload[0]
    assert target["orig_size"] == (9, 9)
    inside = (before[:, :2] < 9).all(1)
    assert 0 < inside.sum() < len(before)
    assert target["boxes"].tolist() == before[inside].clip(0, 9).tolist()
    assert all(len(target[name]) == inside.sum() for name in ("labels", "area", "iscrowd"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(classes=["cat", "dgo"]), r"no category 'dgo'; it has cat, dog, cow\. Did you mean 'dog'"),
        (dict(resize=(0, 9)), r"resize must be \(long, short\) sides, whole .* or None, got \(0, 9\)"),
        (dict(resize=80), r"resize must be \(long, short\) sides, whole .*, got 80"),
        (dict(resize=(107.5, 80)), r"resize must be .*, got \(107.5, 80\)"),
        (dict(flip_prob=2), r"flip_prob must be in 0..1, got 2"),
        (dict(flip_prob="x"), r"flip_prob must be in 0..1, got 'x'"),
        (dict(augment=AdaptiveFreqAug(), flip_prob=0.5), r"write AdaptiveFreqAug\(hflip_prob=...\)"),
    ],
)
def test_settings_that_cannot_be(root, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        ours(root, **change)


def test_an_annotation_of_no_category(root, tmp_path) -> None:
    path = broken(root, tmp_path, category_id=77)
    with pytest.raises(
        ValueError, match=r"ann.json: annotation 1 of 1.jpg has category 77, which the file does not list"
    ):
        CocoImages(path, root / "images")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": [], "annotations": []}', "no json"])
def test_what_is_no_coco_file(tmp_path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        ValueError, match="a.json: expected a COCO file with images, annotations and categories"
    ):
        CocoImages(tmp_path / "a.json", tmp_path)
    with pytest.raises(ValueError, match=r"none\.json: No such file or directory$"):
        CocoImages(tmp_path / "none.json", tmp_path)


def test_types_and_folders_that_cannot_be(root) -> None:
    with pytest.raises(TypeError, match="classes must be a list of names or None, got 'cat'"):
        ours(root, classes="cat")
    with pytest.raises(
        TypeError, match=r"augment must be an ikd_fast.AdaptiveFreqAug or None, got \{'seed': 1\}"
    ):
        ours(root, augment={"seed": 1})
    with pytest.raises(ValueError, match="image_dir .*nowhere is no folder"):
        CocoImages(root / "ann.json", root / "nowhere")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("annotations", dict(category_id=None), "annotation 1 has no category_id"),
        ("annotations", dict(image_id=None), "annotation 1 has no image_id"),
        ("images", dict(width=None), "image 0 has no width"),
        ("images", dict(file_name=None), "image 0 has no file_name"),
    ],
)
def test_an_entry_that_lacks_something_is_named(tmp_path, kind: str, change: dict, message: str) -> None:
    root = write_set(tmp_path)
    content = json.loads((root / "ann.json").read_text())
    content[kind][0] |= change
    (root / "ann.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"ann\.json: {message}"):
        CocoImages(root / "ann.json", root / "images", min_size=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(bbox=None), "annotation 1: expected bbox as four finite numbers, got None"),
        (
            dict(bbox=[1, 2, math.nan, 9]),
            "annotation 1: expected bbox as four finite numbers, got [1, 2, nan, 9]",
        ),
        (dict(bbox=[1, 2, 3]), "annotation 1: expected bbox as four finite numbers, got [1, 2, 3]"),
        (dict(area=math.nan), "annotation 1: expected area as a finite number, got nan"),
        (dict(segmentation=None), "mask of box 0: expected polygons or RLE, got none"),
        (
            dict(segmentation=dict(size=[10, 10], counts=[0, 100])),
            "mask of box 0 is of 10 x 10 pixels, the image of 40 x 60",
        ),
    ],
)
def test_what_one_image_lacks_costs_it_alone(tmp_path, change: dict, reason: str) -> None:
    root = write_set(tmp_path, replace={0: save(picture(40, 60))})
    content = json.loads((root / "ann.json").read_text())
    content["images"][0] |= dict(height=40, width=60)
    content["annotations"][0] |= change
    (root / "ann.json").write_text(json.dumps(content))
    images = CocoImages(root / "ann.json", root / "images", min_size=1, masks=True)
    found = load(images)
    assert found[0] == Skipped(str(root / "images" / "0.jpg"), reason)
    assert all(isinstance(item, HostSample) for item in found[1:])


def test_plain_indices_are_refused(root) -> None:
    with pytest.raises(TypeError, match=r"expected indices of ikd_fast.dali.KeyedShardSampler.*got int"):
        ours(root)[0]
    images = ours(root)
    batch = next(iter(KeyedShardSampler(images, 2)))
    assert len(images.__getitems__(batch)) == 2
