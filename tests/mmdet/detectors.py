"""mmdet's own configs of the paper's families, narrow and shallow enough for a step in a fraction of a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ikd_fast.mmdet import IKDDistiller
from ikd_fast.mmdet.build import model_config
from tests.mmdet.conftest import draw

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData

CONFIGS = dict(
    retinanet="mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    reppoints="mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py",
    fcos="mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    gfl="mmdet::gfl/gfl_r50_fpn_1x_coco.py",
    atss="mmdet::atss/atss_r50_fpn_1x_coco.py",
    faster_rcnn="mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    mask_rcnn="mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    cascade_dcn="mmdet::dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
)
SIDE = 96
_SIZES = dict(
    stacked_convs=1, num_convs=1, fc_out_channels=16, roi_feat_size=3, output_size=3, frozen_stages=-1,
    norm_eval=False, nms_pre=50, max_per_img=30, mask_size=6, base_channels=8, num_groups=4,
)  # fmt: skip
_CHANNELS = {"in_channels", "out_channels", "feat_channels", "point_feat_channels", "conv_out_channels"}


def small(name: str, *, channels: int = 16, classes: int = 2, **changes: Any) -> dict[str, Any]:
    """The model of a stock config: ResNet-18 (50 where it has deformable convolutions) of 8 base channels."""
    model = _shrink(model_config(CONFIGS[name]), channels, classes)
    backbone = model["backbone"]
    backbone["depth"] = 50 if "dcn" in backbone else 18
    backbone.pop("init_cfg", None)
    backbone["base_channels"] = 8
    expansion = 4 if "dcn" in backbone else 1
    model["neck"]["in_channels"] = [8 * expansion * k for k in (1, 2, 4, 8)]
    if name in ("fcos", "gfl", "atss"):
        model["bbox_head"]["norm_cfg"] = dict(type="GN", num_groups=4)  # their default is 32 groups
    if name == "fcos":
        backbone["norm_cfg"] = dict(type="BN", requires_grad=True)
    for sampler in _samplers(model.get("train_cfg") or {}):
        sampler["num"] = 16  # fewer than there are boxes to choose from
    return model | changes


def _shrink(value: Any, channels: int, classes: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_shrink(v, channels, classes) for v in value)
    if not isinstance(value, dict):
        return value
    out = {}
    for key, v in value.items():
        if key in _SIZES:
            v = _SIZES[key]
        elif key in _CHANNELS and isinstance(v, int):
            v = channels
        elif key == "num_classes":
            v = classes
        out[key] = _shrink(v, channels, classes)
    return out


def _samplers(value: Any) -> list[dict]:
    if isinstance(value, (list, tuple)):
        return [s for v in value for s in _samplers(v)]
    if not isinstance(value, dict):
        return []
    own = [value["sampler"]] if "sampler" in value else []
    return own + [s for v in value.values() for s in _samplers(v)]


def data_batch(ids: list[int], *, masks: str | None = None) -> dict[str, Any]:
    """Drawn pictures of :func:`tests.mmdet.conftest.draw` as a loader gives them; the boxes themselves are the masks."""
    inputs, samples = [], []
    for i in ids:
        image, boxes = draw(i)
        inputs.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
        sample = DetDataSample(
            metainfo=dict(
                img_id=i, img_path=f"set/{i}.png", img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), scale_factor=(1.0, 1.0)
            )
        )  # fmt: skip
        labels = torch.arange(len(boxes)) % 2
        sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(torch.tensor(boxes)), labels=labels)
        if masks is not None:
            sample.gt_instances.masks = box_masks(boxes, masks)
        sample.ignored_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def box_masks(boxes: list[list[float]], kind: str) -> BitmapMasks | PolygonMasks:
    if kind == "polygon":
        rings = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes]
        return PolygonMasks(rings, SIDE, SIDE)
    bitmaps = np.zeros((len(boxes), SIDE, SIDE), np.uint8)
    for bitmap, (x0, y0, x1, y1) in zip(bitmaps, boxes, strict=True):
        bitmap[int(y0) : int(y1), int(x0) : int(x1)] = 1
    return BitmapMasks(bitmaps, SIDE, SIDE)


def distiller(student: dict, teacher: dict, levels: list[int] | None = None, **changes: Any) -> IKDDistiller:
    """FGD, one-gradient attack and augmentation on two models with random weights, at epoch 0."""
    torch.manual_seed(0)
    config = dict(
        type="IKDDistiller", student=student, teacher_config=teacher, allow_random_teacher=True,
        losses=[dict(type="FGDLoss", preset="retinanet", levels=levels)],
        adv=dict(
            beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="single"), loss=dict(type="AdvFeatureLoss", levels=levels)
        ),
        augment=dict(type="AdaptiveFreqAug", noise_prob=1.0, area_threshold=40**2),
    ) | changes  # fmt: skip
    model = MODELS.build(config)
    model.set_progress(0, 0)
    return model.train()


def batch(model: IKDDistiller, ids: list[int], masks: str | None = None) -> dict[str, Any]:
    """Pictures as the model's ``forward`` takes them."""
    return model.data_preprocessor(data_batch(ids, masks=masks), True)
