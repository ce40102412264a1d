"""mmengine's Runner on paper-scale configs: their own pipelines, samplers, hooks, evaluation and checkpoints, on a tiny COCO set."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.configs.reduced import build, distilled, expected_losses, load, reduce

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

pytestmark = pytest.mark.configs

FAMILIES = {
    "retinanet_x101-64x4d_r50_fgd_ikd_2x_coco": "retinanet_r50_2x_coco",
    "reppoints_x101-dconv_r50_mgd_ikd_2x_coco": "reppoints_r50_2x_coco",
    "mask-rcnn_cascade-x101-dconv_r50_fgd_ikd_2x_coco": "mask-rcnn_r50_2x_coco",
}
SMALL = {"Resize": dict(scale=(128, 96)), "Pad": dict(size=(128, 128))}


def small_data(config: Config, root: Path, train: int = 4, val: int = 2) -> Config:
    """The config's loaders on the first images of ``root``, resized to at most 128x96 (padded ones to 128x128)."""

    def shrink(pipeline: list) -> None:
        for transform in pipeline:
            transform.update(SMALL.get(transform["type"], {}))

    for loader, count in ((config.train_dataloader, train), (config.val_dataloader, val)):
        loader.update(num_workers=0, persistent_workers=False)
        if loader.sampler.get("slots"):
            assert loader.sampler.slots == 16
            loader.sampler.slots = count
        dataset = loader.dataset
        while "dataset" in dataset:
            shrink(dataset.pipeline)
            dataset = dataset.dataset
        shrink(dataset.pipeline)
        dataset.update(
            data_root=str(root), ann_file="ann.json", data_prefix=dict(img="images/"), indices=count
        )
    config.val_evaluator.ann_file = str(root / "ann.json")
    config.train_cfg.update(max_epochs=1)
    test_cfg = config.model.student.test_cfg
    test_cfg.get("rcnn", test_cfg).score_thr = 0.0  # so that random weights detect something
    return config


class Record(Hook):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.samples: list[Any] = []
        self.inherited: bool | None = None

    def before_train(self, runner: Runner) -> None:
        model = runner.model
        student, teacher = (model.student.state_dict(), model.ikd.teacher.net.state_dict())
        key = "neck.fpn_convs.0.conv.weight"
        self.inherited = torch.equal(student[key], teacher[key])

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.samples += data_batch["data_samples"]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:  # fmt: skip
        self.logs.append({k: float(v.detach()) for k, v in outputs.items()})


def train(config: Config, root: Path, work_dir: Path, evaluate: bool = False) -> tuple[Runner, Record]:
    config = small_data(reduce(config), root)
    config.train_cfg.val_interval = 1 if evaluate else 2
    config.update(work_dir=str(work_dir), log_level="WARNING", randomness=dict(seed=0))
    config.default_hooks.checkpoint.update(save_optimizer=False)
    runner = Runner.from_cfg(config)
    record = Record()
    runner.register_hook(record)
    runner.train()
    return runner, record


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_evaluates_and_saves(name, coco80_root, tmp_path):
    config = load(name)
    runner, record = train(config, coco80_root, tmp_path, evaluate=True)
    assert len(record.logs) == 2
    for logs in record.logs:
        assert {k for k in logs if "loss" in k} - {"loss"} == expected_losses(name, config)
        assert all(math.isfinite(v) for v in logs.values()), logs
    assert record.inherited is config.model.init_student is not name.startswith("mask-rcnn")
    assert all("flip" in sample.metainfo for sample in record.samples)
    if name.startswith("mask-rcnn"):
        assert all(len(s.gt_instances.masks) == len(s.gt_instances.bboxes) > 0 for s in record.samples)
    assert max(logs["aug/crop_frac"] for logs in record.logs) > 0  # half of the images have a large object
    plain = reduce(load(FAMILIES[name]))
    assert not distilled(plain)
    saved = torch.load(tmp_path / "epoch_1.pth")["state_dict"]
    build(plain).load_state_dict(saved, strict=True)
    scalars = runner.message_hub.log_scalars
    assert any(key.startswith("val/coco/bbox_mAP") for key in scalars), sorted(scalars)


def test_copy_paste_adds_objects_and_never_flips(coco80_root, tmp_path):
    _, record = train(load("retinanet_x101-64x4d_r50_fgd_copypaste_noflip_2x_coco"), coco80_root, tmp_path)
    assert all(math.isfinite(v) for logs in record.logs for v in logs.values())
    assert (
        max(len(sample.gt_instances.bboxes) for sample in record.samples) > 2
    )  # each image of the set has 2
    assert {sample.img_shape for sample in record.samples} == {(128, 128)}
    assert not any("flip" in sample.metainfo for sample in record.samples)


def test_cutout_erases_a_square_and_never_flips(coco80_root, tmp_path):
    pytest.importorskip("kornia", reason="cutout needs the kornia extra: pip install 'ikd_fast[kornia]'")
    runner, record = train(load("retinanet_x101-64x4d_r50_fgd_cutout_noflip_2x_coco"), coco80_root, tmp_path)
    assert all(math.isfinite(v) for logs in record.logs for v in logs.values())
    assert not any("flip" in sample.metainfo for sample in record.samples)
    samples = record.samples[:2]
    data = dict(inputs=[torch.zeros(3, 96, 128, dtype=torch.uint8) for _ in samples], data_samples=samples)
    for sample in samples:
        sample.set_metainfo(dict(img_shape=(96, 128)))
    images = runner.model.data_preprocessor(data, True)["inputs"]
    black = images.amin((0, 2, 3), keepdim=True)
    erased = (images != black).all(1)
    for mask in erased:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        h, w = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert int(mask.sum()) == h * w
        assert abs(h - w) <= 1
        assert 0.02 * 0.8 <= h * w / (96 * 128) <= 0.2 * 1.2
