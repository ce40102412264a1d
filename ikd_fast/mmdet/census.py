"""What an epoch will do to a data set: shares of the branches and lost boxes, from annotations alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ikd_fast.augment import AdaptiveFreqAug
from ikd_fast.augment.geometry import kept
from ikd_fast.augment.plan import Branch

from .errors import InputError
from .pipeline_checks import composes, pipeline_of
from .samples import image_key

SMALL, MEDIUM = 32**2, 96**2
"""COCO's borders between small, medium and large, in square pixels of the annotation."""


def census(
    dataset: Any, augment: AdaptiveFreqAug | None, indices: Iterable[int], epoch: int = 0
) -> dict[str, Any]:
    """Plan the images ``indices`` of ``dataset`` without reading them.

    Branches are those of training wherever the pipeline leaves the boxes of an image together: areas are the annotation's and
    the draws are keyed by image. ``changed_by`` names transforms that cut or compose images before that.

    Returns:
        ``images``, ``epoch``; ``crop``, ``noise``, ``keep``: shares (None without augment); ``boxes``, ``boxes_lost`` by the
        crop, ``small``, ``medium``, ``large`` boxes; ``changed_by``.
    """
    changed = [
        type(t).__name__ for _, t in pipeline_of(dataset, "") if composes(t) or "Crop" in type(t).__name__
    ]
    while not hasattr(dataset, "get_data_info"):  # mmdet's MultiImageMixDataset
        dataset = dataset.dataset
    branches = dict.fromkeys(Branch, 0)
    sizes = {"small": 0, "medium": 0, "large": 0}
    images = boxes_seen = lost = 0
    for i in indices:
        info = dataset.get_data_info(int(i))
        boxes, ignore = _boxes(info)
        counted = boxes[~ignore]
        images += 1
        boxes_seen += len(counted)
        for area in ((counted[:, 2] - counted[:, 0]) * (counted[:, 3] - counted[:, 1])).tolist():
            sizes["small" if area < SMALL else "medium" if area < MEDIUM else "large"] += 1
        if augment is None:
            continue
        try:
            plan = augment.plan(
                [boxes], [(info["height"], info["width"])], [image_key(info)], epoch, ignore=[ignore]
            )
        except ValueError as error:
            raise InputError(f"{info.get('img_path', f'image {i}')}: {error}") from error
        branch = Branch(int(plan.branch[0]))
        branches[branch] += 1
        if branch is Branch.CROP:
            x0, y0, x1, y1 = (int(v) for v in plan.window[0])
            lost += int((~kept(counted, (x0, y0, x1, y1), plan.min_kept)).sum())
    share = {b.name.lower(): None if augment is None else branches[b] / max(1, images) for b in Branch}
    return {
        "images": images,
        "epoch": epoch,
        **{name: share[name] for name in ("crop", "noise", "keep")},
        "boxes": boxes_seen,
        "boxes_lost": lost,
        **sizes,
        "changed_by": changed,
    }


def render(found: dict[str, Any], total: int) -> str:
    """The census of ``total`` images' sample as text."""
    lines = [
        f"{found['images']} of {total} training images, epoch {found['epoch']}, planned from their annotations"
    ]
    if found["crop"] is None:
        lines.append("  no augmentation in the model (augment=None)")
    else:
        lines += [_bar(name, found[name], "") for name in ("crop", "noise", "keep")]
        lost = found["boxes_lost"] / max(1, found["boxes"])
        lines.append(f"  {found['boxes_lost']} of {found['boxes']} boxes ({lost:.1%}) are lost by the crop")
    lines.append(f"{found['boxes']} boxes by area in the annotation")
    borders = {"small": "below 32^2 px", "medium": "below 96^2 px", "large": "96^2 px or more"}
    lines += [_bar(name, found[name] / max(1, found["boxes"]), borders[name]) for name in borders]
    if found["changed_by"]:
        names = ", ".join(dict.fromkeys(found["changed_by"]))
        lines.append(
            f"the pipeline's {names} changes which boxes an image has: shares in training differ from these"
        )
    return "\n".join(lines)


def _bar(name: str, share: float, remark: str) -> str:
    return f"  {name:<7} {share:6.1%}  {'#' * round(40 * share):<40}  {remark}".rstrip()


def _boxes(info: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = info.get("instances", [])
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
    return boxes, torch.tensor([bool(row.get("ignore_flag", 0)) for row in rows], dtype=torch.bool)
