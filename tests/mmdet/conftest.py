"""A tiny COCO set of drawn rectangles and a tiny RetinaNet, so that mmdet's own Runner runs in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)

IMAGES = 12
SIDE = 96


@pytest.fixture(autouse=True)
def _mmdet_scope():
    """What a Runner does first: everything of mmdet registered, and names looked up there."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)


@pytest.fixture(scope="session")
def compiled_operators(shared_dir, tmp_path_factory):
    """``mmcv._ext`` as compiled for this Python, under no name in sys.modules: compat goes on serving mmcv.ops."""
    from tests.mmdet.operator_truth import compiled_wheel, load_extension

    return load_extension(compiled_wheel(shared_dir), tmp_path_factory.mktemp("mmcv"))


def draw(i: int) -> tuple[np.ndarray, list[list[float]]]:
    """Image i and its xyxy boxes: even images have a large object, odd ones small objects only."""
    rng = np.random.default_rng(i)
    image = rng.integers(60, 120, (SIDE, SIDE, 3), dtype=np.uint8)
    boxes = []
    for side in [48, 14] if i % 2 == 0 else [14, 20]:
        x, y = rng.integers(2, SIDE - side - 2, 2)
        image[y : y + side, x : x + side] = rng.integers(150, 250, 3)
        boxes.append([float(x), float(y), float(x + side), float(y + side)])
    return image, boxes


def write_coco(root: Path) -> Path:
    """The set of :func:`coco_root`, in a folder of one's own."""
    import cv2

    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(IMAGES):
        image, boxes = draw(i)
        cv2.imwrite(str(root / "images" / f"{i}.png"), image)
        images.append(dict(id=i, file_name=f"{i}.png", width=SIDE, height=SIDE))
        for x0, y0, x1, y1 in boxes:
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=1,
                    iscrowd=0,
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    area=(x1 - x0) * (y1 - y0),
                    segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]],
                )
            )
    (root / "ann.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="box")]))
    )
    return root


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


def retinanet(channels: int = 8, classes: int = 1, **preprocessor) -> dict:
    return dict(
        type="RetinaNet",
        data_preprocessor=dict(
            type="DetDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True, pad_size_divisor=32,
        ) | preprocessor,
        backbone=dict(
            type="ResNet", depth=18, base_channels=channels, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=-1,
            norm_cfg=dict(type="BN", requires_grad=True), norm_eval=False, style="pytorch",
        ),
        neck=dict(
            type="FPN", in_channels=[channels * k for k in (1, 2, 4, 8)], out_channels=16, start_level=1,
            add_extra_convs="on_input", num_outs=4,
        ),
        bbox_head=dict(
            type="RetinaHead", num_classes=classes, in_channels=16, stacked_convs=1, feat_channels=16,
            anchor_generator=dict(
                type="AnchorGenerator", octave_base_scale=2, scales_per_octave=2, ratios=[1.0], strides=[8, 16, 32, 64]
            ),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
        ),
        train_cfg=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
            sampler=dict(type="PseudoSampler"), allowed_border=-1, pos_weight=-1, debug=False,
        ),
        test_cfg=dict(nms_pre=200, min_bbox_size=0, score_thr=0.01, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20),
    )  # fmt: skip


def stock_config(
    root: Path, *, epochs: int = 2, batch_size: int = 4, pipeline_extra=(), masks: bool = False
) -> dict:
    """A plain mmdet config: nothing of ikd_fast in it."""
    dataset = dict(
        type="CocoDataset", data_root=str(root), ann_file="ann.json", data_prefix=dict(img="images/"),
        metainfo=dict(classes=("box",)), serialize_data=False,
    )  # fmt: skip
    train = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=masks),
        dict(type="Resize", scale=(80, 80), keep_ratio=True),
        *pipeline_extra,
        dict(type="PackDetInputs"),
    ]
    test = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(80, 80), keep_ratio=True),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(
            type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        ),
    ]
    loader = dict(num_workers=0, persistent_workers=False)
    val = dict(batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False), **loader)
    return dict(
        default_scope="mmdet",
        model=retinanet(),
        train_dataloader=dict(
            batch_size=batch_size, sampler=dict(type="DefaultSampler", shuffle=True),
            dataset=dataset | dict(pipeline=train), **loader,
        ),
        val_dataloader=val | dict(dataset=dataset | dict(pipeline=test, test_mode=True)),
        val_evaluator=dict(type="CocoMetric", ann_file=str(root / "ann.json"), metric="bbox"),
        val_cfg=dict(type="ValLoop"),
        test_dataloader=val | dict(dataset=dataset | dict(pipeline=test, test_mode=True)),
        test_evaluator=dict(type="CocoMetric", ann_file=str(root / "ann.json"), metric="bbox"),
        test_cfg=dict(type="TestLoop"),
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=1000),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
        default_hooks=dict(
            timer=dict(type="IterTimerHook"), logger=dict(type="LoggerHook", interval=1),
            param_scheduler=dict(type="ParamSchedulerHook"), checkpoint=dict(type="CheckpointHook", interval=1),
            sampler_seed=dict(type="DistSamplerSeedHook"),
        ),
        randomness=dict(seed=0),
        env_cfg=dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
        log_level="WARNING",
    )  # fmt: skip


def with_ikd(config: dict, **changes) -> dict:
    """The config diff a user writes, on a teacher with random weights."""
    model = dict(
        type="IKDDistiller", student=config["model"], teacher_config=retinanet(12), allow_random_teacher=True,
        losses=[dict(type="FGDLoss", preset="retinanet")],
        adv=dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="single")),
        augment=dict(type="AdaptiveFreqAug"), stop_at=dict(epoch=16),
    ) | changes  # fmt: skip
    return config | dict(custom_imports=dict(imports=["ikd_fast.mmdet"]), model=model)


def run(config: dict, work_dir: Path, **changes):
    """Train with mmengine's Runner; returns it and the losses of every step."""
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    logs: list[dict] = []

    class Record(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            logs.append({k: float(v.detach() if hasattr(v, "detach") else v) for k, v in outputs.items()})

    runner = Runner.from_cfg(Config(config | dict(work_dir=str(work_dir)) | changes))
    runner.register_hook(Record())
    runner.train()
    return runner, logs


def sample_of(image_id: int, boxes: list, size: tuple[int, int]):
    """A data sample as PackDetInputs makes it, all boxes of class 0."""
    import torch

    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmengine.structures import InstanceData

    sample = DetDataSample(
        metainfo=dict(
            img_id=image_id,
            img_path=f"set/{image_id}.png",
            img_shape=size,
            ori_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor(boxes)), labels=torch.zeros(len(boxes), dtype=torch.long)
    )
    sample.ignored_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.long)
    )
    return sample
