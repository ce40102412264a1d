"""A plan carried out on pixels, boxes and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels import add_noise
from ikd_fast.pixels import PixelUnits

from . import checks
from .geometry import crop_flip
from .images import Batch, Images
from .plan import AugPlan
from .targets import Targets, boxes_of, transform, valid_size


def geometry(
    images: Images, targets: Targets, plan: AugPlan, box_format: str, drop_empty: bool
) -> tuple[Images, list[dict[str, Any]]]:
    """The crop and the flip of ``AdaptiveFreqAug.apply``."""
    batch = _unpack(images, targets, plan)
    sizes: list[tuple[int, int]] = [(h, w) for h, w in plan.sizes.tolist()]
    windows, flips = [tuple(row) for row in plan.window.tolist()], plan.flip.tolist()

    def changed(i: int) -> bool:
        return flips[i] or windows[i] != (0, 0, sizes[i][1], sizes[i][0])

    views = [crop_flip(v, windows[i], flips[i]) if changed(i) else v for i, v in enumerate(batch.views)]
    new_targets = _move_targets(batch, targets, plan, box_format, drop_empty)
    return batch.rebuild(views, changed, clear=True), new_targets


def moved_targets(
    images: Images, targets: Targets, plan: AugPlan, box_format: str, drop_empty: bool
) -> list[dict[str, Any]]:
    """What :func:`geometry` makes of the targets, without touching a pixel."""
    return _move_targets(_unpack(images, targets, plan), targets, plan, box_format, drop_empty)


def _move_targets(
    batch: Batch, targets: Targets, plan: AugPlan, box_format: str, drop_empty: bool
) -> list[dict[str, Any]]:
    canvas = tuple(batch.source.shape[-2:]) if batch.stacked else None
    rows = zip(targets, plan.window.tolist(), plan.flip.tolist(), plan.sizes.tolist(), strict=True)
    return [
        transform(target, tuple(window), flip, (h, w), canvas, box_format, drop_empty, plan.min_kept, i)
        for i, (target, window, flip, (h, w)) in enumerate(rows)
    ]


def noise(images: Images, plan: AugPlan, units: PixelUnits, sizes: Any = None) -> Images:
    """The noise of ``AdaptiveFreqAug.apply``, on images that are cropped and flipped already."""
    expected = plan.out_sizes
    if sizes is not None and checks.host_sizes(sizes) != expected:
        raise ValueError(
            f"sizes: expected the plan's after its crop, {expected}, got {checks.host_sizes(sizes)}"
        )
    _same_number(images, plan)
    batch = Batch.of(images, expected)
    if batch.sizes != expected:
        i = next(j for j, size in enumerate(batch.sizes) if size != expected[j])
        raise ValueError(
            f"images[{i}]: expected {expected[i]} (h, w), what the plan's crop leaves, got {batch.sizes[i]}; "
            "write images, targets = aug.apply_geometry(images, targets, plan) first"
        )
    units.check(batch.views)
    sigmas = plan.sigma.tolist()
    chosen = [i for i, sigma in enumerate(sigmas) if sigma > 0]
    if not chosen:
        return images if batch.stacked else list(images)
    if batch.stacked:
        return add_planned_noise(images, plan, units, sizes=torch.tensor(expected, device="cpu"))
    noisy = add_planned_noise([batch.views[i] for i in chosen], plan.select(chosen), units)
    views = list(batch.views)
    for i, view in zip(chosen, noisy, strict=True):
        views[i] = view
    return batch.rebuild(views, lambda i: sigmas[i] > 0, clear=False)


def add_planned_noise(
    images: Any,
    plan: AugPlan,
    units: PixelUnits,
    *,
    sizes: Tensor | None = None,
    channels_reversed: bool = False,
) -> Any:
    """``add_noise`` of a plan to images in ``units``: all of them in one launch on a GPU."""
    dtype = images.dtype if isinstance(images, Tensor) else images[0].dtype
    grey_level, low, high = units.numbers(dtype)
    return add_noise(
        images,
        plan.sigma,
        plan.ids,
        seed=plan.seed,
        epoch=plan.epoch,
        flip=plan.flip,
        sizes=sizes,
        grey_level=grey_level,
        low=low,
        high=high,
        channels_reversed=channels_reversed,
        round_noise=plan.round_noise,
        rng=plan.rng,
    )


def _same_number(images: Images, plan: AugPlan) -> None:
    if len(images) != len(plan):
        raise ValueError(
            f"plan: expected one for {len(images)} images, got one for {len(plan)}; "
            "write plan.select(indices)"
        )


def _unpack(images: Images, targets: Targets, plan: AugPlan) -> Batch:
    checks.same_length(len(images), "as images", targets=targets)
    _same_number(images, plan)
    planned = [(h, w) for h, w in plan.sizes.tolist()]
    batch = Batch.of(images, planned)
    for i, (size, target) in enumerate(zip(batch.sizes, targets, strict=True)):
        boxes = boxes_of(target, i)
        said = valid_size(target) if batch.stacked else None
        if size != planned[i] or (said is not None and said != planned[i]):
            raise ValueError(
                f"images[{i}]: expected {planned[i]} (h, w) as in the plan, got {said or size}; "
                "a plan serves the images it was made for"
            )
        if boxes.device.type != "cpu" and boxes.device != batch.device:
            raise ValueError(
                f"targets[{i}]['boxes']: expected on the CPU or on {batch.device} as the images, "
                f"got {boxes.device}; write boxes.to(images.device)"
            )
    return batch
