"""Rows of one radius and one seed: every attack on every batch, batch by batch, so that clean maps are made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ikd_fast.attack import AttackOutput, OnlineDIFGSM
from ikd_fast.attack.memory import View
from ikd_fast.attack.objectives import features_of

from .measures import Tally, pixel_change, pyramid_change
from .plan import Candidate, StrengthSettings, candidates
from .round_trip import published_round_trip, saved_size
from .rows import StrengthRow, wait
from .subject import StrengthBatch, Subject
from .views import draw_view, move_batch

Advance = Callable[[float], None]


class _Row:
    """A row while its images are being measured."""

    def __init__(self, eps: float) -> None:
        self.eps, self.tally, self.found = eps, Tally(), []  # type: ignore[var-annotated]

    def add(
        self, subject: Subject, batch: StrengthBatch, clean: Sequence[Tensor], images: Tensor, maps: Sequence[Tensor] | None,
        *, seconds: float, evals: float, reference: Tensor | None = None,
    ) -> None:  # fmt: skip
        """``clean``: maps of ``reference``, the images that ``images`` are compared with; default the batch's own."""
        reference = batch.images if reference is None else reference
        with torch.no_grad():
            maps = features_of(subject.victim, images) if maps is None else list(maps)
            loss, found = subject.look(images, batch, maps)
            change = pyramid_change(clean, maps)
        pixels = pixel_change(reference, images, batch.sizes, subject.units, self.eps)
        self.tally.add(loss, change, pixels, seconds=seconds, evals=evals)
        self.found += found

    def row(self, name: str, subject: Subject) -> StrengthRow:
        return StrengthRow.of(name, self.tally, subject.score(self.found))


def clean_rows(subject: Subject, settings: StrengthSettings, advance: Advance) -> list[StrengthRow]:
    """The clean images, and the clean images after the published round trip: neither has an eps or a seed."""
    rows = {"clean": _Row(float("inf")), "clean, published round trip": _Row(float("inf"))}
    for batch in subject.batches():
        clean = _clean_maps(subject, batch)
        for name, row in rows.items():
            images = batch.images if name == "clean" else _round_trip(subject, settings, batch, batch.images)
            row.add(subject, batch, clean, images, clean if name == "clean" else None, seconds=0.0, evals=0)
        advance(2)
    return [row.row(name, subject) for name, row in rows.items()]


def attacked_rows(
    subject: Subject, settings: StrengthSettings, *, eps: float, seed: int, advance: Advance
) -> list[StrengthRow]:
    """All rows of one eps and one seed.

    **What is compared.** Every row is measured on the same images in the same, whole view of them, so the figures of all rows compare
    directly. ``carry`` at visit n has a memory of its own that has seen visits 1 .. n - 1 of each image in n - 1 random views
    (:func:`~ikd_fast.analysis.strength.views.draw_view`: mirrored with probability 0.5, cropped to 0.8 .. 1 of each side, keyed by
    seed, image and visit; boxes move along), stored at ``memory.bits``; visit n is on the whole image. What is measured is
    thus what an image's n-th visit in a training run gives, but for its last view, which is fixed so that rows compare.

    **Seconds** cover crafting the images and the maps of the victim on them, which the distillation needs anyway: ``carry`` gets both
    from one forward, other modes pay for the maps with another. Where an objective reads clean maps, which a training step has, they
    are given. A round trip's seconds are its attack's; what it does to files is not counted. Its images are compared with the clean ones
    after the same trip, so that its changes are what is left of the perturbation, and not what the trip does to any image.
    """
    plan = candidates(settings, eps)
    rows: dict[str, _Row] = {name: _Row(eps) for candidate in plan for name in candidate.row_names()}
    for batch in subject.batches():
        clean = _clean_maps(subject, batch)
        made: dict[str, tuple[AttackOutput, float]] = {}
        for candidate in plan:
            if candidate.kind == "carry":
                for n, out, seconds in carried(subject, candidate, batch, clean, seed):
                    name = candidate.row_names()[candidate.visits.index(n)]
                    rows[name].add(
                        subject, batch, clean, out.images, out.maps, seconds=seconds, evals=out.gradient_evals
                    )
            elif candidate.kind == "round_trip":
                out, seconds = made[candidate.name.partition(",")[0]]
                images, base = (_round_trip(subject, settings, batch, x) for x in (out.images, batch.images))
                with torch.no_grad():
                    base_maps = features_of(subject.victim, base)
                rows[candidate.name].add(
                    subject, batch, base_maps, images, None, seconds=seconds, evals=out.gradient_evals, reference=base,
                )  # fmt: skip
            else:
                out, seconds = made[candidate.name] = _timed(candidate.build(seed), subject, batch, clean)
                rows[candidate.name].add(
                    subject, batch, clean, out.images, out.maps, seconds=seconds, evals=out.gradient_evals
                )
            advance(work(candidate))
    return [row.row(name, subject) for name, row in rows.items()]


