"""Weights of foreground and background cells from boxes, as focal and global distillation defines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .precision import full

# Elements of the [N, boxes, H, W] product held at once: 16 MiB in float32.
_MASK_BUDGET = 1 << 22


def fgd_masks(
    boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], maps: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """Foreground and background weights ``[N, H, W]`` for every map size in ``maps``.

    ``boxes[i]`` is ``[n_i, 4]`` xyxy; a coordinate becomes cells by ``x / sizes[i] * map size``. The
    published module takes the image size before padding there, though the map covers the padded input, so
    boxes stretch when an image is padded; give the padded size to avoid that.

    A box covers the cells floor(x1)..ceil(x2),
    floor(y1)..ceil(y2), both ends included, with weight 1 / area, area counted before clipping to the map;
    where boxes overlap the largest weight (the smallest box) stands. Background: 1 over the number of
    uncovered cells, on those cells.

    Boxes wholly outside the map cover nothing. A box with a non-finite coordinate or x2 < x1 makes its
    image's foreground NaN: no value is read on the host, so the fault shows in the loss. Batched over boxes,
    in chunks that bound the memory.

    >>> [(fg, bg)] = fgd_masks([torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [(64, 64)], [(8, 8)])
    >>> fg.count_nonzero().item(), fg.max().item()
    (4, 0.25)
    >>> round(bg.sum().item(), 6)
    1.0
    """
    if len(boxes) != len(sizes):
        raise ValueError(
            f"fgd_masks: expected one image size for each of the {len(boxes)} box lists, got {len(sizes)}"
        )
    if not boxes:
        return [(torch.zeros(0, *hw), torch.zeros(0, *hw)) for hw in maps]
    wrong = [(i, tuple(b.shape)) for i, b in enumerate(boxes) if b.ndim != 2 or b.shape[1] != 4]
    if wrong:
        raise ValueError(f"fgd_masks: boxes must be [n, 4] xyxy, got (image, shape): {wrong}")
    if any(min(s) < 1 for s in sizes) or any(min(m) < 1 for m in maps):
        raise ValueError(
            f"fgd_masks: image and map sizes (h, w) must be >= 1, got {list(sizes)} and {list(maps)}"
        )
    unit, present = _unit_boxes(boxes, sizes)
    return [_level_masks(unit, present, h, w) for h, w in maps]


def _unit_boxes(boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Boxes over their image's size, padded to ``[N, B, 4]``, and which are real. Never reads the device."""
    padded = pad_sequence([full(b) for b in boxes], batch_first=True)
    device = padded.device
    scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=padded.dtype, device="cpu").to(
        device, non_blocking=True
    )
    counts = torch.tensor([len(b) for b in boxes], device="cpu").to(device, non_blocking=True)
    present = torch.arange(padded.shape[1], device=device) < counts[:, None]
    return padded / scale[:, None, :], present


def _level_masks(unit: Tensor, present: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    n, count = present.shape
    x1, y1, x2, y2 = unit.unbind(-1)
    left, right = (x1 * w).floor(), (x2 * w).ceil()
    top, bottom = (y1 * h).floor(), (y2 * h).ceil()
    good = unit.isfinite().all(-1) & (x2 >= x1) & (y2 >= y1)
    weight = 1.0 / (bottom + 1 - top) / (right + 1 - left)
    weight = torch.where(good, weight, torch.nan).where(present, 0.0)
    xs = torch.arange(w, device=unit.device, dtype=unit.dtype)
    ys = torch.arange(h, device=unit.device, dtype=unit.dtype)
    columns = ((xs >= left[..., None]) & (xs <= right[..., None])).to(unit.dtype)
    rows = ((ys >= top[..., None]) & (ys <= bottom[..., None])) * weight[..., None]
    foreground = unit.new_zeros((n, h, w))
    step = max(1, _MASK_BUDGET // (n * h * w))
    for k in range(0, count, step):
        part = rows[:, k : k + step, :, None] * columns[:, k : k + step, None, :]
        foreground = torch.maximum(foreground, part.amax(1))
    free = (foreground == 0).to(unit.dtype)
    return foreground, free / free.sum((1, 2), keepdim=True).clamp_min(1.0)
