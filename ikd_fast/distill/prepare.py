"""From a user's images and targets to a batch the nets take: augment, scale, pad, stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ikd_fast.attack.memory import View
from ikd_fast.augment import AdaptiveFreqAug, AugPlan
from ikd_fast.augment.checks import as_boxes, counted_boxes, host_ids
from ikd_fast.kernels import augment_batch, draw
from ikd_fast.pixels import PixelUnits

from .step import StepBatch


def prepare_batch(
    images: Tensor | Sequence[Tensor],
    targets: Any,
    *,
    image_ids: Sequence[int | str] | Tensor,
    epoch: int,
    step: int | None,
    active: bool,
    augment: AdaptiveFreqAug | None,
    units: PixelUnits | None,
    pad_divisor: int,
    device: torch.device,
    views: Sequence[View] | None = None,
    needs_views: bool = False,
    adversarial: Tensor | Sequence[Tensor] | None = None,
) -> StepBatch:
    """Plan and apply the augmentation, bring uint8 to the nets' units, stack with zeros at the bottom right.

    ``adversarial``: images made before, one of the same size for each; window and flip are the same, and there is no noise.
    """
    if len(images) == 0:
        raise ValueError("images is empty: a step needs at least one image")
    _check_images(images, units, device)
    ids = host_ids(image_ids)
    draw(0, 0, epoch, 0)  # says what an epoch must be
    for name, given in (("image_ids", ids), ("targets", targets)):
        if not hasattr(given, "__len__") or len(given) != len(images):
            got = len(given) if hasattr(given, "__len__") else given
            raise ValueError(f"{name} must have one entry per image: expected {len(images)}, got {got}")
    plan = None if augment is None else augment.plan_for(images, targets, image_ids=ids, epoch=epoch)
    kept = _views(views, images, targets, plan) if needs_views else None
    given = targets
    if units is not None and all(x.dtype == torch.uint8 and x.dim() == 3 and len(x) == 3 for x in images):
        if augment is not None and plan is not None:
            targets = augment.apply_to_targets(images, targets, plan)
            sizes = plan.out_sizes
        else:
            sizes = [_size(image, targets, i) for i, image in enumerate(images)]
        _check_targets(targets, sizes)
        x_data, x_geo = _from_pixels(images, sizes, plan, units, pad_divisor)
    else:
        geo, noisy = images, images
        if augment is not None and plan is not None:
            geo, targets = augment.apply_geometry(images, targets, plan)
            noisy = augment.apply_noise(geo, plan, plan.out_sizes if isinstance(geo, Tensor) else None)
        sizes = [_size(image, targets, i) for i, image in enumerate(geo)]
        _check_targets(targets, sizes)
        x_geo = _stack(geo, sizes, units, pad_divisor, device)
        same = plan is None or plan.noise_frac == 0
        x_data = x_geo if same else _stack(noisy, sizes, units, pad_divisor, device)
    moved = None
    if adversarial is not None:
        moved = _beside(images, adversarial, given, sizes, plan, augment, units, pad_divisor, device)
    return StepBatch(
        x_data, x_geo, _to(targets, device), sizes, ids, int(epoch), int(step or 0), active, plan, views=kept, adversarial=moved
    )  # fmt: skip


def _beside(
    images: Tensor | Sequence[Tensor],
    adversarial: Tensor | Sequence[Tensor],
    targets: Any,
    sizes: Sequence[tuple[int, int]],
    plan: AugPlan | None,
    augment: AdaptiveFreqAug | None,
    units: PixelUnits | None,
    divisor: int,
    device: torch.device,
) -> Tensor:
    """x_adv: what was done to ``images`` but the noise, done to ``adversarial``."""
    shapes, given = ([tuple(x.shape) for x in part] for part in (images, adversarial))
    if shapes != given:
        raise ValueError(
            f"adversarial must have one image of the same shape for each image: expected {shapes}, got {given}"
        )
    try:
        _check_images(adversarial, units, device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"adversarial {error}") from None
    dtypes, own = ({x.dtype for x in part} for part in (images, adversarial))
    if dtypes != own:
        raise TypeError(
            f"adversarial images must be of the dtype of the images, {', '.join(map(str, dtypes))}, got {', '.join(map(str, own))}"
        )
    if units is not None and all(
        x.dtype == torch.uint8 and x.dim() == 3 and len(x) == 3 for x in adversarial
    ):
        still = plan if plan is None else replace(plan, sigma=torch.zeros_like(plan.sigma))
        return _from_pixels(adversarial, sizes, still, units, divisor)[1]
    geo = adversarial
    if augment is not None and plan is not None:
        geo, _ = augment.apply_geometry(adversarial, targets, plan)
    return _stack(geo, sizes, units, divisor, device)


def _views(
    views: Sequence[View] | None, images: Tensor | Sequence[Tensor], targets: Any, plan: AugPlan | None
) -> list[View]:
    """The user's views, or those of images that nothing was done to, and then the plan's window and flip."""
    sizes = [_size(image, targets, i) for i, image in enumerate(images)]
    given = [View.identity(size) for size in sizes] if views is None else list(views)
    if len(given) != len(sizes) or any(v.size != size for v, size in zip(given, sizes, strict=False)):
        raise ValueError(
            f"views must say where each image lies, one of its (h, w) for each: expected {sizes}, got {[v.size for v in given]}"
        )
    return planned_views(given, plan)


def planned_views(views: Sequence[View], plan: AugPlan | None) -> list[View]:
    """Views after window and flip of the plan."""
    if plan is None:
        return list(views)
    windows, flips = plan.window.tolist(), plan.flip.tolist()
    return [v.crop(tuple(w)).flip(bool(f)) for v, w, f in zip(views, windows, flips, strict=True)]


def _from_pixels(
    images: Tensor | Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    plan: AugPlan | None,
    units: PixelUnits,
    divisor: int,
) -> tuple[Tensor, Tensor]:
    """uint8 ``[3, H, W]`` images to x_data and x_geo, each in one pass over the pixels; one tensor where there is no noise."""
    n = len(images)
    whole = sizes if plan is None else plan.sizes.tolist()
    valid = [image[:, :h, :w] for image, (h, w) in zip(images, whole, strict=True)]
    mean, std = units.normalisation(3)
    arguments: dict[str, Any] = {
        "window": torch.tensor([(0, 0, w, h) for h, w in whole], device="cpu"),
        "flip": torch.zeros(n, dtype=torch.bool, device="cpu"),
        "sigma": torch.zeros(n, device="cpu"),
        "ids": torch.zeros(n, dtype=torch.int64, device="cpu"),
        "seed": 0,
        "epoch": 0,
    }
    if plan is not None:
        arguments.update(plan.kernel_args())
    if isinstance(images, Tensor):  # a stack keeps its sides
        height, width = images.shape[-2:]
        arguments["size"] = -(-height // divisor) * divisor, -(-width // divisor) * divisor
    arguments.update(layout="CHW", mean=mean, std=std, divisor=divisor)
    if plan is None or plan.noise_frac == 0:
        x_geo = augment_batch(valid, **arguments)
        return x_geo, x_geo
    x_data = augment_batch(valid, **arguments)
    arguments["sigma"] = torch.zeros(n, device="cpu")
    return x_data, augment_batch(valid, **arguments)


def _size(image: Tensor, targets: Any, i: int) -> tuple[int, int]:
    target = targets[i] if isinstance(targets, (list, tuple)) else None
    if isinstance(target, dict) and "size" in target:
        h, w = target["size"]
        return int(h), int(w)
    return image.shape[-2], image.shape[-1]


def _stack(
    images: Tensor | Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    units: PixelUnits | None,
    divisor: int,
    device: torch.device,
) -> Tensor:
    """Zeros beyond each image's size, whatever lay there before it was brought to the nets' units."""
    rows = [_scaled(image, units, i) for i, image in enumerate(images)]
    height = -(-max(r.shape[-2] for r in rows) // divisor) * divisor
    width = -(-max(r.shape[-1] for r in rows) // divisor) * divisor
    if isinstance(images, Tensor) and images.shape[-2:] == (height, width) and images.is_floating_point():
        return images
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], height, width)
    for i, (row, (h, w)) in enumerate(zip(rows, sizes, strict=True)):
        out[i, :, :h, :w] = row[:, :h, :w]
    return out


def _check_images(images: Any, units: PixelUnits | None, device: torch.device) -> None:
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(
                f"images[{i}] must be a torch.Tensor [C, H, W], got {type(image).__name__}; write torch.from_numpy(image) "
                "and .permute(2, 0, 1) for [H, W, C]"
            )
        if image.device != device:
            raise ValueError(
                f"images[{i}] is on {image.device}, the student on {device}; write images.to({str(device)!r})"
            )
    if units is not None:
        units.check(images)


def _check_targets(targets: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Boxes and labels of each image's dict; boxes on a device are not looked at. Other targets are the task's business."""
    if isinstance(targets, Tensor):
        return
    for i, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        if not isinstance(target, Mapping):
            continue
        if "boxes" not in target:
            raise ValueError(
                f"targets[{i}]: expected a dict with 'boxes' [n, 4] xyxy pixels, got keys {sorted(map(str, target))}; write "
                "dict(boxes=..., labels=...), or boxes=torch.zeros(0, 4) where there are none"
            )
        boxes = as_boxes(target["boxes"], f"targets[{i}]['boxes']")
        if boxes.device.type == "cpu":
            counted_boxes(boxes, size, "xyxy", "drop", None, i)
        if "labels" in target and len(target["labels"]) != len(boxes):
            raise ValueError(
                f"targets[{i}]['labels']: expected {len(boxes)}, one per box, got {len(target['labels'])}"
            )


def _scaled(image: Tensor, units: PixelUnits | None, i: int) -> Tensor:
    if image.dim() != 3 or (image.shape[0] != 3 and image.shape[-1] == 3):
        raise ValueError(
            f"images[{i}] must be [C, H, W], got {list(image.shape)}; write image.permute(2, 0, 1) for [H, W, C]"
        )
    if image.dtype == torch.uint8:
        if units is None:
            raise ValueError(
                f"images[{i}] is uint8 but nothing says what the nets take; write units=PixelUnits(mean=..., std=...) or "
                "PixelUnits(value_range=(0, 1))"
            )
        return units.from_pixels(image)
    if not image.is_floating_point():
        raise TypeError(f"images[{i}] must be uint8 or floating, got {image.dtype}")
    return image


def _to(targets: Any, device: torch.device) -> Any:
    if isinstance(targets, Tensor):
        return targets.to(device, non_blocking=True)
    if isinstance(targets, (list, tuple)):
        return [
            {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in t.items()}
            if isinstance(t, dict)
            else _to(t, device)
            for t in targets
        ]
    return targets
