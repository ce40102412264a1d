"""What an attack may ask of the pipeline: stable images, and their geometry."""

from __future__ import annotations

import re

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast import OnlineDIFGSM
from ikd_fast.mmdet.pipeline_checks import check_pipeline, composes, fixed_resize, leaves, pipeline_of
from tests.mmdet.conftest import retinanet, run, stock_config, with_ikd

from mmdet.registry import DATASETS, MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.runner import Runner


class Keeps(OnlineDIFGSM):
    """An attack that keeps a perturbation for each image."""

    needs_stable_ids = True


class Follows(OnlineDIFGSM):
    """An attack that moves what it kept along with the image."""

    needs_views = True


def dataset_of(root, *extra, wrap=None, meta_keys=None):
    config = stock_config(root, pipeline_extra=extra)["train_dataloader"]["dataset"]
    if meta_keys:
        config["pipeline"][-1]["meta_keys"] = meta_keys
    return DATASETS.build(Config(wrap(config) if wrap else config).to_dict())


def mosaic(config):
    packed = config["pipeline"].pop()
    return dict(
        type="MultiImageMixDataset",
        dataset=config,
        pipeline=[dict(type="Mosaic", img_scale=(64, 64)), packed],
    )


def test_composed_images_are_refused_by_an_attack_that_keeps(coco_root) -> None:
    composed = dataset_of(coco_root, wrap=mosaic)
    with pytest.raises(ValueError, match="composes images") as error:
        check_pipeline(composed, Keeps())
    text = str(error.value)
    assert "train_dataloader.dataset.pipeline[0] (Mosaic)" in text
    assert "mode='single'" in text
    check_pipeline(composed, OnlineDIFGSM())  # `single` keeps nothing
    check_pipeline(composed, None)
    check_pipeline(dataset_of(coco_root), Keeps())


def test_cached_mosaic_inside_wrappers_is_found(coco_root) -> None:
    cached = dict(type="CachedMosaic", img_scale=(64, 64), max_cached_images=4)
    choice = dict(type="RandomChoice", transforms=[[cached], [dict(type="RandomFlip", prob=0.5)]])
    wrapped = dataset_of(
        coco_root, choice, wrap=lambda config: dict(type="RepeatDataset", times=2, dataset=config)
    )
    with pytest.raises(
        ValueError,
        match=r"train_dataloader\.dataset\.dataset\.pipeline\[3\]\.transforms\[0\]\.transforms\[0\] \(CachedMosaic\)",
    ):
        check_pipeline(wrapped, Keeps())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(type="Mosaic"), True),
        (dict(type="MixUp"), True),
        (dict(type="CopyPaste"), True),
        (dict(type="CachedMixUp"), True),
        (dict(type="RandomFlip", prob=0.5), False),
        (dict(type="RandomCrop", crop_size=(8, 8)), False),
        (dict(type="Resize", scale=(8, 8)), False),
    ],
)
def test_what_composes(config, expected) -> None:
    assert composes(TRANSFORMS.build(config)) is expected


CROP = dict(type="RandomCrop", crop_size=(64, 64))
FLIP = dict(type="RandomFlip", prob=0.5)


def test_one_resize_and_one_flip_need_nothing_more(coco_root) -> None:
    check_pipeline(dataset_of(coco_root), Follows())
    check_pipeline(dataset_of(coco_root, FLIP, dict(type="PhotoMetricDistortion")), Follows())
    check_pipeline(dataset_of(coco_root, CROP, FLIP), OnlineDIFGSM())  # `single` follows nothing
    keyed = dict(type="KeyedRandomness", transforms=[FLIP])
    check_pipeline(dataset_of(coco_root, keyed), Follows())


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ([CROP], "RandomCrop"),
        ([FLIP, FLIP], "RandomFlip"),
        ([dict(type="Resize", scale=(64, 64))], "Resize"),
        ([dict(type="Pad", size_divisor=32)], "Pad"),
        ([dict(type="AdaptiveFreqAug")], "AdaptiveFreqAugTransform"),
        ([dict(type="RandomChoice", transforms=[[FLIP], [CROP]])], "RandomCrop"),
    ],
)
def test_more_geometry_needs_the_matrix_and_the_line_can_be_pasted(coco_root, extra, named) -> None:
    """The line in the message, put where it says, makes the check pass and the matrix arrive."""
    with pytest.raises(ValueError, match="homography_matrix") as error:
        check_pipeline(dataset_of(coco_root, *extra), Follows())
    text = str(error.value)
    assert f"({named}) is more than one resize and one flip" in text
    assert f"train_dataloader.dataset.pipeline[{3 + len(extra)}]" in text
    line = eval(text.splitlines()[-1].strip())
    assert line["type"] == "PackDetInputs"
    assert line["meta_keys"][:2] == ("img_id", "img_path")
    mended = dataset_of(coco_root, *extra, meta_keys=line["meta_keys"])
    check_pipeline(mended, Follows())
    for _, transform in pipeline_of(mended, ""):
        if hasattr(transform, "set_epoch"):
            transform.set_epoch(0)
    assert tuple(mended[0]["data_samples"].homography_matrix.shape) == (3, 3)


def test_transforms_that_record_nothing_are_refused(coco_root) -> None:
    expand = dict(type="RandomChoice", transforms=[[dict(type="Expand")], [FLIP]])
    with pytest.raises(
        ValueError, match=r"pipeline\[3\]\.transforms\[0\]\.transforms\[0\] \(Expand\) moves pixels without"
    ):
        check_pipeline(dataset_of(coco_root, expand), Follows())


