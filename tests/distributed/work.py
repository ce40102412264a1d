"""What the processes run: models on drawn images, and whole trainings. Also called in the test's own process, as the truth."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.mmdet.conftest import draw, retinanet, sample_of, with_ikd

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner


def frozen_norms(detector: dict) -> dict:
    """Batch statistics are of one rank's images; the published settings keep them fixed."""
    detector = copy.deepcopy(detector)
    detector["backbone"]["norm_eval"] = True
    return detector


def fcos(channels: int = 8) -> dict:
    """Its losses are divided by the positives of all ranks."""
    detector = frozen_norms(retinanet(channels))
    detector.update(
        type="FCOS",
        bbox_head=dict(
            type="FCOSHead", num_classes=1, in_channels=16, stacked_convs=1, feat_channels=16, strides=[8, 16, 32, 64],
            regress_ranges=((-1, 16), (16, 32), (32, 64), (64, 1e8)), norm_cfg=dict(type="GN", num_groups=4),
        ),
        train_cfg=None,
    )  # fmt: skip
    return detector


def wide_neck(detector: dict, channels: int = 24) -> dict:
    """Another width than the student's 16, so that losses need align layers."""
    detector = copy.deepcopy(detector)
    detector["neck"]["out_channels"] = channels
    for name in ("in_channels", "feat_channels"):
        detector["bbox_head"][name] = channels
    return detector


def distiller(student: dict, **changes: Any) -> dict:
    return with_ikd(dict(model=student), augment=None, stop_at=None, **changes)["model"]


def batch_of(
    ids: list[int], *, same_boxes: bool = False, empty: bool = False, adversarial: bool = False
) -> dict:
    """Drawn images as a loader gives them. ``same_boxes``: those of image 0 on all, so every image has as many positives.
    ``adversarial``: with an image behind each that differs by 8 levels, as LoadAdversarialImage brings it."""
    samples = [sample_of(i, draw(0 if same_boxes else i)[1], (96, 96)) for i in ids]
    if empty:
        for sample in samples:
            sample.gt_instances = sample.gt_instances[:0]
    images = [torch.from_numpy(draw(i)[0].transpose(2, 0, 1).copy()) for i in ids]
    if adversarial:
        images = [torch.cat([image, disturbed(image, i)]) for image, i in zip(images, ids, strict=True)]
    return dict(inputs=images, data_samples=samples)


def disturbed(image: torch.Tensor, seed: int, eps: int = 8) -> torch.Tensor:
    """``image`` with eps or -eps at every value, by ``seed`` alone."""
    signs = torch.randint(0, 2, image.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (image.int() + eps * signs).clamp(0, 255).to(image.dtype)


def mine(ids: list[int]) -> list[int]:
    """This rank's share of a global batch, as the samplers deal it out."""
    rank, world = get_dist_info()
    return ids[rank::world]


def build(config: dict) -> Any:
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(config)).train()
    model.set_progress(0, 0)
    return MMDistributedDataParallel(model) if dist.is_initialized() else model


def plain(model: Any) -> Any:
    return getattr(model, "module", model)


def losses_of(model: Any, batch: dict) -> dict[str, Any]:
    data = plain(model).data_preprocessor(copy.deepcopy(batch), True)
    return model(**data, mode="loss")


def backward(model: Any, batch: dict) -> dict[str, float]:
    total, logs = plain(model).parse_losses(losses_of(model, batch))
    total.backward()
    return {key: float(torch.as_tensor(value).detach()) for key, value in logs.items()}


def gradients(config: dict, ids: list[int], **kwargs: Any) -> dict[str, np.ndarray]:
    """Of one step on the global batch ``ids``, by all processes there are."""
    model = build(config)
    backward(model, batch_of(mine(ids), **kwargs))
    return {name: p.grad.numpy().copy() for name, p in plain(model).named_parameters() if p.requires_grad}


def weights(model: Any) -> str:
    """One number for every bit of every parameter."""
    digest = hashlib.sha256()
    for name, value in plain(model).named_parameters():
        digest.update(name.encode() + value.detach().numpy().tobytes())
    return digest.hexdigest()


def steps(config: dict, batches: list[dict], *, lr: float = 1e-3, stop_after: int | None = None) -> dict:
    """Train on ``batches[rank]`` of each step; after ``stop_after`` steps the adversarial branch is over."""
    rank, _ = get_dist_info()
    model = build(config)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    logs = []
    for k, batch in enumerate(batches):
        plain(model).set_progress(0 if stop_after is None or k < stop_after else 1, k)
        optimizer.zero_grad()
        logs.append(backward(model, batch_of(**batch[rank])))
        optimizer.step()
    return dict(logs=logs, weights=weights(model))


def train(config: dict, work: str, hooks: tuple = (), **changes: Any) -> dict:
    """mmengine's Runner on a config; this rank's losses and images, and its weights at the end."""
    import mmengine.config.config as layout

    layout.FormatCode = lambda text, **_: (text, True)  # half a second for every config it prints
    rows: list[dict] = []

    class Record(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            ids = [s.img_id for s in data_batch["data_samples"]]
            sums = [float(x.sum()) for x in data_batch["inputs"]]
            losses = {k: float(torch.as_tensor(v).detach()) for k, v in outputs.items()}
            rows.append(dict(ids=ids, sums=sums, losses=losses))

    launcher = dict(launcher="pytorch") if dist.is_initialized() else {}
    runner = Runner.from_cfg(Config(copy.deepcopy(config) | dict(work_dir=work) | launcher | changes))
    runner.register_hook(Record())
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return dict(rows=rows, weights=weights(runner.model), wrapped=type(runner.model).__name__)
