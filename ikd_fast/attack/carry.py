"""Mode ``carry``: perturbations kept from visit to visit, moved by the gradient of the forward that distils from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ikd_fast.kernels import CellMap, DeltaCodes, apply_delta, fgsm_step_packed
from ikd_fast.pixels import PixelUnits

from .batch import AttackBatch, AttackOutput
from .gradient import attack_gradient
from .memory import PerturbationMemory, Record
from .momentum import accelerate
from .objectives import maps_of, shares_forward, value_and_maps
from .rows import interleave, select, take
from .visit import Visit

if TYPE_CHECKING:
    from .difgsm import OnlineDIFGSM

START_STEP = 2.0
"""The first step, from a random start, in eps: as in mode ``single``, it ends in the corner eps sign(g)."""


def carry(
    attack: OnlineDIFGSM,
    memory: PerturbationMemory,
    codes: DeltaCodes,
    victim: Any,
    visit: Visit,
    units: PixelUnits,
    *,
    with_maps: bool,
) -> AttackOutput:
    """One visit of every image; the memory is updated.

    x: images, V: view (canonical image to network image), d: what is kept of an image, canonical and packed.

    1. An image of which nothing is kept starts from d = quantised U[-eps, eps), keyed by (seed, id, epoch), and takes one gradient
       g of the objective at x + V d: d <- clip(d + 2 eps sign(V^T g)).
    2. x_adv = clip(x + V d), for all images.
    3. Every other image, up to ``refresh`` visits, takes one gradient g at x_adv, from the forward that gives the maps for the
       distillation: d <- clip(d + alpha sign(V^T g)) is what its next visit applies.

    With ``fresh`` an image takes its gradient before step 2 instead, from a forward of its own: 3 is left out, and what is applied
    fits this very view.

    The victim never changes, so this is projected gradient ascent over the views of successive visits. A gradient that is not
    finite leaves d as it is; an image whose first gradient is zero or not finite is not perturbed in that visit.
    """
    images = visit.images.detach()
    n, device = len(images), images.device
    maps = [view.cells(memory.stride, frame=(images.shape[-2], images.shape[-1])) for view in visit.views]
    found = memory.fetch(visit.ids, visit.views, device)
    cold = [i for i, record in enumerate(found) if record is None]
    limit = float("inf") if attack.refresh is None else attack.refresh
    due = [i for i, record in enumerate(found) if record is not None and record.visits < limit]
    shared = with_maps and shares_forward(attack.objective, victim)
    start = partial(_start, codes, visit, maps, device, images.shape[1], bool(attack.momentum))
    records = [start(i) if record is None else record for i, record in enumerate(found)]
    nonfinite = torch.zeros(n, dtype=torch.bool, device=device)
    history: list[Tensor] = []
    applied: dict[int, Tensor] = {}
    evals = 0

    def turn(rows: list[int], x: Tensor, size: float, *, first: bool, wanted: bool) -> list[Tensor]:
        """One gradient of these images at ``x``, their records moved; their maps where those are wanted."""
        nonlocal evals
        part = visit.rows(rows)
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            batch = AttackBatch(
                x, part.targets, part.sizes, int(not first), lambda: part.images.detach(), part.ids, part.epoch, part.seed,
                part.clean_maps,
            )  # fmt: skip
            if wanted:
                value, features = value_and_maps(attack.objective, select(victim, rows), batch)
            else:
                value, features = attack.objective(select(victim, rows), batch), []
            half = getattr(victim, "gradients_in_half", False)
            gradient, value, passes = attack_gradient(value, x, images, part.ids, half=half)
        length = torch.linalg.vector_norm(
            gradient, ord=1, dim=(1, 2, 3), dtype=torch.promote_types(gradient.dtype, torch.float32)
        )
        good = length.isfinite()
        step = torch.where(good & (length > 0), -size if attack.targeted else size, 0.0).float()
        kept = [records[i] for i in rows]
        fields = [maps[i] for i in rows]
        if attack.momentum:
            gradient, fields, kept = accelerate(gradient, length, kept, fields, part.sizes, attack.momentum)
        moved = fgsm_step_packed(gradient, [r.delta for r in kept], fields, codes, step)
        for k, (i, record) in enumerate(zip(rows, kept, strict=True)):
            records[i] = replace(record, delta=moved[k])
            if first:
                # No gradient, no adversarial example; what is kept is the start, from which the next visit may do better.
                applied[i] = torch.where(step[k] != 0, moved[k], _zero(codes, moved[k]))
            nonfinite[i] |= ~good[k]
        history.append(value)
        evals += passes * len(rows)
        return [m.detach() for m in features]

    def perturbed(rows: Sequence[int]) -> Tensor:
        deltas = [applied.get(i, records[i].delta) for i in rows]
        return _apply(take(images, rows), deltas, [maps[i] for i in rows], codes, units)

    def keep(rows: list[int]) -> None:
        for i in rows:
            records[i] = replace(records[i], visits=records[i].visits + 1, step=visit.step)
            memory.put(visit.ids[i], records[i])

    if cold:
        # Maps of a start are of no use, but that they can be had from this forward shows in the first step of a run.
        tried = turn(
            cold, perturbed(cold), START_STEP * attack.eps, first=True, wanted=shared and not attack.fresh
        )
        keep(cold)
    if attack.fresh and due:
        turn(due, perturbed(due), attack.step_size, first=False, wanted=False)
        keep(due)
    adversarial = perturbed(range(n))
    watched: list[Tensor] = []
    rows = [] if attack.fresh else due
    if rows:
        watched = turn(rows, take(adversarial, rows), attack.step_size, first=False, wanted=shared)
        keep(rows)
    pyramid: list[Tensor] | None = None
    if with_maps:
        rows = rows if shared else []
        rest = [i for i in range(n) if i not in rows]
        with torch.no_grad():
            others = maps_of(select(victim, rest), take(adversarial, rest)) if rest else []
        if cold and tried and [m.shape[1:] for m in tried] != [m.shape[1:] for m in others]:
            raise ValueError(
                "mode='carry' takes features and class loss from one forward of the victim, whose maps are "
                f"{[list(m.shape[1:]) for m in tried]} where the teacher's are {[list(m.shape[1:]) for m in others]}; give it the "
                "teacher's own forward, or write fresh=True or mode='single'"
            )
        pyramid = interleave(n, [(rows, watched), (rest, others)])
    return AttackOutput(
        adversarial, adversarial - images, history, _whole(evals / max(n, 1)), nonfinite, maps=pyramid, memory_hits=n - len(cold)
    )  # fmt: skip


def _start(
    codes: DeltaCodes,
    visit: Visit,
    maps: Sequence[CellMap],
    device: torch.device,
    channels: int,
    momentum: bool,
    i: int,
) -> Record:
    shape = (channels, *maps[i].cells)
    delta = codes.start(shape, seed=visit.seed, id=visit.ids[i], epoch=visit.epoch, device=device)
    velocity = torch.zeros(shape, dtype=torch.float16, device=device) if momentum else None
    return Record(visit.views[i].canonical, visits=0, step=visit.step, delta=delta, velocity=velocity)


def _apply(
    images: Tensor, records: list[Tensor], maps: list[CellMap], codes: DeltaCodes, units: PixelUnits
) -> Tensor:
    grey, low, high = (values * (images.shape[1] // len(values)) for values in units.numbers(images.dtype))
    return apply_delta(images, records, maps, codes, grey_level=grey, low=low, high=high)


def _zero(codes: DeltaCodes, record: Tensor) -> Tensor:
    """A record of the same length that changes nothing; bits beyond a row's end do not matter."""
    middle, byte = codes.levels // 2, 0
    for shift in range(0, 8, codes.bits):
        byte |= middle << shift
    return torch.full_like(record, byte)


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
