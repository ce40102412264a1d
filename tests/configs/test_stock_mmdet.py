"""The README's diff on stock mmdet configs, through mmdet's own ``tools/train.py``."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ikd_fast.mmdet.build import build_detector, model_config, without_init
from tests.mmdet.conftest import draw  # imports ikd_fast.mmdet before mmdet

pytestmark = pytest.mark.configs

# student, teacher, preset, beta, further settings of the losses. FCOS is BGR without normalising by std; the two-stage pair
# needs RoIAlign; Mask R-CNN's student learns masks, its teacher is a plain Faster R-CNN of another depth.
FAMILIES = {
    "retinanet": ("retinanet/retinanet_r50_fpn_1x_coco.py", "retinanet/retinanet_r101_fpn_1x_coco.py", "retinanet", "1e-5", ""),
    "fcos": (
        "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "fcos/fcos_r101-caffe_fpn_gn-head-1x_coco.py", "retinanet", "1e-5", "",
    ),
    "gfl": ("gfl/gfl_r50_fpn_1x_coco.py", "gfl/gfl_r101_fpn_ms-2x_coco.py", "retinanet", "1e-5", ""),
    "faster_rcnn": (
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py", "mask_rcnn", "2.5e-7",
        ", levels=[0, 1, 2, 3]",
    ),
    "mask_rcnn": (
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py", "mask_rcnn", "2.5e-7",
        ", levels=[0, 1, 2, 3]",
    ),
}  # fmt: skip
STEPS, BATCH = 3, 2


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A folder with ``data/coco`` as mmdet's configs expect it: six drawn images, two objects each."""
    import cv2

    root = tmp_path_factory.mktemp("stock")
    home = root / "data" / "coco"
    (home / "annotations").mkdir(parents=True)
    (home / "train2017").mkdir()
    images, annotations = [], []
    for i in range(STEPS * BATCH):
        pixels, boxes = draw(i)
        cv2.imwrite(str(home / "train2017" / f"{i}.png"), pixels)
        images.append(dict(id=i, file_name=f"{i}.png", height=pixels.shape[0], width=pixels.shape[1]))
        for x0, y0, x1, y1 in boxes:
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=i, category_id=1, iscrowd=0, area=(x1 - x0) * (y1 - y0),
                    bbox=[x0, y0, x1 - x0, y1 - y0], segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]],
                )
            )  # fmt: skip
    text = json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="person")]))
    for part in ("train2017", "val2017"):
        (home / "annotations" / f"instances_{part}.json").write_text(text)
    shutil.copytree(home / "train2017", home / "val2017")
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_of_the_diff(family, coco, tmp_path):
    student, teacher, preset, beta, more = FAMILIES[family]
    torch.manual_seed(0)
    net = build_detector(without_init(model_config(f"mmdet::{teacher}")))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "teacher.pth")
    (tmp_path / "ikd.py").write_text(f"""
_base_ = 'mmdet::{student}'
custom_imports = dict(imports=['ikd_fast.mmdet'])
model = dict(_delete_=True, type='IKDDistiller', student=_base_.model,
    teacher_config='mmdet::{teacher}', teacher_ckpt='{tmp_path}/teacher.pth',
    losses=[dict(type='FGDLoss', preset='{preset}'{more})],
    adv=dict(beta={beta}, attack=dict(type='OnlineDIFGSM', mode='single'), loss=dict(type='AdvFeatureLoss'{more})),
    augment=dict(type='AdaptiveFreqAug'), stop_at=dict(epoch=16))
""")
    options = [
        "model.student.backbone.init_cfg=None",  # its weights are on the net
        "train_dataloader.dataset.pipeline.2.scale=(128,128)",
        "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False",
        f"train_dataloader.batch_size={BATCH}",
        "train_cfg.max_epochs=1", "val_cfg=None",
        "val_dataloader=None",
        "val_evaluator=None", "default_hooks.logger.interval=1",
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "ikd_fast.mmdet", "tools/train.py", str(tmp_path / "ikd.py"),
        "--work-dir", str(tmp_path / "work"), "--cfg-options", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=coco)
    assert done.returncode == 0, done.stderr[-3000:]
    (scalars,) = (tmp_path / "work").glob("*/vis_data/scalars.json")
    steps = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert len(steps) == STEPS
    for step in steps:
        assert {"loss", "loss_kd/fgd", "loss_kd/adv", "attack/linf"} <= step.keys()
        assert all(math.isfinite(v) for v in step.values())
        assert 0 < step["attack/linf"] <= 8 + 1e-3  # grey levels; float32 of normalised pixels
    plain = build_detector(without_init(model_config(f"mmdet::{student}")))
    saved = torch.load(tmp_path / "work" / "epoch_1.pth", weights_only=False)["state_dict"]
    assert plain.load_state_dict(saved, strict=True)
