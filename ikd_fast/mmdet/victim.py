"""A detector teacher as the attack sees it: its classification loss on given images and boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ikd_fast.attack import AttackBatch
from ikd_fast.distill import FrozenTeacher

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmengine.logging import MessageHub
from mmengine.structures import PixelData

from .attack_scope import (
    DrawKey,
    alone,
    keyed_draws,
    overridden,
    random_samplers,
    without_child,
)
from .samples import from_targets


class MMDetVictim:
    """``(images, targets) -> class loss`` of an mmdet detector, summed over its terms.

    One-stage: a scalar, the sum over levels of ``loss_cls``; its one positive normaliser couples the images, which does not
    change a sign step. Two-stage: ``[N]``, image by image, the RoI class losses of all stages; the RPN's are left out as in
    the published code unless ``include_rpn``. Masks are not needed and the mask head does not run; a semantic head (HTC) runs
    for the features that boxes are classified by, without its own loss and so without a map of ground truth.

    Ignored boxes (crowds) of a target are ignored here as they were in the teacher's training. A head whose loss changes during
    training (TOOD: ``initial_epoch``) has its final one, whatever the student's epoch is.

    The loss is local and repeatable: collectives in it see one process, and samplers of boxes draw by (seed, epoch, image,
    step, sampler), from generators that are put back. The detector's heads read as training, which decides what some of
    them return (RepPoints), while everything below them, norms and dropout included, stays in eval.

    Args:
        teacher: the frozen detector, with the ``train_cfg`` of its config.
        include_rpn: attack the RPN's classification too.

    Shape:
        images ``[N, 3, H, W]`` float in the teacher's units; targets: one dict an image with ``boxes`` (xyxy pixels),
        ``labels`` and ``size`` (h, w before padding), and ``ignored`` boxes where there are any.

    Raises:
        ValueError: the detector has no classification loss.
    """

    def __init__(self, teacher: FrozenTeacher, *, include_rpn: bool = False) -> None:
        self.teacher = teacher
        self.include_rpn = include_rpn

    def __call__(self, images: Tensor, targets: Sequence[dict[str, Any]]) -> Tensor:
        """The loss with the draws of seed 0, epoch 0 and images numbered by their place in the batch."""
        return self._loss(images, targets, [DrawKey(image_id=i) for i in range(len(images))])

    def keyed_cls_loss(self, batch: AttackBatch) -> Tensor:
        """The loss in an attack's step, which says whose draws they are."""
        keys = [DrawKey(batch.seed, batch.epoch, image_id, batch.step) for image_id in batch.image_ids]
        return self._loss(batch.images, batch.targets, keys)

    def joint(self, batch: AttackBatch, forward: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Tensor]:
        """What ``forward()`` gives, and the class loss of the maps that the detector's ``extract_feat`` made in it."""
        detector: Any = self.teacher.running
        extract, made = detector.extract_feat, []

        def watched(images: Tensor) -> Any:
            made.append(extract(images))
            return made[-1]

        with self.teacher.eager(), overridden(detector, extract_feat=watched):
            maps = forward()
        if len(made) != 1:
            raise RuntimeError(
                f"expected one extract_feat of {type(detector).__name__} in the forward that is distilled, got {len(made)}; write "
                "mode='single', which makes a forward of its own"
            )
        keys = [DrawKey(batch.seed, batch.epoch, image_id, batch.step) for image_id in batch.image_ids]
        return maps, self._loss(batch.images, batch.targets, keys, made[0])

    @property
    def gradients_in_half(self) -> bool:
        """Whether the gradient passes through the teacher's float16."""
        return self.teacher.gradients_in_half

    def _loss(
        self,
        images: Tensor,
        targets: Sequence[dict[str, Any]],
        keys: Sequence[DrawKey],
        features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """``features``: what ``extract_feat`` gave for the batch; None: it is run."""
        samples = from_targets(targets, (images.shape[-2], images.shape[-1]))
        with self.teacher.entered(images) as (net, x):
            return self.teacher.outputs(self._class_loss(net, x, samples, keys, features))

    def _class_loss(
        self,
        detector: Any,
        images: Tensor,
        samples: list[Any],
        keys: Sequence[DrawKey],
        features: Sequence[Tensor] | None,
    ) -> Tensor:
        samplers = random_samplers(detector)
        with alone(), _class_loss_only(detector, self.include_rpn), _trained_to_the_end(detector):
            if _reads_semantic_maps(detector):
                for sample in samples:
                    # Stacked by the head and then given to its loss, which is left out.
                    sample.gt_sem_seg = PixelData(sem_seg=images.new_zeros(1, 1, 1))
            if not samplers:
                with keyed_draws([], keys[0], images.device), _given(detector, features):
                    return class_loss(detector.loss(images, samples), include_rpn=self.include_rpn)
            # One by one: which image a sampler is called for is then known, and no normaliser couples the terms of several.
            values = []
            for i, (image, sample, key) in enumerate(zip(images.split(1), samples, keys, strict=True)):
                own = None if features is None else [m[i : i + 1] for m in features]
                with keyed_draws(samplers, key, images.device), _given(detector, own):
                    values.append(class_loss(detector.loss(image, [sample]), include_rpn=self.include_rpn))
            return torch.stack(values)


@torch.no_grad()
def check_class_loss(victim: MMDetVictim) -> None:
    """Ask a teacher whose config has no ``train_cfg`` for its loss on an empty image with one box; few detectors have it then.

    Raises:
        ValueError: there is no such loss; the message says what to write.
    """
    net = victim.teacher.net
    images = next(net.parameters()).new_zeros(1, 3, 128, 128)
    box = dict(boxes=images.new_tensor([[32.0, 32.0, 96.0, 96.0]]), labels=images.new_zeros(1).long())
    try:
        victim(images, [box | dict(size=(128, 128))])
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the teacher's config has no train_cfg, and without it {type(net).__name__} has no class loss for objective 'cls' to attack "
            f"({type(error).__name__}: {error}). Write train_cfg=dict(assigner=..., ...) in the teacher's model, as in the config it was "
            "trained with, or attack=dict(type='OnlineDIFGSM', objective='feature'), which needs none"
        ) from error


