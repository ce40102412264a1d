"""How much an attack changes a teacher: class loss and features, beside a random-sign control of the same eps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ikd_fast.attack import AttackOutput, OnlineDIFGSM, Victim
from ikd_fast.pixels import PixelUnits


@dataclass
class StrengthRow:
    """One attack over a set of images.

    Attributes:
        name: ``"clean"`` or the attack's.
        class_loss: the victim's classification loss, mean over batches.
        feature_change: ||F(x + delta) - F(x)|| / ||F(x)||, mean over levels and batches.
        linf, mean_abs: of delta, in grey levels.
        gradient_evals: gradients of the victim per image.
        seconds: crafting time per image.
        metrics: what the caller measured on the images, e.g. AP50.
    """

    name: str
    class_loss: float
    feature_change: float
    linf: float
    mean_abs: float
    gradient_evals: int
    seconds: float
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def attack_strength(
    victim: Victim,
    batches: Callable[[], Iterable[tuple[Tensor, Any, list[int]]]],
    attacks: Mapping[str, OnlineDIFGSM],
    *,
    units: PixelUnits,
    evaluate: Callable[[Iterable[Tensor]], dict[str, float]] | None = None,
) -> list[StrengthRow]:
    """One row for the clean images and one for each attack.

    Args:
        victim: gives ``features(images)`` and ``cls_loss(images, targets)``.
        batches: called once per row; yields (images ``[N, C, H, W]``, targets with ``size``, image ids).
        attacks: by name. For every eps without an ``OnlineDIFGSM("random_sign")`` one is added: gains mean little without.
        units: what the images are.
        evaluate: takes the perturbed batches of one row, in order, and returns metrics such as ``{"AP50": ...}``.
    """
    controlled = {a.eps for a in attacks.values() if a.mode == "random_sign"}
    missing = sorted({a.eps for a in attacks.values()} - controlled)
    controls = {f"random sign, eps {eps:g}": OnlineDIFGSM("random_sign", eps=eps) for eps in missing}
    rows = []
    for name, attack in [("clean", None), *controls.items(), *attacks.items()]:
        sums = _Sums()
        metrics = {} if evaluate is None else evaluate(_perturbed(victim, batches(), attack, units, sums))
        if evaluate is None:
            for _ in _perturbed(victim, batches(), attack, units, sums):
                pass
        rows.append(sums.row(name, 0 if attack is None else attack.steps, metrics))
    return rows


class _Sums:
    """Running means over batches."""

    def __init__(self) -> None:
        self.batches = self.images = 0
        self.loss = self.change = self.linf = self.mean_abs = self.seconds = 0.0

    def add(self, loss: float, change: float, delta: Tensor, images: int, seconds: float) -> None:
        self.batches, self.images = self.batches + 1, self.images + images
        self.loss, self.change, self.seconds = self.loss + loss, self.change + change, self.seconds + seconds
        self.linf = max(self.linf, float(delta.abs().max()))
        self.mean_abs += float(delta.abs().mean())

    def row(self, name: str, evals: int, metrics: dict[str, float]) -> StrengthRow:
        if not self.batches:
            raise ValueError("attack_strength got no images: batches() yielded nothing")
        n = self.batches
        return StrengthRow(
            name,
            self.loss / n,
            self.change / n,
            self.linf,
            self.mean_abs / n,
            evals,
            self.seconds / self.images,
            metrics,
        )


def _perturbed(
    victim: Victim, batches: Iterable, attack: OnlineDIFGSM | None, units: PixelUnits, sums: _Sums
) -> Iterable[Tensor]:
    for images, targets, ids in batches:
        _wait(images)
        start = time.perf_counter()
        if attack is None:
            out = AttackOutput(images, torch.zeros_like(images))
        else:
            out = attack(victim, images, targets, image_ids=ids, epoch=0, units=units)
        _wait(images)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            loss = victim.cls_loss(out.images, targets)
            clean, moved = victim.features(images), victim.features(out.images)
            change = torch.stack(
                [(m - c).norm() / c.norm().clamp_min(1e-12) for m, c in zip(moved, clean, strict=True)]
            ).mean()
        sums.add(
            float(loss.mean()), float(change), out.delta / units.grey_level(images), len(images), seconds
        )
        yield out.images


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def strength_table(rows: Iterable[StrengthRow]) -> str:
    """Markdown, one row an attack."""
    rows = list(rows)
    names = list(rows[0].metrics) if rows else []
    lines = [
        "| images | class loss | "
        + "".join(f"{n} | " for n in names)
        + "feature change | L-inf | mean abs | gradients | s/image |",
        "|---|" + "---|" * (6 + len(names)),
    ]
    for r in rows:
        values = "".join(f"{r.metrics[n]:.3f} | " for n in names)
        lines.append(
            f"| {r.name} | {r.class_loss:.3f} | {values}{r.feature_change:.3f} | {r.linf:.2f} | {r.mean_abs:.2f} | "
            f"{r.gradient_evals} | {r.seconds:.3f} |"
        )
    return "\n".join(lines)
