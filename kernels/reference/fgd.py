"""Focal and global distillation: attentions, context vectors, and the sums that its four terms are made of.

Yang et al., "Focal and global knowledge distillation for detectors", CVPR 2022, in the form of the published
module. ``forward`` and ``backward`` read a map in blocks of positions that stay in a CPU's caches, by matrix-vector
products and elementwise passes alone: nothing the size of a map is made but the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import check_temperature
from .fgd_masks import fgd_masks
from .precision import full, no_autocast

# Elements of a map worked on at once, 1 MiB in float32.
_BLOCK_BUDGET = 1 << 18


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
    # The 1-norm sums magnitudes without storing |x|. It adds one by one, so the long sum over positions goes row by
    # row: one pass over 16800 positions errs by 7e-6, this by 2e-7.
    over_channels = torch.linalg.vector_norm(x, 1, dim=1).flatten(1) / c
    over_positions = torch.linalg.vector_norm(x, 1, dim=3).sum(-1) / (h * w)
    spatial = (over_channels / temperature).softmax(-1) * (h * w)
    channel = (over_positions / temperature).softmax(-1) * c
    return spatial.view(n, h, w), channel


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


class Saved(NamedTuple):
    """What ``backward`` wants beside the maps. M: positions of all levels and images. R: their channels."""

    maps: Tensor  # [5, M]: exponents of Ss, St, student and teacher context shares; foreground weight
    factors: Tensor  # [2, R]: Ct; gradient of sum |Cs - Ct| by |S|, the same at every position
    scalars: (
        Tensor  # [10, L, N]: maxima of the exponents, sums of their exponentials, slope, background cells
    )


def forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_weight: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    boxes: Tensor,
    counts: Sequence[int],
    sizes: Sequence[int],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Terms ``[4, L, N]`` (foreground, background, attention, square), vectors ``[3, R]``, and ``Saved``.

    ``vectors`` are the student's context, the teacher's, and the sum of D over positions: level by level, ``[N, C]``
    each. ``boxes`` are those of all images, ``counts[n]`` of image n; ``sizes`` are h0, w0, h1, w1, ...
    """
    n, like = student[0].shape[0], full(student[0].new_empty(0)) + full(teacher[0].new_empty(0))
    masks = fgd_masks(
        boxes.split(list(counts)),
        list(zip(sizes[::2], sizes[1::2], strict=True)),
        [(max(x.shape[2], 1), max(x.shape[3], 1)) for x in student],  # a level of no elements is passed over
    )
    rows = n * sum(x.shape[1] for x in student)
    terms = like.new_zeros((4, len(student), n))
    vectors = like.new_zeros((3, rows))
    saved = Saved(
        like.new_zeros((5, sum(n * x.shape[2] * x.shape[3] for x in student))),
        like.new_zeros((2, rows)),
        like.new_zeros((10, len(student), n)),
    )
    with no_autocast(like):
        for level, i, channels, positions in _images(student):
            s, t = student[level][i].flatten(1), teacher[level][i].flatten(1)
            if s.numel() == 0:
                continue
            maps, factors, scalars = (
                saved.maps[:, positions],
                saved.factors[:, channels],
                saved.scalars[:, level, i],
            )
            maps[4] = masks[level][0][i].flatten()
            weights = student_weight[level], teacher_weight[level]
            terms[:, level, i] = _image_forward(
                s, t, weights, vectors[:, channels], maps, factors, scalars, temperature
            )
    return terms, vectors, *saved


def _images(student: Sequence[Tensor]) -> Iterator[tuple[int, int, slice, slice]]:
    """Level, image, and their places among all channels and all positions."""
    channel = position = 0
    for level, x in enumerate(student):
        for i in range(x.shape[0]):
            c, p = x.shape[1], x.shape[2] * x.shape[3]
            yield level, i, slice(channel, channel + c), slice(position, position + p)
            channel, position = channel + c, position + p


