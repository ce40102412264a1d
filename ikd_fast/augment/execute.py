"""A plan carried out on pixels, boxes and masks."""

from __future__ import annotations

from typing import Any

from ikd_fast.kernels.reference.add_noise import add_noise
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
    new_targets = []
    for i, target in enumerate(targets):
        canvas = tuple(images.shape[-2:]) if batch.stacked else None
        new_targets.append(
            transform(
                target, windows[i], flips[i], sizes[i], canvas, box_format, drop_empty, plan.min_kept, i
            )
        )
    return batch.rebuild(views, changed, clear=True), new_targets


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
    sigmas, flips, keys = plan.sigma.tolist(), plan.flip.tolist(), plan.ids.tolist()
    views = list(batch.views)
    for i, view in enumerate(views):
        if sigmas[i] > 0:
            low, high = units.bounds(view)
            views[i] = add_noise(
                view,
                sigmas[i],
                seed=plan.seed,
                id=keys[i],
                epoch=plan.epoch,
                grey_level=units.grey_level(view),
                low=low,
                high=high,
                flip=flips[i],
                round_noise=plan.round_noise,
                rng=plan.rng,
            )
    return batch.rebuild(views, lambda i: sigmas[i] > 0, clear=False)


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
