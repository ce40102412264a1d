"""A training step end to end: plain FGD in its published form and ours, and FGD with IKD on top."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.fgd_published import published_form
from benchmarks.end_to_end.flops import CountFlops
from benchmarks.end_to_end.modes import MODES
from benchmarks.end_to_end.prediction import Nets, Pieces, count_pieces, predict
from ikd_fast import IKD, AdaptiveFreqAug, DistillContext, FGDLoss, FrozenTeacher, OnlineDIFGSM
from ikd_fast.attack import AttackBatch

from .budget import Budget, reason_of
from .measure import row
from .meter import Meter
from .mmdet_nets import STUDENT, TEACHER, MMDetRetinaNet, importable
from .nets import Detector, box_loss, class_loss, student_net, teacher_net

BOXES = 20
PLAIN, OURS, CARRY = "FGD, published form", "FGD", "FGD + IKD, carry"
HALF = f"{CARRY}, bfloat16 teacher"
# Beside the published form: what each side is in the cost model. The targets of "IKD step" are carry's first, so they are timed first.
SIDES = {
    OURS: OURS,
    CARRY: "carry",
    HALF: "carry",
    f"{CARRY}, feature objective": "carry, feature objective",
    "FGD + IKD, single": "single",
    "FGD + IKD, iterative": "iterative",
}
OF_PREDICTION = 1.1
"""``carry`` may take so many times the time that its multiply-adds say, beside plain FGD of the same precision."""


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


def task_loss(student: Detector, images: Tensor, targets: list[dict]) -> Tensor:
    return _task_and_maps(student, images, targets)[0]


def _task_and_maps(student: Detector, images: Tensor, targets: list[dict]) -> tuple[Tensor, list[Tensor]]:
    maps = student.features(images)
    return class_loss(student.logits(maps), targets).mean() + box_loss(student.boxes(maps)), maps


class DetectorVictim:
    """The teacher, whose class loss can be made from the maps that are distilled; its head runs as its engine says."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        self.teacher = teacher

    def cls_loss(self, images: Tensor, targets: list[dict]) -> Tensor:
        with self.teacher.entered(images) as (net, x):
            return class_loss([m.float() for m in net(x)], targets)

    def joint(self, batch: AttackBatch, forward: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Tensor]:
        maps = forward()
        with self.teacher.entered(batch.images) as (net, _):
            return maps, class_loss([m.float() for m in net.logits(maps)], batch.targets)


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

    def pieces(self) -> Pieces:
        """Counted on this batch."""
        loss = self._loss()
        nets = Nets(
            torch.stack(self.images),
            self.teacher.features,
            lambda x: class_loss(self.teacher(x), self.targets),
            lambda x: _task_and_maps(self.student, x, self.targets),
            self.student.features,
            lambda s, t: torch.stack(list(loss(s, t, self._context()).values())).sum(),
        )
        return count_pieces(nets)

    def _loss(self) -> FGDLoss:
        loss = FGDLoss(preset="retinanet", channels=self.scale.channels, num_levels=5)
        return loss.to(self.device)

    def _context(self) -> DistillContext:
        n = self.scale.images
        boxes = [t["boxes"] for t in self.targets]
        return DistillContext(boxes, None, [self.scale.size] * n, self.scale.size, list(range(n)))

    def _ikd(self, side: str) -> IKD:
        mode = MODES[SIDES[side]]
        attack = None if mode.attack is None else OnlineDIFGSM(**mode.attack, value_range=(0, 1))
        engine = dict(dtype="bfloat16", report=None) if side == HALF else None
        teacher = FrozenTeacher(self.teacher, call=_pyramid, engine=engine)
        ikd = IKD(
            self.student,
            teacher,
            features=self.student.pyramid,
            call=_pyramid,
            losses=[self._loss()],
            task_loss=task_loss,
            attack=attack,
            victim=DetectorVictim(teacher),
            augment=None if attack is None else AdaptiveFreqAug(value_range=(0, 1)),
            pad_divisor=32,
            calibrate=0,  # a matter of the first steps alone
        )
        return ikd.to(self.device)

    def published(self) -> Callable[[Any], Tensor]:
        """The student's step with FGD in loops, no library around it."""
        loss, context = self._loss(), self._context()

        def run(_: Any) -> Tensor:
            self.student.zero_grad(set_to_none=True)
            loss.zero_grad(set_to_none=True)
            images = torch.stack(self.images)
            task, maps = _task_and_maps(self.student, images, self.targets)
            with torch.no_grad():
                fixed = self.teacher.features(images)
            with torch.device(self.device):
                total = task + published_form(
                    loss, [m.float() for m in maps], [m.float() for m in fixed], context
                )
            total.backward()
            return total.detach()

        return run

    def ours(self, side: str) -> Callable[[Any], Tensor]:
        ikd = self._ikd(side)

        def run(epoch: Any) -> Tensor:
            ikd.zero_grad(set_to_none=True)
            out = ikd.step(self.images, self.targets, image_ids=list(range(self.scale.images)), epoch=epoch)
            out.total.backward()
            return out.total.detach()

        return run

    def sides(self) -> dict[str, Callable[[], Callable[[Any], Tensor]]]:
        return {PLAIN: self.published, **{side: functools.partial(self.ours, side) for side in SIDES}}


