"""Input diversity, planned on the host: one draw per image and step, boxes move with the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels import input_diversity
from ikd_fast.kernels.reference.philox import Stream, draw


@dataclass(frozen=True)
class DiversityDraw:
    """Windows of one step: ``[N][x0, y0, w, h]`` host integers; an untouched image has its whole frame."""

    sizes: tuple[tuple[int, int], ...]
    windows: tuple[tuple[int, int, int, int], ...]

    @property
    def active(self) -> list[int]:
        return [
            i
            for i, ((h, w), win) in enumerate(zip(self.sizes, self.windows, strict=True))
            if win != (0, 0, w, h)
        ]

    def images(self, images: Tensor, fill: Tensor) -> Tensor:
        """The view of ``[N, C, H, W]`` images; images outside ``active`` are returned bit for bit."""
        if not self.active:
            return images
        frames, windows = (torch.tensor(v, device="cpu") for v in (self.sizes, self.windows))
        return input_diversity(images, frames, windows, fill)

    def targets(self, targets: Any) -> Any:
        """Dictionaries with ``boxes`` (xyxy pixels), and ``ignored`` ones, get moved copies; anything else stays as it is."""
        if not isinstance(targets, (list, tuple)):
            return targets
        moved = list(targets)
        for i in self.active:
            target = targets[i]
            if isinstance(target, dict):
                changed = {key: self._boxes(target[key], i) for key in ("boxes", "ignored") if key in target}
                moved[i] = {**target, **changed} if changed else target
        return moved

    def _boxes(self, boxes: Tensor, i: int) -> Tensor:
        (h, w), (x0, y0, new_w, new_h) = self.sizes[i], self.windows[i]
        # Scalars, not tensors of them: those would be a blocking copy to the boxes' device.
        x = boxes[:, 0::2] * (new_w / w) + x0
        y = boxes[:, 1::2] * (new_h / h) + y0
        return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def draw_diversity(
    sizes: Sequence[tuple[int, int]],
    ids: Sequence[int],
    *,
    step: int,
    epoch: int,
    seed: int,
    prob: float,
    rate: float,
    per_batch: bool = False,
) -> DiversityDraw:
    """Draw the windows of one step: with probability ``prob`` a shrink factor f ~ U[rate, 1], the same for both sides.

    Sides are ``int(f * side + 0.5)``, the offset is uniform over the places that fit. ``per_batch`` uses the first
    image's numbers for all (the published code draws one per batch).
    """
    windows = []
    for (h, w), image_id in zip(sizes, ids, strict=True):
        gate, u, off_y, off_x = draw(seed, ids[0] if per_batch else image_id, epoch, Stream.DIVERSITY, step)
        if gate >= prob:
            windows.append((0, 0, w, h))
            continue
        f = rate + (1 - rate) * u
        new_w, new_h = max(1, int(f * w + 0.5)), max(1, int(f * h + 0.5))
        windows.append((int(off_x * (w - new_w + 1)), int(off_y * (h - new_h + 1)), new_w, new_h))
    return DiversityDraw(tuple((int(h), int(w)) for h, w in sizes), tuple(windows))
