"""Training images as both branches of IKD see them: augmented, adversarial, and the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ikd_fast.augment.plan import Branch
from ikd_fast.demo import configs
from ikd_fast.demo.coco import Split
from ikd_fast.demo.pictures.canvas import TRUTH, draw_boxes, figure, save, show
from ikd_fast.demo.quiet import quiet
from ikd_fast.distill import StepBatch
from ikd_fast.mmdet.distiller import IKDDistiller
from ikd_fast.mmdet.samples import box_tensor, to_targets

from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate

ROWS = 4
GAIN = 10


def draw_batch(path: Path, out: Path, splits: dict[str, Split], seed: int) -> Path:
    """Four training images: from the loader, after AdaptiveFreqAug (branch named), adversarial, 10 x the perturbation."""
    with quiet(out / "work" / "pictures.log"):
        model, rows = _model_and_rows(out, splits, seed)
        data = model.data_preprocessor(pseudo_collate(rows), training=True)
        targets = to_targets(data["data_samples"])
        sizes = [t["size"] for t in targets]
        batch = StepBatch(
            clean=data["inputs"],
            geo=data["geo"],
            targets=targets,
            sizes=sizes,
            image_ids=data["image_keys"],
            epoch=0,
            step=0,
            plan=data["plan"],
        )
        attack = model.ikd.attack
        assert attack is not None
        adversarial = model.ikd.craft(batch).images
        losses = [model.ikd.victim(x, targets) for x in (batch.geo, adversarial)]
    pixels = [model.data_preprocessor.units.to_pixels(x) for x in (batch.clean, batch.geo, adversarial)]
    fig = figure(11, 2.9 * len(rows) + 0.9)
    fig.suptitle(
        f"What IKD trains on. Adversarial: the teacher's class loss on these images goes from {losses[0]:.2f} to {losses[1]:.2f};"
        f" no pixel moves by more than {attack.eps:g} of 255 grey levels.",
        fontsize=10,
    )
    axes = fig.subplots(len(rows), 4, squeeze=False)
    for i, row in enumerate(rows):
        h, w = sizes[i]
        clean, geo, adv = (x[i, :, :h, :w] for x in pixels)
        loaded = row["inputs"].flip(0)
        show(axes[i, 0], _uint8(loaded), "from the loader")
        draw_boxes(axes[i, 0], box_tensor(row["data_samples"].gt_instances.bboxes).tolist(), TRUTH)
        show(axes[i, 1], _uint8(clean), _branch(data["plan"], i, len(targets[i]["boxes"])))
        draw_boxes(axes[i, 1], targets[i]["boxes"].tolist(), TRUTH)
        show(axes[i, 2], _uint8(adv), f"adversarial branch: {attack.mode}, eps {attack.eps:g}")
        show(axes[i, 3], _uint8(127.5 + GAIN * (adv - geo)), f"{GAIN} x the perturbation (grey: none)")
    return save(fig, path)


def _model_and_rows(
    out: Path, splits: dict[str, Split], seed: int
) -> tuple[IKDDistiller, list[dict[str, Any]]]:
    """The IKD student's model at step 0, and images that show as many branches as the first epoch has."""
    cfg = configs.load("fgd_ikd.py", splits)
    configs.set_seed(cfg, seed)
    cfg.model.teacher_config = configs.load("teacher.py", splits).model
    cfg.model.teacher_ckpt = str(out / "teacher.pth")
    model = MODELS.build(cfg.model)
    model.set_total_steps(100)
    model.set_progress(0, 0)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    for transform in dataset.pipeline.transforms:
        if hasattr(transform, "set_epoch"):
            transform.set_epoch(0)
    candidates = [dataset[i] for i in range(min(len(dataset), 96))]
    plan = model.data_preprocessor(pseudo_collate(candidates), training=True)["plan"]
    boxes = [len(row["data_samples"].gt_instances) for row in candidates]
    by_branch = {branch: [i for i, b in enumerate(plan.branch.tolist()) if b == branch] for branch in Branch}
    for places in by_branch.values():
        places.sort(key=lambda i: (boxes[i] == 0, i))
    order = [Branch.CROP, Branch.NOISE, Branch.KEEP]
    chosen: list[int] = []
    while len(chosen) < min(ROWS, len(candidates)):
        chosen += [by_branch[branch].pop(0) for branch in order if by_branch[branch]]
    chosen = chosen[:ROWS]
    return model, [
        candidates[i] for i in sorted(chosen, key=lambda i: (order.index(Branch(int(plan.branch[i]))), i))
    ]


def _branch(plan: Any, i: int, boxes: int) -> str:
    branch = Branch(int(plan.branch[i]))
    if branch is Branch.CROP:
        h, w = plan.out_sizes[i]
        return f"clean branch: crop to {w} x {h}\n(a box of 32 x 32 pixels or more)"
    why = "every box below 32 x 32 pixels" if boxes else "no boxes: as if all were small"
    if branch is Branch.NOISE:
        return f"clean branch: noise, sigma {float(plan.sigma[i]):.1f}\n({why})"
    return f"clean branch: unchanged, noise not drawn\n({why})"


def _uint8(image: torch.Tensor) -> np.ndarray:
    """``[3,H,W]`` in 0..255 -> ``[H,W,3]`` uint8."""
    return image.detach().permute(1, 2, 0).float().round().clamp(0, 255).to(torch.uint8).numpy()
