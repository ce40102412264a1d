"""Paper-scale configs at reduced size: small images and random weights; layers, losses and optimizer stay the config's own."""

from __future__ import annotations

import copy
import functools
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ikd_fast.configs
import ikd_fast.mmdet
from ikd_fast.mmdet.build import model_config
from tests.mmdet.conftest import sample_of

from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper

HOME = Path(next(iter(ikd_fast.configs.__path__)))
IKD = sorted(path.stem for path in (HOME / "ikd").glob("*.py"))
SIZES = [(96, 128), (80, 112)]
# An object of at least 32^2 pixels and one below; small ones only.
BOXES = [[[8.0, 10.0, 70.0, 80.0], [90.0, 20.0, 110.0, 40.0]], [[10.0, 12.0, 30.0, 34.0], [60.0, 40.0, 84.0, 62.0]]]  # fmt: skip
TASK = {
    "retinanet": {"loss_cls", "loss_bbox"},
    "gfl": {"loss_cls", "loss_bbox", "loss_dfl"},
    "faster-rcnn": {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"},
    "reppoints": {"loss_cls", "loss_pts_init", "loss_pts_refine"},
    "mask-rcnn": {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"},
}


def load(name: str) -> Config:
    return copy.deepcopy(_read(name))


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(HOME / "ikd" / f"{name}.py")


def family(name: str) -> str:
    return name.split("_")[0]


def losses_of(name: str) -> list[str]:
    """The distillation losses that a distilled config's name lists: ``fgd-cwd`` has two, ``cwd-logits`` is one."""
    part = name.partition("_r50_")[2].split("_")[0]
    return part.removesuffix("-logits").split("-")


def distilled(config: Config) -> bool:
    return config.model.type == "IKDDistiller"


def expected_losses(name: str, config: Config) -> set[str]:
    """The losses a step must have: the detector's, the distillation losses of its name, the adversarial branch's."""
    keys = set(TASK[family(name)])
    if distilled(config):
        keys |= {f"loss_kd/{loss}" for loss in losses_of(name)}
        if "_ikd_" in name or "_adv_" in name:
            keys.add("loss_kd/adv")
    return keys


def reduce(config: Config) -> Config:
    """No downloads: random weights for the teacher and for the student's backbone; RoI heads of both sample 64 RoIs an image
    instead of 512. Everything else stays."""
    student = config.model
    if distilled(config):
        student = config.model.student
        teacher = model_config(config.model.teacher_config)
        fewer_rois(teacher)
        config.model.update(teacher_config=teacher, teacher_ckpt=None, allow_random_teacher=True)
    student.backbone.init_cfg = None
    fewer_rois(student)
    return config


def shallow(config: Config) -> Config:
    """The student's backbone in the teacher, where a test is about the losses, which read necks and heads."""
    config.model.teacher_config["backbone"] = copy.deepcopy(config.model.student.backbone)
    return config


def fewer_rois(detector: dict[str, Any]) -> None:
    stages = detector.get("train_cfg", {}).get("rcnn", [])
    for stage in stages if isinstance(stages, list) else [stages]:
        stage["sampler"]["num"] = 64


def build(config: Config) -> nn.Module:
    register_all_modules(init_default_scope=True)
    return MODELS.build(ConfigDict(config.model)).train()


def fill(net: nn.Module) -> None:
    """Weights that depend on their name and shape alone, so that two processes have the same ones.

    Standard deviation 1/sqrt(fan in), norm layers 1 and 0, biases 0; deformable offsets get a tenth of it.
    """
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if (
                name.endswith(("num_batches_tracked", "running_mean", "running_var"))
                or not value.is_floating_point()
            ):
                continue  # fmt: skip
            if value.dim() < 2:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            std = (0.1 if "offset" in name else 1.0) / math.sqrt(math.prod(value.shape[1:]))
            value.normal_(0, std, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def picture(i: int) -> Tensor:
    """Grey noise with bright boxes, uint8 ``[3, h, w]``."""
    rng = np.random.default_rng(i)
    image = rng.integers(60, 120, (3, *SIZES[i]), dtype=np.uint8)
    for x0, y0, x1, y1 in BOXES[i]:
        image[:, int(y0) : int(y1), int(x0) : int(x1)] = rng.integers(150, 250, (3, 1, 1))
    return torch.from_numpy(image)


def batch() -> dict[str, Any]:
    """What the loader gives: two images of different size, boxes and masks."""
    samples = []
    for i, (size, boxes) in enumerate(zip(SIZES, BOXES, strict=True)):
        sample = sample_of(i, boxes, size)
        masks = np.zeros((len(boxes), *size), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
        sample.gt_instances.masks = BitmapMasks(masks, *size)
        samples.append(sample)
    return dict(inputs=[picture(0), picture(1)], data_samples=samples)


def step(config: Config, net: nn.Module, seed: int = 0) -> dict[str, float]:
    """One training step with the config's own optimizer; what it logs."""
    for module in net.modules():
        if hasattr(module, "set_progress"):  # the hook's job in a run
            module.set_progress(0, 0)
    wrapper = build_optim_wrapper(net, config.optim_wrapper)
    torch.manual_seed(seed)
    logs = net.train_step(batch(), wrapper)
    return {key: float(value.detach()) for key, value in logs.items()}