def _pyramid(net: Any, images: Tensor) -> list[Tensor]:
    return net.features(images)


def _autocast(run: Callable[[Any], Tensor], device: torch.device) -> Callable[[Any], Tensor]:
    def cast(x: Any) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return run(x)

    return cast


def measure_steps(
    meter: Meter, scale: StepScale, device: torch.device, budget: Budget
) -> list[dict[str, Any]]:
    """Rows of every step in float32 and in bf16 autocast; floating point operations, and what the formulas say, beside the times."""
    h, w = scale.size
    rows: list[dict[str, Any]] = []
    try:
        steps = Steps(scale, device)
        pieces = steps.pieces()
    except Exception as error:
        budget.skip("training step", reason_of(error))
        return []
    for precision, wrap in (("float32", None), ("bfloat16 autocast", _autocast)):
        group = f"training step, {scale.images} images {h}x{w}, {precision}, nets of {scale.nets}"
        medians: dict[str, float] = {}
        for side, make in steps.sides().items():
            if side == HALF and wrap is not None:
                continue  # autocast runs the teacher in bfloat16 as it is
            title = f"{group}: {side}"
            # Warm-up, which chooses convolution algorithms, and seven rounds.
            if not budget.allows(title, 12.0 if meter.cuda else 2.0):
                continue
            try:
                run = make()
                run = wrap(run, device) if wrap else run
                sets = [0, 1]
                value = run(0)  # the first visit of every image
                with CountFlops() as flops:
                    run(1)
                if not bool(value.isfinite()):
                    raise ArithmeticError(f"expected a finite loss, got {float(value)}")
                meter.warm(run, sets, 2)
                wall = meter.wall(run, sets)
                medians[side] = wall.median
                notes = {
                    "gflop": round(flops.total / 1e9, 1),
                    "flop_of_plain": round(flops.gmac / pieces.plain, 3),
                    **_beside_prediction(side, medians, pieces),
                    "syncs": meter.syncs(run, 0),
                    "peak_extra_bytes": meter.peak(run, 0),
                    "precision": precision,
                    "nets": scale.nets,
                }
            except Exception as error:
                budget.skip(title, reason_of(error))
                continue
            targets = {PLAIN: 1.0} if side == HALF and PLAIN in medians else None
            rows.append(row(group, side, "peer" if side == PLAIN else "ours", wall, notes, targets))
    return rows


def _beside_prediction(side: str, medians: dict[str, float], pieces: Pieces) -> dict[str, float]:
    """Time over that of plain FGD (ours) of the same precision, the same of the multiply-adds by formula, and their ratio."""
    if side in (PLAIN, OURS, HALF) or OURS not in medians:
        return {}
    time, work = medians[side] / medians[OURS], predict(MODES[SIDES[side]], pieces) / pieces.plain
    return {
        "time_of_fgd": round(time, 3),
        "predicted_of_fgd": round(work, 3),
        "of_prediction": round(time / work, 3),
    }