def test_own_meta_keys_are_kept_in_the_line(coco_root) -> None:
    keys = ("img_id", "img_shape")
    with pytest.raises(ValueError, match=r"meta_keys=\('img_id', 'img_shape', 'ori_shape', 'scale_factor'\)"):
        check_pipeline(dataset_of(coco_root, meta_keys=keys), Follows())
    with pytest.raises(ValueError, match=r"needs ori_shape, scale_factor, flip, flip_direction, which"):
        check_pipeline(dataset_of(coco_root, FLIP, meta_keys=keys), Follows())
    concat = dataset_of(
        coco_root, CROP, wrap=lambda config: dict(type="ConcatDataset", datasets=[config, config])
    )
    with pytest.raises(ValueError, match=r"train_dataloader\.dataset\.datasets\[0\]\.pipeline\[4\]"):
        check_pipeline(concat, Follows())
    places = [place for place, _ in pipeline_of(concat, "set")]
    assert places[-1] == "set.datasets[1].pipeline[4]"
    assert [[place for place, _ in transforms][-1] for _, transforms in leaves(concat, "set")] == [
        "set.datasets[0].pipeline[4]", "set.datasets[1].pipeline[4]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "fixed"),
    [
        ([], ""),
        ([FLIP, CROP, dict(type="AdaptiveFreqAug")], ""),
        ([dict(type="RandomResize", scale=(80, 80), ratio_range=(0.5, 2))], "expected one Resize"),
        ([dict(type="Pad", size_divisor=32)], r"\(Pad\) may resize too"),
        ([dict(type="KeyedRandomCrop")], r"\(KeyedRandomCrop\) may resize too"),
    ],
)
def test_which_pipelines_resize_by_one_rule(coco_root, extra, fixed) -> None:
    ((_, transforms),) = leaves(dataset_of(coco_root, *extra), "train_dataloader.dataset")
    resize, why = fixed_resize(transforms)
    assert re.search(fixed, why)
    assert (resize is None) == bool(fixed)
    assert (why == "") == (not fixed)


def test_a_crop_before_the_resize_is_another_rule_each_time(coco_root) -> None:
    config = stock_config(coco_root)["train_dataloader"]["dataset"]
    config["pipeline"].insert(2, CROP)
    ((_, transforms),) = leaves(DATASETS.build(Config(config).to_dict()), "set")
    assert fixed_resize(transforms) == (None, "set.pipeline[2] (RandomCrop) comes before the resize")
    config["pipeline"][2:4] = [dict(type="RandomResize", scale=(80, 80), ratio_range=(0.5, 2))]
    ((_, transforms),) = leaves(DATASETS.build(Config(config).to_dict()), "set")
    assert "set.pipeline[2] is RandomResize, which draws its scale" in fixed_resize(transforms)[1]


@pytest.mark.parametrize(("kind", "message"), [(Keeps, "composes images"), (Follows, "homography_matrix")])
def test_training_checks_before_its_first_step(coco_root, tmp_path, kind, message) -> None:
    config = with_ikd(stock_config(coco_root, epochs=1, pipeline_extra=[CROP]))
    if kind is Keeps:
        config["train_dataloader"]["dataset"] = mosaic(config["train_dataloader"]["dataset"])
    runner = Runner.from_cfg(Config(config | dict(work_dir=str(tmp_path))))
    runner.model.ikd.attack = kind()
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert runner.iter == 0


@pytest.mark.parametrize("distilled", [False, True])
def test_load_from_that_fits_nothing_stops_the_run(coco_root, tmp_path, distilled) -> None:
    torch.save(dict(state_dict={f"layer.{i}.w": torch.ones(2) for i in range(5)}), tmp_path / "foreign.pth")
    config = stock_config(coco_root, epochs=1)
    with pytest.raises(ValueError, match="nothing in the checkpoint fits") as error:
        run(with_ikd(config) if distilled else config, tmp_path, load_from=str(tmp_path / "foreign.pth"))
    text = str(error.value)
    assert "it has 5 keys, e.g. layer.0.w" in text
    assert "backbone.conv1.weight" in text
    assert "init_cfg=dict(type='Pretrained', checkpoint='...')" in text


def test_a_checkpoint_that_fits_in_part_still_loads_into_a_plain_model(coco_root, tmp_path) -> None:
    """As mmdet does it: a head of other classes starts anew."""
    torch.save(dict(state_dict=MODELS.build(retinanet(classes=5)).state_dict()), tmp_path / "five.pth")
    runner, logs = run(stock_config(coco_root, epochs=1), tmp_path, load_from=str(tmp_path / "five.pth"))
    assert len(logs) == 3


def test_a_model_that_renames_keys_while_loading_is_not_refused() -> None:
    from ikd_fast.mmdet.state import check_any_fits

    class Renames(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = torch.nn.Linear(2, 1)

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for key in [k for k in state_dict if not k.startswith("student.")]:
                state_dict[f"student.{key}"] = state_dict.pop(key)
            super()._load_from_state_dict(state_dict, prefix, *args)

    weights = torch.nn.Linear(2, 1).state_dict()
    check_any_fits(Renames(), weights)
    with pytest.raises(ValueError, match="nothing in the checkpoint fits the model, a Linear"):
        check_any_fits(torch.nn.Linear(3, 1), weights | {"weight": torch.ones(9, 9), "bias": torch.ones(7)})
    with pytest.raises(ValueError, match="it has 0 keys"):
        check_any_fits(torch.nn.Linear(3, 1), {})
