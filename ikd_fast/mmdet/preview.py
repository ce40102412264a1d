"""Training images of a config as both branches of IKD see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ikd_fast.augment.plan import AugPlan, Branch
from ikd_fast.distill import StepBatch
from ikd_fast.distill.victim import StepVictim
from ikd_fast.pictures.branches import BranchRow

from mmengine.dataset import pseudo_collate

from .preprocessor import plan_samples
from .samples import box_tensor, image_key, to_targets

CANDIDATES = 24
"""Images that are loaded for each image shown, so that every branch has a chance to appear."""


def choose_rows(model: Any, dataset: Any, order: Sequence[int], count: int) -> list[dict[str, Any]]:
    """``count`` loaded images of ``order``, taking branches in turn, those with boxes first; sorted by branch."""
    rows = [
        row for row in (dataset[int(i)] for i in order[: max(count, CANDIDATES * count)]) if row is not None
    ]
    augment = model.data_preprocessor.augment
    if augment is None:
        return rows[:count]
    samples = [row["data_samples"] for row in rows]
    sizes = [tuple(row["inputs"].shape[-2:]) for row in rows]
    keys = [image_key(sample.metainfo) for sample in samples]
    plan = plan_samples(augment, samples, sizes, keys, model.progress.require_epoch("preview"))
    order_of = [Branch.CROP, Branch.NOISE, Branch.KEEP]
    places = {branch: [i for i, b in enumerate(plan.branch.tolist()) if b == branch] for branch in order_of}
    for found in places.values():
        found.sort(key=lambda i: (len(samples[i].gt_instances) == 0, i))
    chosen: list[int] = []
    while len(chosen) < min(count, len(rows)):
        chosen += [places[branch].pop(0) for branch in order_of if places[branch]]
    chosen = chosen[:count]
    return [rows[i] for i in sorted(chosen, key=lambda i: (order_of.index(Branch(int(plan.branch[i]))), i))]


def branch_rows(model: Any, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[BranchRow, dict[str, Any]]]:
    """What the step makes of each loaded image, one at a time, and the figures of it.

    The model is an :class:`~ikd_fast.mmdet.IKDDistiller` that knows its epoch. Figures: ``file``, ``branch``, ``boxes`` from the
    loader, ``boxes_lost`` by the crop, ``linf`` of the perturbation in grey levels, and for objective "cls" the teacher's class
    loss on the image as it was and as it became (``class_loss``, ``adversarial_class_loss``).
    """
    for row in rows:
        data = model.data_preprocessor(pseudo_collate([row]), training=True)
        (target,) = targets = to_targets(data["data_samples"])
        loaded = box_tensor(row["data_samples"].gt_instances.bboxes)
        h, w = target["size"]
        figures: dict[str, Any] = {
            "file": str(row["data_samples"].metainfo.get("img_path", "")),
            "branch": "none" if data["plan"] is None else Branch(int(data["plan"].branch[0])).name.lower(),
            "boxes": len(loaded),
            "boxes_lost": len(loaded) - len(target["boxes"]),
        }
        adversarial, title = None, ""
        if model.ikd.adversarial:
            batch = StepBatch(
                clean=data["inputs"],
                geo=data["geo"],
                targets=targets,
                sizes=[(h, w)],
                image_ids=data["image_keys"],
                epoch=model.progress.require_epoch("preview"),
                step=model.progress.step,
                plan=data["plan"],
                views=data.get("views"),
                adversarial=data.get("adversarial"),
            )
            attack = model.ikd.attack
            out = model.ikd.craft(batch)
            adversarial = _rgb(model, out.images, (h, w))
            radius = f", eps {attack.eps:g}" if hasattr(attack, "eps") else " images"
            title = f"adversarial branch: {attack.mode}{radius}"
            grey = out.delta / model.ikd.units.grey_level(out.delta)
            figures["linf"] = round(float(grey.abs().amax()), 3)
            if attack.objective_name in ("cls", "none"):
                before, after = (_class_loss(model, x, batch) for x in (batch.geo, out.images))
                figures.update(class_loss=before, adversarial_class_loss=after)
                title += f"\nteacher's class loss {before:.2f} -> {after:.2f}"
        yield (
            BranchRow(
                loaded=row["inputs"][:3].flip(0).permute(1, 2, 0).numpy(),  # loaders read BGR
                loaded_boxes=loaded.numpy(),
                clean=_rgb(model, data["inputs"], (h, w)),
                boxes=target["boxes"].numpy(),
                clean_title=branch_title(data["plan"], len(loaded), model.data_preprocessor.augment),
                geo=_rgb(model, data["geo"], (h, w)),
                adversarial=adversarial,
                adversarial_title=title,
            ),
            figures,
        )


def branch_title(plan: AugPlan | None, boxes: int, augment: Any) -> str:
    """What was done to the one image of a plan, and why."""
    if plan is None:
        return "clean branch: as loaded (augment=None)"
    branch = Branch(int(plan.branch[0]))
    side = augment.area_threshold**0.5
    if branch is Branch.CROP:
        h, w = plan.out_sizes[0]
        why = {
            "any_large": f"a box of {side:g} x {side:g} pixels or more",
            "no_small": f"no box below {side:g} x {side:g}",
        }
        return f"clean branch: crop to {w} x {h}\n({why.get(augment.rule, 'by the rule')})"
    small = {
        "any_large": f"every box below {side:g} x {side:g} pixels",
        "no_small": f"a box below {side:g} x {side:g} pixels",
    }
    why_not = small.get(augment.rule, "by the rule") if boxes else "no boxes: as if all were small"
    if branch is Branch.NOISE:
        return f"clean branch: noise, sigma {float(plan.sigma[0]):.1f}\n({why_not})"
    return f"clean branch: unchanged, noise not drawn\n({why_not})"


def _class_loss(model: Any, images: Tensor, batch: StepBatch) -> float:
    ikd = model.ikd
    victim = StepVictim(ikd.teacher, ikd.teacher_features, ikd.victim, batch.sizes)
    with torch.no_grad():
        return float(victim.cls_loss(images, batch.targets).sum())


def _rgb(model: Any, images: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The one image of a network batch as RGB ``[h, w, 3]`` in 0..255."""
    pixels = model.ikd.units.to_pixels(images.detach())[0, :, : size[0], : size[1]]
    turned = pixels if bool(model.data_preprocessor._channel_conversion) else pixels.flip(0)
    return turned.permute(1, 2, 0).float().cpu().numpy()