def _blocks(x: Tensor) -> Iterator[slice]:
    c, p = x.shape
    step = p if x.device.type != "cpu" else max(64, _BLOCK_BUDGET // c)
    return (slice(k, min(p, k + step)) for k in range(0, p, step))


def _image_forward(
    s: Tensor,
    t: Tensor,
    weights: tuple[Tensor, Tensor],
    vectors: Tensor,
    maps: Tensor,
    factors: Tensor,
    scalars: Tensor,
    temperature: float,
) -> Tensor:
    """One image of one level, ``[C, P]``: its four terms; fills the other outputs."""
    (c, p), work = s.shape, vectors.dtype
    means = vectors.new_zeros((2, c))
    for block in _blocks(s):
        for side, x in enumerate((s, t)):
            x = x[:, block].to(work)
            magnitude = x.abs()
            maps[side, block] = magnitude.sum(0)
            means[side] += magnitude.sum(1)
            maps[2 + side, block] = weights[side] @ x
    maps[:2] /= c * temperature
    top = maps[:4].amax(1, keepdim=True)
    share = (maps[:4] - top).exp_()
    total = share.sum(1, keepdim=True)
    share /= total
    spatial_s, spatial_t = share[:2] * p
    free = (maps[4] == 0).to(work)
    cells = free.sum()
    focus = torch.stack([maps[4], free / cells.clamp_min(1.0)]) * spatial_t
    errors = vectors.new_zeros((3, c))
    for block in _blocks(s):
        x, y = s[:, block].to(work), t[:, block].to(work)
        vectors[0] += x @ share[2, block]
        vectors[1] += y @ share[3, block]
        d = x - y
        vectors[2] += d.sum(1)
        d.square_()
        errors[0] += d @ focus[0, block]
        errors[1] += d @ focus[1, block]
        errors[2] += d.sum(1)
    channel_s, channel_t = (means / (p * temperature)).softmax(1) * c
    spatial, channel = spatial_s - spatial_t, channel_s - channel_t
    side = channel.sign()
    factors[0] = channel_t
    factors[1] = channel_s * (side - (side @ channel_s) / c) / (p * temperature)
    scalars[:8] = torch.cat([top, total]).flatten()
    scalars[8] = (spatial.sign() @ spatial_s) / p
    scalars[9] = cells
    return torch.stack(
        [
            errors[0] @ channel_t,
            errors[1] @ channel_t,
            spatial.abs().sum() + channel.abs().sum(),
            errors[2].sum(),
        ]
    )


def backward(
    grad_terms: Tensor,
    grad_vectors: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_weight: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    vectors: Tensor,
    maps: Tensor,
    factors: Tensor,
    scalars: Tensor,
    temperature: float,
) -> tuple[list[Tensor], Tensor]:
    """The gradient of every student map, in its dtype and layout, and ``[2, sum C]`` of the context weights."""
    grads = [torch.empty_like(x) for x in student]
    weights = vectors.new_zeros((2, sum(x.shape[1] for x in student)))
    per_level = weights.split([x.shape[1] for x in student], 1)
    with no_autocast(vectors):
        for level, i, channels, positions in _images(student):
            if student[level].numel() == 0:
                continue
            out = grads[level][i]
            grad = out.flatten(1)
            _image_backward(
                student[level][i].flatten(1),
                teacher[level][i].flatten(1),
                student_weight[level],
                grad_terms[:, level, i],
                grad_vectors[:, channels],
                vectors[:, channels],
                Saved(maps[:, positions], factors[:, channels], scalars[:, level, i]),
                temperature,
                grad,
                per_level[level],
            )
            if grad.data_ptr() != out.data_ptr():  # rows with gaps between them cannot be viewed as one
                out.copy_(grad.view(out.shape))
    return grads, weights


def _image_backward(
    s: Tensor,
    t: Tensor,
    weight: Tensor,
    grad_terms: Tensor,
    grad_vectors: Tensor,
    vectors: Tensor,
    saved: Saved,
    temperature: float,
    out: Tensor,
    out_weights: Tensor,
) -> None:
    (c, p), work = s.shape, vectors.dtype
    top, total = saved.scalars[:8].view(2, 4, 1)
    spatial_s, spatial_t, share_s, share_t = (saved.maps[:4] - top).exp_() / total
    fg, bg, attention, square = grad_terms
    foreground = saved.maps[4]
    # Twice: the derivative of D^2.
    error = 2.0 * p * spatial_t * (fg * foreground + bg * (foreground == 0) / saved.scalars[9].clamp_min(1.0))
    side = (spatial_s - spatial_t).sign_()
    spatial_slope = attention * p * spatial_s * (side - saved.scalars[8]) / (c * temperature)
    channel_slope = (attention * saved.factors[1])[:, None]
    channel_t, twice = saved.factors[0][:, None], (2.0 * square)[None, None]
    by_channel = torch.stack([grad_vectors[2], grad_vectors[0], weight], 1)
    mean_s, mean_t = (grad_vectors[:2] * vectors[:2]).sum(1)
    for block in _blocks(s):
        x, y = s[:, block].to(work), t[:, block].to(work)
        scores_s = share_s[block] * (grad_vectors[0] @ x - mean_s)
        scores_t = share_t[block] * (grad_vectors[1] @ y - mean_t)
        out_weights[0] += x @ scores_s
        out_weights[1] += y @ scores_t
        d = x - y
        d *= torch.addcmul(twice, channel_t, error[block])
        d.addcmul_(x.sign(), channel_slope + spatial_slope[block])
        by_position = torch.stack([torch.ones_like(scores_s), share_s[block], scores_s])
        out[:, block] = d.addmm_(by_channel, by_position)