def work(candidate: Candidate) -> float:
    """How much of the time a candidate takes: its gradients, at about three forwards each, and a look at each row."""
    return candidate.cost + 0.5 * len(candidate.row_names())


def carried(
    subject: Subject, candidate: Candidate, batch: StrengthBatch, clean: Sequence[Tensor], seed: int
) -> Iterator[tuple[int, AttackOutput, float]]:
    """(n, what visit n gives, seconds) for each measured visit, after n - 1 visits in random views.

    One chain of random views serves all: before its visit n, the memory is copied and the copy's visit n is the measured one.
    """
    walker = candidate.build(seed)
    identity = [View.identity(size) for size in batch.sizes]
    for n in range(1, max(candidate.visits) + 1):
        if n in candidate.visits:
            twin = _twin(walker, candidate.build(seed), batch, identity)
            yield n, *_timed(twin, subject, batch, clean, visit=n)
        if n < max(candidate.visits):
            drawn = [
                draw_view(size, seed=seed, image_id=key, visit=n, align=candidate.align)
                for size, key in zip(batch.sizes, batch.ids, strict=True)
            ]
            seen = move_batch(batch.images, batch.targets, batch.sizes, drawn, divisor=subject.divisor)
            walker(
                subject.victim, seen.images, seen.targets, image_ids=batch.ids, epoch=n, sizes=seen.sizes,
                units=subject.units, views=seen.views,
            )  # fmt: skip


def _twin(
    walker: OnlineDIFGSM, twin: OnlineDIFGSM, batch: StrengthBatch, views: Sequence[View]
) -> OnlineDIFGSM:
    """``twin`` with a copy of what the walker keeps of these images."""
    if walker.memory is None or twin.memory is None or walker.memory is twin.memory:
        raise ValueError(
            "visits of 'carry' are measured on memories of their own: give memory= as a dict, not as an object"
        )
    channels = batch.images.shape[1]
    walker.bind_memory(channels)
    twin.bind_memory(channels)
    for key, record in zip(
        batch.ids, walker.memory.fetch(batch.ids, views, batch.images.device), strict=True
    ):
        if record is not None:
            twin.memory.put(key, record)
    return twin


def _timed(
    attack: OnlineDIFGSM, subject: Subject, batch: StrengthBatch, clean: Sequence[Tensor], *, visit: int = 1
) -> tuple[AttackOutput, float]:
    given: dict[str, Any] = {"clean_maps": clean} if attack.reads_clean_maps else {}
    wait(batch.images)
    start = time.perf_counter()
    out = attack(
        subject.victim, batch.images, batch.targets, image_ids=batch.ids, epoch=visit, sizes=batch.sizes, units=subject.units,
        with_maps=True, **given,
    )  # fmt: skip
    wait(batch.images)
    return out, time.perf_counter() - start


def _round_trip(subject: Subject, settings: StrengthSettings, batch: StrengthBatch, images: Tensor) -> Tensor:
    saved = [
        saved_size(size, original, settings.shrink)
        for size, original in zip(batch.sizes, batch.originals, strict=True)
    ]
    return published_round_trip(
        images, batch.sizes, saved, subject.units, rgb=subject.rgb, quality=settings.quality
    )


@torch.no_grad()
def _clean_maps(subject: Subject, batch: StrengthBatch) -> list[Tensor]:
    return features_of(subject.victim, batch.images)
