"""The small pair in plain PyTorch: what runs in ``pytest benchmarks/`` and in the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ikd_fast import IKD, AdaptiveFreqAug, DistillContext, OnlineDIFGSM
from ikd_fast.attack import AttackBatch

from .modes import Mode
from .nets import Detector, class_loss
from .prediction import Nets
from .sides import StoredImages, kd_loss, watch
from .timeline import Timeline

RANGE = {"value_range": (0, 1)}


LEVELS = ["neck.0", "neck.1", "neck.2"]


def task_loss(student: Detector, images: Tensor, targets: list[dict]) -> Tensor:
    return class_loss(student(images), targets).mean()


class DetectorVictim:
    """The teacher, whose class loss can be made from the maps that are distilled."""

    def __init__(self, net: Detector) -> None:
        self.net = net

    def cls_loss(self, images: Tensor, targets: list[dict]) -> Tensor:
        return class_loss(self.net(images), targets)

    def joint(
        self, batch: AttackBatch, forward: Callable[[], list[Tensor]]
    ) -> tuple[Sequence[Tensor], Tensor]:
        maps = forward()
        return maps, class_loss(self.net.logits(maps), batch.targets)


class SmallPair:
    """Detectors of ``nets.py`` on random images; boxes too small to be cropped, so that every side sees the same frame."""

    name = "small"

    def __init__(
        self, images: int = 2, size: tuple[int, int] = (256, 320), width: int = 16, depth: int = 1
    ) -> None:
        self.images, self.size, self.width, self.depth = images, size, width, depth
        self.title = f"small detectors in plain PyTorch, {images} images {size[0]}x{size[1]}"
        g = torch.Generator().manual_seed(0)
        self.batch = [torch.rand(3, *size, generator=g) for _ in range(images)]
        self.stored = [
            (x + 8 / 255 * torch.randn(x.shape, generator=g).sign()).clamp(0, 1) for x in self.batch
        ]
        box = torch.tensor([[20.0, 30.0, 48.0, 56.0], [10.0, 10.0, 30.0, 34.0]])
        self.targets = [{"boxes": box, "labels": torch.tensor([i % 20, 1])} for i in range(images)]

    def student(self) -> Detector:
        torch.manual_seed(0)
        return Detector(self.width, self.depth)

    def teacher(self) -> Detector:
        torch.manual_seed(1)
        return Detector(self.width * 3 // 2, self.depth + 1).eval().requires_grad_(False)

    def side(self, mode: Mode, timeline: Timeline) -> SmallSide:
        return SmallSide(self, mode, timeline)

    def nets(self) -> Nets:
        student, teacher = self.student(), self.teacher()
        loss = kd_loss(Mode("FGD"), channels=64, num_levels=3)
        n = self.images
        boxes, labels = ([t[key] for t in self.targets] for key in ("boxes", "labels"))
        context = DistillContext(boxes, labels, [self.size] * n, self.size, list(range(n)))
        return Nets(
            torch.stack(self.batch),
            teacher.features,
            lambda x: class_loss(teacher(x), self.targets),
            lambda x: _task_and_maps(student, x, self.targets),
            student.features,
            lambda s, t: torch.stack(list(loss(s, t, context).values())).sum(),
        )


class SmallSide:
    """A student of the small pair in one mode."""

    def __init__(self, pair: SmallPair, mode: Mode, timeline: Timeline) -> None:
        self.pair, self.mode, self.timeline = pair, mode, timeline
        self.student = pair.student()
        self.attack: Any = None
        self.ikd: Any = None if mode.kd is None else self._ikd()
        trained = self.student if self.ikd is None else self.ikd
        self.optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=0.9)
        if self.ikd is not None:
            watch(self.ikd, timeline)

    def _ikd(self) -> IKD:
        mode, teacher = self.mode, self.pair.teacher()
        if mode.adversarial:
            self.attack = (
                StoredImages(**RANGE) if mode.offline else OnlineDIFGSM(**(mode.attack or {}), **RANGE)
            )
        return IKD(
            self.student,
            teacher,
            features=LEVELS,
            call=lambda net, images: net.features(images),
            losses=[kd_loss(mode)],
            task_loss=task_loss,
            attack=self.attack,
            victim=DetectorVictim(teacher),
            augment=AdaptiveFreqAug(**RANGE) if mode.adversarial else None,
            pad_divisor=32,
            calibrate=0,  # a matter of the first steps alone
        )

    def load(self, epoch: int) -> list[list[Tensor]]:
        """Clones, where a data set would decode."""
        sources = [self.pair.batch, self.pair.stored] if self.mode.offline else [self.pair.batch]
        with self.timeline.within("data"):
            return [[x.clone() for x in images] for images in sources]

    def step(self, batch: list[list[Tensor]], epoch: int) -> Mapping[str, Tensor]:
        images, targets, clock = batch[0], self.pair.targets, self.timeline
        self.optimizer.zero_grad(set_to_none=True)
        if self.ikd is None:
            with clock.within("augmentation"):
                stacked = torch.stack(images)
            with clock.within("student"):
                total = task_loss(self.student, stacked, targets)
                total.backward()
                self.optimizer.step()
            return {"task/task": total.detach()}
        if self.mode.offline:
            with clock.within("augmentation"):
                self.attack.given = torch.stack(batch[1])
        if self.mode.forget:
            self.attack.memory.close()
        with clock.within("augmentation"):  # but for what ``run`` does, which is charged to its own parts
            out = self.ikd.step(images, targets, image_ids=list(range(len(images))), epoch=epoch)
        with clock.within("student"):
            out.total.backward()
            self.optimizer.step()
        return out.terms


def _task_and_maps(student: Detector, images: Tensor, targets: list[dict]) -> tuple[Tensor, list[Tensor]]:
    maps = student.features(images)
    return class_loss(student.logits(maps), targets).mean(), maps
