"""Focal and global distillation: attentions, box masks and the sums its four terms are made of.

Yang et al., "Focal and global knowledge distillation for detectors", CVPR 2022, in the form of the published
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .precision import check_pyramids, check_temperature, full, no_autocast

# Elements of the [N, boxes, H, W] product held at once: 16 MiB in float32.
_MASK_BUDGET = 1 << 22


class FGDSums(NamedTuple):
    """Sums of one level over its whole batch (not divided by N), and what the relation term needs."""

    foreground: Tensor  # scalar: sum Mfg St Ct D^2
    background: Tensor  # scalar: sum Mbg St Ct D^2
    attention: Tensor  # scalar: sum |Cs - Ct| + sum |Ss - St|
    student_context: Tensor  # [N, C]
    teacher_context: Tensor  # [N, C]
    square: Tensor  # scalar: sum D^2
    channel: Tensor  # [N, C]: sum over h, w of D


def fgd_attention(x: Tensor, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """Spatial ``[N, H, W]`` and channel ``[N, C]`` attention of a map ``[N, C, H, W]``; the means are 1.

    Spatial: ``H W softmax_hw(mean_c |x| / temperature)``. Channel: ``C softmax_c(mean_hw |x| /
    temperature)``.

    >>> spatial, channel = fgd_attention(torch.rand(1, 8, 4, 6))
    >>> round(spatial.mean().item(), 5), round(channel.sum().item(), 4)
    (1.0, 8.0)
    """
    check_temperature("fgd_attention", temperature)
    n, c, h, w = x.shape
    x = full(x)
    # The 1-norm sums magnitudes without storing |x|, in about 0.6 of the time on a CPU. It adds one by one, so the
    # long sum over positions goes row by row: one pass over 16800 positions errs by 7e-6, this by 2e-7.
    over_channels = torch.linalg.vector_norm(x, 1, dim=1).flatten(1) / c
    over_positions = torch.linalg.vector_norm(x, 1, dim=3).sum(-1) / (h * w)
    spatial = (over_channels / temperature).softmax(-1) * (h * w)
    channel = (over_positions / temperature).softmax(-1) * c
    return spatial.view(n, h, w), channel


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
    scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=padded.dtype).to(device, non_blocking=True)
    counts = torch.tensor([len(b) for b in boxes]).to(device, non_blocking=True)
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


def fgd_context(x: Tensor, weight: Tensor) -> Tensor:
    """Context vector ``[N, C]``: the map averaged with the softmax over H*W of ``sum_c weight_c x_c``.

    ``weight`` is ``[C]``. A bias of that 1x1 convolution would cancel in the softmax, so there is none.

    >>> fgd_context(torch.ones(2, 3, 4, 4), torch.randn(3)).shape
    torch.Size([2, 3])
    """
    x = full(x).flatten(2)
    with no_autocast(x):
        share = (weight.to(x.dtype) @ x).softmax(-1)
        return (x @ share[..., None]).squeeze(-1)


def fgd_sums(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[tuple[Tensor, Tensor]],
    student_weight: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    temperature: float = 0.5,
) -> list[FGDSums]:
    """The sums of every level: maps ``[N, C, H, W]``, ``masks`` of ``fgd_masks``, ``[C]`` context weights.

    Gradients go to the student maps and to the weights of both sides; the teacher's attentions weigh D^2
    without one.
    """
    check_pyramids("fgd_sums", student, teacher)
    check_temperature("fgd_sums", temperature)
    rest = (masks, student_weight, teacher_weight)
    if any(len(r) != len(student) for r in rest):
        raise ValueError(
            f"fgd_sums: expected masks and weights for {len(student)} levels, got {[len(r) for r in rest]}"
        )
    return [
        _level_sums(full(s), full(t), *m, ws, wt, temperature)
        for s, t, m, ws, wt in zip(student, teacher, *rest, strict=True)
    ]


def _level_sums(
    s: Tensor, t: Tensor, foreground: Tensor, background: Tensor, ws: Tensor, wt: Tensor, temperature: float
) -> FGDSums:
    spatial_s, channel_s = fgd_attention(s, temperature)
    spatial_t, channel_t = fgd_attention(t, temperature)
    d = (s - t).flatten(2)
    channel_t = channel_t.to(d.dtype)
    with no_autocast(s):
        # One product reads D^2 once and gives both the attention-weighted and the plain sum over channels.
        weights = torch.stack([channel_t, torch.ones_like(channel_t)], 1)
        weighted, plain = (weights @ d.square()).unbind(1)
    focus = spatial_t.flatten(1) * weighted
    return FGDSums(
        foreground=(foreground.to(d.dtype).flatten(1) * focus).sum(),
        background=(background.to(d.dtype).flatten(1) * focus).sum(),
        attention=(channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum(),
        student_context=fgd_context(s, ws),
        teacher_context=fgd_context(t, wt),
        square=plain.sum(),
        channel=d.sum(-1),
    )


def fgd_relation(sums: FGDSums, add: Tensor, positions: int) -> Tensor:
    """``sum (S + a_S - T - a_T)^2`` from the sums; ``add`` is a_S - a_T ``[N, C]``, ``positions`` is H*W.

    Equals sum D^2 + 2 sum_c add_c sum_hw D_c + H W sum add^2: neither R(S) nor R(T) is made.
    """
    return sums.square + 2.0 * (add * sums.channel).sum() + positions * add.square().sum()
