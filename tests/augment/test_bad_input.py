"""Bad input: the message names what was expected, what came, where, and what to write."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ikd_fast.augment import AdaptiveFreqAug

NAN, INF = float("nan"), float("inf")
GOOD = [1.0, 1, 9, 9]
IMAGE = torch.zeros(3, 20, 30, dtype=torch.uint8)


def plan(*rows, **options):
    plan_args = {k: options.pop(k) for k in ("scale", "ignore", "ids", "epoch", "sizes") if k in options}
    boxes = [torch.tensor([GOOD]), torch.tensor(rows)]
    args = {"sizes": [(20, 30)] * 2, "ids": [0, 1], "epoch": 0, **plan_args}
    return AdaptiveFreqAug(**options).plan(boxes, args.pop("sizes"), **args)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([1.0, 1, NAN, 9], r"boxes\[1\]\[1\]: expected finite numbers, got \(1, 1, nan, 9\); .*isfinite"),
        ([1.0, -INF, 9, 9], r"boxes\[1\]\[1\]: expected finite numbers, got \(1, -inf, 9, 9\)"),
        (
            [9.0, 1, 1, 9],
            r"boxes\[1\]\[1\]: expected x1 <= x2 and y1 <= y2 .*got \(9, 1, 1, 9\); .*x, y, w, h write",
        ),
        ([1.0, 9, 9, 1], r"boxes\[1\]\[1\]: expected x1 <= x2 and y1 <= y2"),
        (
            [30.0, 1, 35, 9],
            r"boxes\[1\]\[1\]: .*overlaps its image of 20x30 .*got \(30, 1, 35, 9\); .*on_degenerate='drop'",
        ),
        ([-5.0, -5, 0, 9], r"boxes\[1\]\[1\]: .*overlaps its image"),
        (
            [5.0, 5, 5, 9],
            r"boxes\[1\]\[1\]: expected a box of some area, got \(5, 5, 5, 9\); .*on_degenerate='drop'",
        ),
    ],
)
def test_boxes(box: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(GOOD, box)
    target = {"boxes": torch.tensor([GOOD, box])}
    with pytest.raises(ValueError, match=message):
        AdaptiveFreqAug()(
            [IMAGE, IMAGE], [{"boxes": torch.tensor([GOOD])}, target], image_ids=[0, 1], epoch=0
        )


def test_boxes_that_are_fine() -> None:
    assert len(plan([-5.0, -5, 3, 3], [25.0, 15, 99, 99])) == 2  # partly outside
    assert len(plan([5.0, 5, 5, 9], [40.0, 40, 50, 50], on_degenerate="drop")) == 2
    for nothing in (torch.zeros(0, 4), torch.zeros(0), [], np.zeros((0, 4), np.float32)):
        assert AdaptiveFreqAug(noise_prob=1).plan([nothing], [(20, 30)], [0], 0).noise_frac == 1


def test_normalised_boxes() -> None:
    aug = AdaptiveFreqAug(box_format="cxcywh_norm")
    with pytest.raises(ValueError, match=r"boxes\[0\]\[0\]: expected w >= 0 .*box_format='xyxy'"):
        aug.plan([[[0.5, 0.5, -0.1, 0.1]]], [(20, 30)], [0], 0)
    with pytest.raises(ValueError, match=r"boxes\[0\]\[0\]: .*overlaps its image"):
        aug.plan([[[5.0, 5, 1, 1]]], [(20, 30)], [0], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [(20, 30)]}, r"boxes: expected 1 entries, one per image .*got 2"),
        ({"ids": [1]}, r"ids: expected 2 entries.*got 1"),
        ({"scale": [(1, 1)]}, r"scale: expected 2 entries.*got 1"),
        ({"scale": [(1, 1), (0, 1)]}, r"scale\[1\]: expected two positive numbers .*got \(0\.0, 1\.0\)"),
        ({"ignore": [None]}, r"ignore: expected 2 entries.*got 1"),
        ({"ignore": [None, [1, 0]]}, r"ignore\[1\]: expected 1 flags, one per box, got 2"),
        ({"sizes": [(20, 30), (0, 30)]}, r"sizes\[1\]: expected \(h, w\), both >= 1, got \(0, 30\)"),
        (
            {"sizes": [(20, 30), (20, 1)], "crop_ratio": 0.9},
            r"sizes\[1\]: .*crop_ratio=0\.9.*\(20, 1\).*smaller crop_ratio",
        ),
        ({"ids": None}, r"image ids: expected with seed=0, got None.*image_ids=ids.*seed=None"),
        ({"epoch": None}, r"epoch: expected with seed=0, got None.*epoch=epoch"),
        ({"epoch": -1}, "epoch must be in"),
        ({"ids": [0, 1.5]}, r"image id must be an integer, got 1\.5"),
        (
            {"rule": lambda areas: "flip"},
            r"rule\(areas\) returns must be one of 'crop', 'noise', 'keep', got 'flip'",
        ),
    ],
)
def test_plan_arguments(change: dict, message: str) -> None:
    boxes = [0.0, 0, 1, 9] if "crop_ratio" in change else GOOD
    with pytest.raises((ValueError, TypeError), match=message):
        plan(boxes, **change)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rule": "all"}, r"rule must be one of 'any_large', 'no_small' or a callable\(areas\), got 'all'"),
        ({"rng": "numpy"}, "rng must be one of 'philox', 'torch', got 'numpy'"),
        ({"box_format": "xywh"}, "box_format must be one of 'xyxy', 'cxcywh_norm', got 'xywh'"),
        ({"no_boxes": "crop"}, "no_boxes must be one of 'noise', 'keep', got 'crop'"),
        ({"on_degenerate": "warn"}, "on_degenerate must be one of 'error', 'drop', got 'warn'"),
        ({"noise_std": -1}, "noise_std must be >= 0 .*got -1"),
        ({"noise_std": NAN}, "noise_std must be >= 0 .*got nan"),
        ({"noise_prob": 1.5}, r"noise_prob must be a probability in \[0, 1\], got 1\.5"),
        ({"crop_prob": -0.1}, r"crop_prob must be .*got -0\.1"),
        ({"hflip_prob": NAN}, "hflip_prob must be .*got nan"),
        ({"crop_ratio": 1.0}, r"crop_ratio must be in \[0, 1\), got 1\.0"),
        ({"area_threshold": -1}, "area_threshold must be >= 0 .*got -1"),
        ({"seed": -3}, r"seed must be in 0\.\.2\*\*64-1, got -3"),
        ({"value_range": (0, 1), "mean": (1, 1, 1), "std": (1, 1, 1)}, "got both"),
    ],
)
def test_options(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveFreqAug(**option)


TARGET = {"boxes": torch.tensor([GOOD]), "labels": torch.tensor([1])}


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([IMAGE], [TARGET, TARGET], r"targets: expected 1 entries, one per image \(as images\), got 2"),
        (
            IMAGE,
            [TARGET] * 3,
            r"images: expected a stack \[N, 3, H, W\] .*got \[3, 20, 30\]; write images\[None\]",
        ),
        (IMAGE[None].permute(0, 2, 3, 1), [TARGET], r"got \[1, 20, 30, 3\]; .*images\.permute\(0, 3, 1, 2\)"),
        ([IMAGE[:1]], [TARGET], r"images\[0\]: expected \[3, H, W\] or \[H, W, 3\], got \[1, 20, 30\]"),
        ([IMAGE[None]], [TARGET], r"images\[0\]: expected .*got \[1, 3, 20, 30\]; stack"),
        (["x.jpg"], [TARGET], r"images\[0\]: expected a tensor or a numpy array, got str"),
        (IMAGE.numpy(), [TARGET] * 3, r"images: expected a tensor .* or a list, got ndarray"),
        (
            [IMAGE, IMAGE.float()],
            [TARGET] * 2,
            r"images\[1\]: expected torch\.uint8 on cpu as images\[0\], got torch\.float32",
        ),
        (
            [IMAGE.float()],
            [TARGET],
            r"images\[0\]: float images must say their scale; found 0 to 0; write value_range",
        ),
        ([IMAGE.int()], [TARGET], r"images\[0\]: expected uint8 .*got torch\.int32"),
        ([IMAGE], [{"labels": [1]}], r"targets\[0\]: expected a dict with 'boxes' .*got keys \['labels'\]"),
        ([IMAGE], [torch.tensor([GOOD])], r"targets\[0\]: expected a dict with 'boxes' .*got Tensor"),
        ([IMAGE], [{"boxes": torch.tensor(GOOD)}], r"targets\[0\]\['boxes'\]: expected \[n, 4\], got \[4\]"),
        (
            [IMAGE],
            [{**TARGET, "labels": [1, 2]}],
            r"targets\[0\]\['labels'\]: expected 1, one per box, got 2",
        ),
        (
            [IMAGE],
            [{**TARGET, "masks": torch.zeros(2, 20, 30)}],
            r"targets\[0\]\['masks'\]: expected 1, one per box, got 2",
        ),
        (
            [IMAGE],
            [{**TARGET, "masks": torch.zeros(1, 9, 9)}],
            r"targets\[0\]\['masks'\]: expected \[n, 20, 30\] .*\[1, 9, 9\]",
        ),
        (
            [IMAGE],
            [{**TARGET, "iscrowd": [0, 1]}],
            r"targets\[0\]\['iscrowd'\]: expected 1 flags, one per box, got 2",
        ),
        (
            IMAGE[None],
            [{**TARGET, "size": (21, 30)}],
            r"targets\[0\]\['size'\]: .*\(20, 30\), got \(21, 30\); .*list",
        ),
    ],
)
def test_images_and_targets(images, targets, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AdaptiveFreqAug(hflip_prob=1.0, seed=0)(images, targets, image_ids=range(len(images)), epoch=0)


def test_a_plan_of_other_images() -> None:
    aug = AdaptiveFreqAug(noise_prob=1)
    one = aug.plan([[GOOD]], [(20, 30)], [0], 0)
    with pytest.raises(
        ValueError, match=r"plan: expected one for 2 images, got one for 1; write plan\.select"
    ):
        aug.apply([IMAGE] * 2, [TARGET] * 2, one)
    with pytest.raises(
        ValueError, match=r"images\[0\]: expected \(20, 30\) .*as in the plan, got \(20, 29\)"
    ):
        aug.apply([IMAGE[:, :, :29]], [TARGET], one)
    with pytest.raises(
        ValueError, match=r"images\[0\]: expected \(20, 30\) .*as in the plan, got \(19, 30\)"
    ):
        aug.apply(IMAGE[None], [{**TARGET, "size": (19, 30)}], one)
    big = [[0, 0, 30, 20]]
    crop = AdaptiveFreqAug(area_threshold=9).plan([big], [(20, 30)], [4], 0)
    with pytest.raises(
        ValueError, match=r"images\[0\]: expected .*plan's crop leaves, got \(20, 30\); .*apply_geometry"
    ):
        aug.apply_noise([IMAGE], crop)
    with pytest.raises(ValueError, match=r"sizes: expected the plan's after its crop"):
        aug.apply_noise([IMAGE], one, [(10, 10)])


def test_the_message_of_a_wrong_list_comes_before_any_work() -> None:
    with pytest.raises(
        ValueError, match=r"image_ids: expected 1 entries, one per image \(as images\), got 2"
    ):
        AdaptiveFreqAug()([IMAGE], [TARGET], image_ids=[1, 2], epoch=0)


def test_boxes_on_another_device() -> None:
    far = {"boxes": torch.tensor([GOOD], device="meta")}
    aug = AdaptiveFreqAug()
    with pytest.raises(
        ValueError, match=r"boxes\[0\]: expected boxes on the CPU, got meta; .*write boxes\.cpu\(\)"
    ):
        aug.plan([far["boxes"]], [(20, 30)], [0], 0)
    one = aug.plan([[GOOD]], [(20, 30)], [0], 0)
    with pytest.raises(
        ValueError, match=r"targets\[0\]\['boxes'\]: expected on the CPU or on cpu .*got meta"
    ):
        aug.apply([IMAGE], [far], one)
