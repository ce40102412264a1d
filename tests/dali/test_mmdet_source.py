"""mmdet's data sets as a source of host samples: wrappers, files and boxes that cannot be, images that are rejected."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)
from ikd_fast.dali.host_sample import HostSample, Skipped
from ikd_fast.mmdet.dali.source import prepare
from ikd_fast.mmdet.progress import sample_epoch
from tests.dali.made import IMAGES, boxes_of, dataset, write_set
from tests.dali.test_host_transforms import ADAPTIVE, RESIZE, seeded

from mmdet.registry import DATASETS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("source"))


def fetched(data) -> list[HostSample | Skipped]:
    prepare(data)
    with sample_epoch(0):
        return data.__getitems__(range(len(data)))


def test_files_that_cannot_be_read_cost_their_place(tmp_path) -> None:
    root = write_set(tmp_path, replace={1: None, 2: b"", 4: b"\xff\xd8\xff"})
    for transforms in ([RESIZE], [dict(type="KeyedRandomness", transforms=[RESIZE])]):
        found = fetched(DATASETS.build(dataset(root, transforms)))
        reasons = {i: x.reason for i, x in enumerate(found) if isinstance(x, Skipped)}
        assert reasons.keys() == {1, 2, 4}
        assert reasons[1] == "No such file or directory"
        assert "empty file" in reasons[2]
        assert "truncated" in reasons[4]
        assert all(x.path.endswith(f"{i}.jpg") for i, x in enumerate(found))


def test_boxes_that_cannot_be_cost_their_place(root) -> None:
    data = DATASETS.build(dataset(root, [ADAPTIVE]))
    for i, box in {0: [1, 2, float("nan"), 9], 1: [1, 2, float("inf"), 9], 2: [500, 500, 520, 520]}.items():
        data.data_list[i]["instances"][0]["bbox"] = box
    reasons = {i: x.reason for i, x in enumerate(fetched(data)) if isinstance(x, Skipped)}
    assert reasons.keys() == {0, 1, 2}
    assert reasons[0] == "box 0 is [1, 2, nan, 9]; expected finite numbers"
    assert "inf" in reasons[1]
    assert "expected a box that overlaps its image" in reasons[2]


def test_an_image_whose_crop_is_empty_is_replaced_and_not_for_ever(root) -> None:
    data = DATASETS.build(
        dataset(root, [dict(type="FilterAnnotations", min_gt_bbox_wh=(20, 20), keep_empty=True)])
    )
    seeded(0)
    found = fetched(data)
    large = {i for i in range(IMAGES) if any(w >= 20 and h >= 20 for (_, _, w, h), _ in boxes_of(i))}
    assert 0 < len(large) < IMAGES
    for i, sample in enumerate(found):
        assert sample.payload[0].img_id == i if i in large else sample.payload[0].img_id in large
    data = DATASETS.build(dataset(root, [dict(type="FilterAnnotations", min_gt_bbox_wh=(999, 999))]))
    with pytest.raises(
        RuntimeError, match=r"CocoDataset: 1000 images in a row were rejected by the pipeline"
    ):
        fetched(data)


def test_wrappers_lead_to_the_right_image(root) -> None:
    one = dataset(root, [RESIZE])
    small = one | dict(indices=3)
    nested = dict(
        type="ConcatDataset",
        datasets=[dict(type="RepeatDataset", times=2, dataset=small), dict(type="ClassBalancedDataset", dataset=one, oversample_thr=1e-3)],
    )  # fmt: skip
    for config in (nested, dict(type="RepeatDataset", times=2, dataset=nested)):
        theirs, mine = DATASETS.build(copy.deepcopy(config)), DATASETS.build(copy.deepcopy(config))
        ids = [theirs[i]["data_samples"].img_id for i in range(len(theirs))]
        assert [x.payload[0].img_id for x in fetched(mine)] == ids
        assert len(ids) >= 17


def test_a_wrapper_that_mixes_images_is_refused(root) -> None:
    mixed = dict(
        type="MultiImageMixDataset",
        dataset=dataset(root, []) | dict(pipeline=[dict(type="LoadImageFromFile")]),
        pipeline=[dict(type="Mosaic", img_scale=(64, 64))],
    )
    with pytest.raises(
        TypeError, match=r"ConcatDataset, RepeatDataset or ClassBalancedDataset.*got MultiImageMix"
    ):
        prepare(DATASETS.build(mixed))
    with pytest.raises(TypeError, match="expects an mmdet data set.*got list"):
        prepare([1, 2])
