"""A training step end to end: plain FGD in its published form and ours, and FGD with IKD on top."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.baselines.fgd_published import published_form
from ikd_fast import IKD, AdaptiveFreqAug, DistillContext, FGDLoss, OnlineDIFGSM

from .budget import Budget, reason_of
from .measure import row
from .meter import Meter
from .mmdet_nets import STUDENT, TEACHER, MMDetRetinaNet, importable
from .nets import Detector, box_loss, class_loss, student_net, teacher_net

BOXES = 20
PLAIN = "FGD, published form"


@dataclass(frozen=True)
class StepScale:
    """Input and nets; the default is the papers' setting."""

    images: int = 2
    size: tuple[int, int] = (800, 1344)
    student: Callable[[], Any] = student_net
    teacher: Callable[[], Any] = teacher_net
    channels: int = 256
    nets: str = "plain PyTorch"


def full_scale() -> StepScale:
    """mmdet's nets where it can be imported, else the same ones in plain PyTorch."""
    if not importable():
        return StepScale()
    student, teacher = (functools.partial(MMDetRetinaNet, config) for config in (STUDENT, TEACHER))
    return StepScale(student=student, teacher=teacher, nets="mmdet")


DRY_STEP = StepScale(
    2,
    (64, 96),
    functools.partial(student_net, 8, (1, 1, 1, 1), 16),
    functools.partial(teacher_net, 8, (1, 1, 1, 1), 4, 16),
    16,
)


class CountFlops(TorchDispatchMode):
    """Floating point operations of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def task_loss(student: Detector, images: Tensor, targets: list[dict]) -> tuple[Tensor, list[Tensor]]:
    maps = student.features(images)
    return class_loss(student.logits(maps), targets).mean() + box_loss(student.boxes(maps)), maps


@dataclass
class Steps:
    """The nets, a batch, and the steps that are compared."""

    scale: StepScale
    device: torch.device

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.student = self.scale.student().to(self.device)
        self.teacher = self.scale.teacher().to(self.device).eval().requires_grad_(False)
        h, w = self.scale.size
        g = torch.Generator().manual_seed(0)
        n = self.scale.images
        self.images = [torch.rand(3, h, w, generator=g).to(self.device) for _ in range(n)]
        corner = torch.rand(n, BOXES, 2, generator=g) * torch.tensor([w, h]) * 0.8
        side = 4 + torch.rand(n, BOXES, 2, generator=g) * torch.tensor([w, h]) * 0.15
        boxes = torch.cat([corner, corner + side], 2).to(self.device)
        labels = torch.randint(0, 80, (n, BOXES), generator=g).to(self.device)
        self.targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]

    def _ikd(self, mode: str | None) -> IKD:
        attack = None if mode is None else OnlineDIFGSM(mode, value_range=(0, 1))
        ikd = IKD(
            self.student,
            self.teacher,
            features=lambda net, images: net.features(images),
            losses=[FGDLoss(preset="retinanet", channels=self.scale.channels, num_levels=5)],
            task_loss=task_loss,
            attack=attack,
            victim=lambda images, targets: class_loss(self.teacher(images), targets),
            augment=None if mode is None else AdaptiveFreqAug(value_range=(0, 1)),
            pad_divisor=32,
        )
        return ikd.to(self.device)

    def published(self) -> Callable[[Any], Tensor]:
        """The student's step with FGD in loops, no library around it."""
        loss = FGDLoss(preset="retinanet", channels=self.scale.channels, num_levels=5).to(self.device)
        n = self.scale.images
        context = DistillContext(
            [t["boxes"] for t in self.targets], None, [self.scale.size] * n, self.scale.size, list(range(n))
        )

        def run(_: Any) -> Tensor:
            self.student.zero_grad(set_to_none=True)
            loss.zero_grad(set_to_none=True)
            images = torch.stack(self.images)
            task, maps = task_loss(self.student, images, self.targets)
            with torch.no_grad():
                fixed = self.teacher.features(images)
            with torch.device(self.device):
                total = task + published_form(
                    loss, [m.float() for m in maps], [m.float() for m in fixed], context
                )
            total.backward()
            return total.detach()

        return run

    def ours(self, mode: str | None) -> Callable[[Any], Tensor]:
        ikd = self._ikd(mode)

        def run(epoch: Any) -> Tensor:
            ikd.zero_grad(set_to_none=True)
            out = ikd.step(self.images, self.targets, image_ids=list(range(self.scale.images)), epoch=epoch)
            out.total.backward()
            return out.total.detach()

        return run

    def sides(self) -> dict[str, Callable[[], Callable[[Any], Tensor]]]:
        return {
            PLAIN: self.published,
            "FGD": lambda: self.ours(None),
            "FGD + IKD, single": lambda: self.ours("single"),
            "FGD + IKD, iterative": lambda: self.ours("iterative"),
        }


def _autocast(run: Callable[[Any], Tensor], device: torch.device) -> Callable[[Any], Tensor]:
    def cast(x: Any) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return run(x)

    return cast


def measure_steps(
    meter: Meter, scale: StepScale, device: torch.device, budget: Budget
) -> list[dict[str, Any]]:
    """Rows of every step in float32 and in bf16 autocast; floating point operations beside the times."""
    h, w = scale.size
    rows = []
    try:
        steps = Steps(scale, device)
    except Exception as error:
        budget.skip("training step", reason_of(error))
        return []
    flops: dict[str, int] = {}
    for precision, wrap in (("float32", None), ("bfloat16 autocast", _autocast)):
        group = f"training step, {scale.images} images {h}x{w}, {precision}, nets of {scale.nets}"
        for side, make in steps.sides().items():
            title = f"{group}: {side}"
            # Warm-up, which chooses convolution algorithms, and seven rounds.
            if not budget.allows(title, 12.0 if meter.cuda else 2.0):
                continue
            try:
                run = make()
                run = wrap(run, device) if wrap else run
                sets = [0, 1]
                with CountFlops() if side not in flops else nullcontext() as count:
                    value = run(0)
                if isinstance(count, CountFlops):
                    flops[side] = count.total
                if not bool(value.isfinite()):
                    raise ArithmeticError(f"expected a finite loss, got {float(value)}")
                meter.warm(run, sets, 2)
                wall = meter.wall(run, sets)
                notes = {
                    "gflop": round(flops[side] / 1e9, 1),
                    "flop_of_plain": round(flops[side] / flops[PLAIN], 3) if PLAIN in flops else None,
                    "syncs": meter.syncs(run, 0),
                    "peak_extra_bytes": meter.peak(run, 0),
                    "precision": precision,
                    "nets": scale.nets,
                }
            except Exception as error:
                budget.skip(title, reason_of(error))
                continue
            rows.append(row(group, side, "peer" if side == PLAIN else "ours", wall, notes))
    return rows
