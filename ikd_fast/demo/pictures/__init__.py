"""The pictures of a run, one module a picture. Each is drawn with matplotlib's Agg canvas and saved whole. Imports mmdet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ikd_fast.demo.coco import Split
from ikd_fast.demo.pictures.batch import draw_batch
from ikd_fast.demo.pictures.curves import draw_losses
from ikd_fast.demo.pictures.detections import draw_detections
from ikd_fast.demo.pictures.seeds import draw_seeds

__all__ = ["draw_all", "draw_batch", "draw_detections", "draw_losses", "draw_seeds"]


def draw_all(
    out: Path, splits: dict[str, Split], seed: int, results: dict[int, dict[str, Any]]
) -> list[Path]:
    """Draw every picture of the run in ``out`` (``pictures/*.png``) and return their paths."""
    folder = out / "pictures"
    made = [
        draw_batch(folder / "batch.png", out, splits, seed),
        draw_detections(folder / "detections.png", out, splits),
        draw_losses(folder / "losses.png", out, seed),
    ]
    if len(results) > 1:
        made.append(draw_seeds(folder / "seeds.png", results))
    return made
