"""A row of a strength table, and the rows of attacks on any victim."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ikd_fast.attack import AttackOutput, OnlineDIFGSM, Victim
from ikd_fast.attack.objectives import features_of
from ikd_fast.pixels import PixelUnits

from .measures import Tally, pixel_change, pyramid_change


@dataclass
class StrengthRow:
    """One attack over a set of images.

    Attributes:
        name: ``"clean"`` or the attack's.
        class_loss: the victim's classification loss, mean over images.
        feature_change: ||F(x + delta) - F(x)|| / ||F(x)||, mean over levels and images.
        linf, mean_abs: of what the net reads minus the clean image, in grey levels; largest and mean over images.
        gradient_evals: gradients of the victim per image.
        seconds: crafting time per image.
        metrics: what was measured on the images, e.g. AP50.
        levels: per level of the pyramid ``l2`` (as ``feature_change``) and ``cosine``, 1 - cos(F(x), F(x + delta)).
        outside: share of the values further than eps from the clean image.
    """

    name: str
    class_loss: float
    feature_change: float
    linf: float
    mean_abs: float
    gradient_evals: float
    seconds: float
    metrics: dict[str, float]
    levels: list[dict[str, float]] = field(default_factory=list)
    outside: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, name: str, tally: Tally, metrics: Mapping[str, float]) -> StrengthRow:
        """The means of a tally."""
        if not tally.images or tally.levels is None:
            raise ValueError("attack_strength got no images: batches() yielded nothing")
        n, levels = tally.images, tally.levels / tally.images
        evals = tally.evals / n
        return cls(
            name=name,
            class_loss=tally.loss / n,
            feature_change=float(levels[:, 0].mean()),
            linf=tally.linf,
            mean_abs=tally.mean_abs / n,
            gradient_evals=int(evals) if evals == int(evals) else evals,
            seconds=tally.seconds / n,
            metrics=dict(metrics),
            levels=[{"l2": float(l2), "cosine": float(cosine)} for l2, cosine in levels],
            outside=tally.outside / n,
        )


def attack_strength(
    victim: Victim,
    batches: Callable[[], Iterable[tuple[Tensor, Any, list[int]]]],
    attacks: Mapping[str, OnlineDIFGSM],
    *,
    units: PixelUnits,
    evaluate: Callable[[Iterable[Tensor]], dict[str, float]] | None = None,
) -> list[StrengthRow]:
    """One row for the clean images and one for each attack, on any victim.

    Args:
        victim: gives ``features(images)`` and ``cls_loss(images, targets)``.
        batches: called once per row; yields (images ``[N, C, H, W]``, targets with ``size``, image ids).
        attacks: by name. For every eps without an ``OnlineDIFGSM("random_sign")`` one is added: gains mean little without.
        units: what the images are.
        evaluate: takes the perturbed batches of one row, in order, and returns metrics such as ``{"AP50": ...}``.

    Raises:
        ValueError: no images.

    >>> class Net:
    ...     def features(self, x): return [x]
    ...     def cls_loss(self, x, targets): return x.mean((1, 2, 3))
    >>> rows = attack_strength(
    ...     Net(), lambda: [(torch.full((1, 3, 4, 4), 100.0), None, [0])],
    ...     {"up": OnlineDIFGSM("iterative", diversity_prob=0)}, units=PixelUnits(value_range=(0, 255)))
    >>> [(row.name, row.gradient_evals) for row in rows], rows[-1].class_loss
    ([('clean', 0), ('random sign, eps 8', 0), ('up', 5)], 108.0)
    """
    controlled = {a.eps for a in attacks.values() if a.mode == "random_sign"}
    missing = sorted({a.eps for a in attacks.values()} - controlled)
    controls = {f"random sign, eps {eps:g}": OnlineDIFGSM("random_sign", eps=eps) for eps in missing}
    rows = []
    for name, attack in [("clean", None), *controls.items(), *attacks.items()]:
        tally = Tally()
        perturbed = _perturbed(victim, batches(), attack, units, tally)
        metrics = {} if evaluate is None else evaluate(perturbed)
        for _ in perturbed:  # what evaluate left, or all of it
            pass
        rows.append(StrengthRow.of(name, tally, metrics))
    return rows


def _perturbed(
    victim: Victim, batches: Iterable, attack: OnlineDIFGSM | None, units: PixelUnits, tally: Tally
) -> Iterator[Tensor]:
    for images, targets, ids in batches:
        wait(images)
        start = time.perf_counter()
        if attack is None:
            out = AttackOutput(images, torch.zeros_like(images))
        else:
            out = attack(victim, images, targets, image_ids=ids, epoch=0, units=units)
        wait(images)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            loss = victim.cls_loss(out.images, targets)
            change = pyramid_change(features_of(victim, images), features_of(victim, out.images))
        eps = float("inf") if attack is None else attack.eps
        pixels = pixel_change(images, out.images, _sizes(images, targets), units, eps)
        tally.add(loss, change, pixels, seconds=seconds, evals=out.gradient_evals)
        yield out.images


def _sizes(images: Tensor, targets: Any) -> list[tuple[int, int]]:
    """Each target's ``size``, else all of the image: as an attack takes them."""
    whole = (images.shape[-2], images.shape[-1])
    rows = targets if isinstance(targets, (list, tuple)) else [None] * len(images)
    return [tuple(row["size"]) if isinstance(row, dict) and "size" in row else whole for row in rows]


def wait(images: Tensor) -> None:
    """Let the device finish, so that a clock read now is fair."""
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
