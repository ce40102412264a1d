"""Training images as both branches of IKD see them: augmented, adversarial, and the difference."""

from __future__ import annotations

from pathlib import Path

from ikd_fast.demo import configs
from ikd_fast.demo.coco import Split
from ikd_fast.demo.quiet import quiet
from ikd_fast.mmdet.explain import build_dataset, build_distiller
from ikd_fast.mmdet.preview import branch_rows, choose_rows
from ikd_fast.pictures.branches import draw_branches

ROWS = 4


def draw_batch(path: Path, out: Path, splits: dict[str, Split], seed: int) -> Path:
    """Four training images: from the loader, after AdaptiveFreqAug (branch named), adversarial, 10 x the perturbation."""
    with quiet(out / "work" / "pictures.log"):
        cfg = configs.load("fgd_ikd.py", splits)
        configs.set_seed(cfg, seed)
        cfg.model.teacher_config = configs.load("teacher.py", splits).model
        cfg.model.teacher_ckpt = str(out / "teacher.pth")
        model = build_distiller(cfg, "fgd_ikd.py")
        model.set_total_steps(100)
        model.set_progress(0, 0)
        dataset = build_dataset(cfg, "fgd_ikd.py")
        found = list(branch_rows(model, choose_rows(model, dataset, range(len(dataset)), ROWS)))
    before, after = (
        sum(figures[key] for _, figures in found) for key in ("class_loss", "adversarial_class_loss")
    )
    title = (
        f"What IKD trains on. Adversarial: the teacher's class loss on these images goes from {before:.2f} to {after:.2f}; "
        f"no pixel moves by more than {model.ikd.attack.eps:g} of 255 grey levels."
    )
    return draw_branches(path, [row for row, _ in found], title)
