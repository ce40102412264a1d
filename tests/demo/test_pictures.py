"""The arithmetic behind the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from ikd_fast.demo.pictures.curves import smooth
from ikd_fast.demo.pictures.detections import busiest, match
from ikd_fast.demo.pictures.seeds import draw_seeds

TRUTH = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]])


def test_matching_takes_each_annotation_once_best_score_first() -> None:
    boxes = np.array([[0.0, 0, 10, 9], [0, 0, 10, 10], [24, 0, 34, 10], [20, 0, 30, 6]])
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    hit, found = match(boxes, scores, TRUTH)
    # the second is a duplicate; the third has IoU 6/14 with the second crown, the fourth 0.6
    assert hit.tolist() == [True, False, False, True]
    assert found.tolist() == [True, True]


@pytest.mark.parametrize("count", [0, 1])
def test_matching_with_nothing_on_one_side(count: int) -> None:
    hit, found = match(TRUTH[:count], np.ones(count), TRUTH[: 1 - count])
    assert hit.tolist() == [False] * count
    assert found.tolist() == [False] * (1 - count)


def test_smoothing_looks_back_only() -> None:
    values = [4.0, 0.0, 2.0, 6.0]
    assert smooth(values, width=3).tolist() == [4.0, 2.0, 2.0, pytest.approx(8 / 3)]


def test_the_busiest_images_without_crowds() -> None:
    coco = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 3, "bbox": [1, 2, 3, 4], "category_id": 7},
            {"image_id": 2, "bbox": [0, 0, 1, 1], "category_id": 7, "iscrowd": 1},
            {"image_id": 2, "bbox": [5, 5, 1, 1], "category_id": 3},
        ],
    }
    (first, boxes), (second, _) = busiest(coco, 2)
    assert (first["id"], second["id"]) == (2, 3)
    assert boxes.tolist() == [[5, 5, 6, 6, 1]]


def test_a_right_box_of_the_wrong_class_is_wrong() -> None:
    truth = np.array([[0.0, 0, 10, 10, 1], [0, 0, 10, 10, 0]])
    hit, found = match(np.array([[0.0, 0, 10, 10, 0], [0, 0, 10, 10, 2]]), np.array([0.8, 0.9]), truth)
    assert hit.tolist() == [True, False]
    assert found.tolist() == [False, True]


def test_seeds_picture_is_a_png(tmp_path) -> None:
    scores = {"AP": 0.1, "AP50": 0.3, "AP_S": None, "AP_M": 0.2, "AP_L": None}
    names = ("teacher", "alone", "fgd", "fgd_ikd")
    results = {
        seed: {name: {"val": {**scores, "AP50": 0.3 + 0.01 * seed}} for name in names} for seed in range(3)
    }
    path = draw_seeds(tmp_path / "seeds.png", results)
    assert path.read_bytes().startswith(b"\x89PNG")