def class_loss(losses: Mapping[str, Any], *, include_rpn: bool = False) -> Tensor:
    """Sum of the entries whose key names a classification loss."""
    total: Any = 0
    for key, value in losses.items():
        if "loss" not in key or "cls" not in key or ("rpn" in key and not include_rpn):
            continue
        total = total + (sum(v.sum() for v in value) if isinstance(value, (list, tuple)) else value.sum())
    if not isinstance(total, Tensor):
        raise ValueError(
            f"the teacher gives no classification loss to attack: its losses are {sorted(losses)}; use objective='feature'"
        )
    return total


@contextmanager
def _given(detector: Any, features: Sequence[Tensor] | None) -> Iterator[None]:
    """The detector's ``extract_feat`` answers with these."""
    if features is None:
        yield
        return
    answer = tuple(features)
    with overridden(detector, extract_feat=lambda _images: answer):
        yield


@contextmanager
def _class_loss_only(detector: Any, include_rpn: bool) -> Iterator[None]:
    """The detector's own ``loss``, with the heads' flags of training and without what no class loss needs."""
    roi_head: Any = getattr(detector, "roi_head", None)
    rpn_head = getattr(detector, "rpn_head", None)
    with ExitStack() as stack:
        for head in _heads(detector):
            # The flag of this module alone: train() would switch its norms and dropout.
            stack.enter_context(overridden(head, training=True))
        if roi_head is not None:
            stack.enter_context(without_child(roi_head, "mask_head"))
            if getattr(roi_head, "interleaved", False):
                # HTC refines boxes between its stages where it trains masks on them, which it then does not.
                stack.enter_context(overridden(roi_head, interleaved=False))
            if hasattr(roi_head, "mask_loss"):
                stack.enter_context(
                    overridden(roi_head, mask_loss=_no_mask_loss)
                )  # SCNet's runs without asking
        if _reads_semantic_maps(detector):
            stack.enter_context(overridden(roi_head.semantic_head, loss=_zero))
        plain = getattr(type(rpn_head), "loss_and_predict", None) is BaseDenseHead.loss_and_predict
        if plain and not include_rpn:
            stack.enter_context(overridden(rpn_head, loss_and_predict=_proposals_only(rpn_head)))
        yield


@contextmanager
def _trained_to_the_end(detector: Any) -> Iterator[None]:
    """Heads that follow the epoch read the first one of their final loss, not that of the student's run."""
    heads: list[Any] = [head for head in _heads(detector) if hasattr(head, "initial_epoch")]
    if not heads:
        yield
        return
    final = max(int(head.initial_epoch) for head in heads)
    # mmdet's TOOD asks mmengine's hub, and keeps the answer.
    info, missing = MessageHub.get_current_instance().runtime_info, object()
    before = info.get("epoch", missing)
    with ExitStack() as stack:
        for head in heads:
            stack.enter_context(overridden(head, epoch=final))
        info["epoch"] = final
        try:
            yield
        finally:
            if before is missing:
                del info["epoch"]
            else:
                info["epoch"] = before


def _reads_semantic_maps(detector: Any) -> bool:
    return isinstance(getattr(getattr(detector, "roi_head", None), "semantic_head", None), nn.Module)


def _zero(*_: Any, **__: Any) -> float:
    return 0.0


def _no_mask_loss(*_: Any, **__: Any) -> dict[str, Any]:
    return dict(loss_mask=dict(loss_mask=0.0))


def _heads(detector: nn.Module) -> list[nn.Module]:
    """Dense heads, the RoI head and its box heads (one a stage)."""
    found = [getattr(detector, name, None) for name in ("bbox_head", "rpn_head", "roi_head")]
    found.append(getattr(found[-1], "bbox_head", None))
    return [
        one
        for head in found
        if isinstance(head, nn.Module)
        for one in (head if isinstance(head, nn.ModuleList) else [head])
    ]


def _proposals_only(rpn_head: Any) -> Any:
    """``loss_and_predict`` of a plain RPN head without its assigning, sampling and loss."""

    def predict(x: Any, samples: Sequence[Any], proposal_cfg: Any = None) -> tuple[dict, Any]:
        metas = [sample.metainfo for sample in samples]
        return {}, rpn_head.predict_by_feat(*rpn_head(x), batch_img_metas=metas, cfg=proposal_cfg)

    return predict
