"""The sums of focal and global distillation over a pyramid: the operation and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import check_backend, room
from .checks import check_pyramids, check_temperature, savable, working
from .once import differentiable_once

STEM = "fgd"


class FGDSums(NamedTuple):
    """Sums of every level and image of a pyramid of L levels, N images, C_l channels (not divided by N).

    ``terms`` ``[4, L, N]``: ``foreground`` (sum Mfg St Ct D^2), ``background`` (sum Mbg St Ct D^2), ``attention``
    (sum |Cs - Ct| + sum |Ss - St|), ``square`` (sum D^2), each also by its name as ``[L, N]``. ``vectors``
    ``[3, N sum C_l]``: the student's context vectors, the teacher's, and D summed over positions; ``[N, C_l]`` of
    every level, one after the other, which the other three properties take apart.
    """

    terms: Tensor
    vectors: Tensor
    channels: tuple[int, ...]

    @property
    def foreground(self) -> Tensor:
        return self.terms[0]

    @property
    def background(self) -> Tensor:
        return self.terms[1]

    @property
    def attention(self) -> Tensor:
        return self.terms[2]

    @property
    def square(self) -> Tensor:
        return self.terms[3]

    @property
    def student_context(self) -> list[Tensor]:
        return self._levels(0)

    @property
    def teacher_context(self) -> list[Tensor]:
        return self._levels(1)

    @property
    def channel(self) -> list[Tensor]:
        return self._levels(2)

    def _levels(self, row: int) -> list[Tensor]:
        n = self.terms.shape[2]
        parts = self.vectors[row].split([n * c for c in self.channels])
        return [part.view(n, c) for part, c in zip(parts, self.channels, strict=True)]


def _forward(
    student: list[Tensor],
    teacher: list[Tensor],
    student_weight: list[Tensor],
    teacher_weight: list[Tensor],
    boxes: Tensor,
    counts: list[int],
    sizes: list[int],
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = room(STEM, backend, student[0].device, working(student, teacher))
    inputs = (student, teacher, student_weight, teacher_weight)
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = chosen.forward(
        *inputs, boxes, counts, sizes, temperature
    )
    return out


def _backward(
    grad_terms: Tensor,
    grad_vectors: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    student_weight: list[Tensor],
    teacher_weight: list[Tensor],
    vectors: Tensor,
    maps: Tensor,
    factors: Tensor,
    scalars: Tensor,
    temperature: float,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    chosen = room(STEM, backend, student[0].device, working(student, teacher))
    inputs, saved = (student, teacher, student_weight, teacher_weight), (vectors, maps, factors, scalars)
    out: tuple[list[Tensor], Tensor] = chosen.backward(grad_terms, grad_vectors, *inputs, *saved, temperature)
    return out


# Registered for torch.compile and export. Eager mode calls the same functions through _Sums, which costs a
# fraction of the dispatcher's time for tensor lists.
_op = torch.library.custom_op("ikd_fast::fgd_sums", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::fgd_sums_backward", mutates_args=())(_backward)


@_op.register_fake
def _(student, teacher, student_weight, teacher_weight, boxes, counts, sizes, temperature, backend):
    n, levels = student[0].shape[0], len(student)
    channels = n * sum(x.shape[1] for x in student)
    positions = n * sum(x.shape[2] * x.shape[3] for x in student)
    shapes = ((4, levels, n), (3, channels), (5, positions), (2, channels), (10, levels, n))
    return tuple(student[0].new_empty(shape, dtype=working(student, teacher)) for shape in shapes)


@_op_backward.register_fake
def _(grad_terms, grad_vectors, student, teacher, student_weight, teacher_weight, vectors, *_):
    return [torch.empty_like(s) for s in student], vectors.new_empty((2, sum(s.shape[1] for s in student)))


def _save(
    ctx: Any, maps: Sequence[Tensor], levels: int, options: tuple[float, str], *outputs: Tensor
) -> None:
    ctx.save_for_backward(*maps, *outputs)
    ctx.channels, ctx.options = [x.shape[1] for x in maps[:levels]], options


def _restored(ctx: Any) -> list[Any]:
    """All that ``_backward`` takes after the gradients."""
    k, saved = len(ctx.channels), ctx.saved_tensors
    return [*(list(saved[i * k : (i + 1) * k]) for i in range(4)), *saved[4 * k :], *ctx.options]


def _by_level(ctx: Any, weights: Tensor) -> list[list[Tensor]]:
    return [list(row.split(ctx.channels)) for row in weights.unbind(0)]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    student, teacher, student_weight, teacher_weight, _, _, _, *options = inputs
    maps = (*student, *teacher, *student_weight, *teacher_weight)
    _save(ctx, maps, len(student), tuple(options), *output[1:])


def _gradient(ctx: Any, grad_terms: Tensor, grad_vectors: Tensor, *_: Any) -> tuple:
    grads, weights = _op_backward(grad_terms, grad_vectors, *_restored(ctx))
    return grads, [None] * len(grads), *_by_level(ctx, weights), None, None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        boxes: Tensor,
        counts: list[int],
        sizes: list[int],
        temperature: float,
        backend: str,
        levels: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        s, t, ws, wt = (list(tensors[i * levels : (i + 1) * levels]) for i in range(4))
        terms, vectors, *saved = _forward(s, t, ws, wt, boxes, counts, sizes, temperature, backend)
        _save(ctx, tensors, levels, (temperature, backend), vectors, *saved)
        return terms, vectors

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_terms: Tensor, grad_vectors: Tensor) -> tuple:
        grads, weights = _backward(grad_terms, grad_vectors, *_restored(ctx))
        student_weight, teacher_weight = _by_level(ctx, weights)
        return *[None] * 6, *grads, *[None] * len(grads), *student_weight, *teacher_weight


def fgd_sums(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    boxes: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    student_weight: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    temperature: float = 0.5,
    *,
    backend: str = "auto",
) -> FGDSums:
    """Every sum that FGD's four terms are made of, of all levels and images at once.

    St, Ct and Ss, Cs: attentions of ``fgd_attention``. Mfg, Mbg: weights of ``fgd_masks``, made in float32 where the
    maps are read. Context vectors: ``fgd_context``. Yang et al., CVPR 2022, in the published module's form.

    Args:
        student, teacher: maps ``[N, C, H, W]``, fp16, bf16, fp32 (summed in fp32) or fp64, contiguous,
            channels_last or any strides, each level of its own C, H, W; one dtype a side.
        boxes: ``[n_i, 4]`` xyxy of every image, on the maps' device.
        sizes: (h, w) of every image, in the unit of its boxes.
        student_weight, teacher_weight: ``[C]`` of every level: the context vectors' 1x1 convolution.
        temperature: of the attentions, > 0.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    Gradients go to the student maps, in their dtype, and to the weights of both sides, not to the teacher's
    attentions; they cannot be differentiated again. Repeats give the same bits. No value is read on the host: a box
    with a non-finite coordinate or x2 < x1 makes its image's foreground NaN.

    >>> maps = [torch.ones(1, 2, 4, 4)]
    >>> out = fgd_sums([3 * maps[0]], maps, [torch.zeros(0, 4)], [(32, 32)], [torch.zeros(2)], [torch.zeros(2)])
    >>> out.square, out.background  # D^2 = 4, weighted 1/16 at each of 2 x 16 elements
    (tensor([[128.]]), tensor([[8.]]))
    """
    check_backend("fgd_sums", backend)
    check_pyramids("fgd_sums", student, teacher)
    check_temperature("fgd_sums", temperature)
    _check_boxes(boxes, sizes, student[0])
    dtype = working(student, teacher)
    weights = [
        *_checked_weights("student_weight", student_weight, student, dtype),
        *_checked_weights("teacher_weight", teacher_weight, student, dtype),
    ]
    counts = [len(b) for b in boxes]
    flat = boxes[0] if len(boxes) == 1 else torch.cat(list(boxes)) if boxes else student[0].new_zeros(0, 4)
    flat, hw = flat.detach().float(), [int(v) for size in sizes for v in size]
    if torch.compiler.is_compiling():
        k = len(student)
        terms, vectors, *_ = _op(
            list(student),
            list(teacher),
            weights[:k],
            weights[k:],
            flat,
            counts,
            hw,
            float(temperature),
            backend,
        )
    else:
        terms, vectors = _Sums.apply(
            flat, counts, hw, float(temperature), backend, len(student), *student, *savable(teacher), *weights
        )
    return FGDSums(terms, vectors, tuple(x.shape[1] for x in student))


def _check_boxes(boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], like: Tensor) -> None:
    n = like.shape[0]
    if len(boxes) != n or len(sizes) != n:
        raise ValueError(
            f"fgd_sums: expected boxes and a size for each of {n} images, got {len(boxes)} and {len(sizes)}"
        )
    for i, (b, (h, w)) in enumerate(zip(boxes, sizes, strict=True)):
        if b.ndim != 2 or b.shape[1] != 4:
            raise ValueError(f"fgd_sums, image {i}: expected boxes [n,4] xyxy, got {tuple(b.shape)}")
        if b.device != like.device:
            raise ValueError(f"fgd_sums, image {i}: expected boxes on {like.device}, got {b.device}")
        if min(h, w) < 1:
            raise ValueError(f"fgd_sums, image {i}: expected a size (h, w) >= 1, got {(h, w)}")


def _checked_weights(
    name: str, weights: Sequence[Tensor], student: Sequence[Tensor], working: torch.dtype
) -> list[Tensor]:
    if len(weights) != len(student):
        raise ValueError(f"fgd_sums: expected {name} for {len(student)} levels, got {len(weights)}")
    for i, (v, x) in enumerate(zip(weights, student, strict=True)):
        if v.shape != (x.shape[1],) or v.device != x.device or not v.is_floating_point():
            raise ValueError(
                f"fgd_sums, level {i}: expected a floating-point {name} [{x.shape[1]}] on {x.device}, got {v.dtype} "
                f"{tuple(v.shape)} on {v.device}"
            )
    return [v.to(working) for v in weights]


def fgd_relation(square: Tensor, channel: Tensor, add: Tensor, positions: Tensor | int) -> Tensor:
    """``sum (S + a_S - T - a_T)^2`` over C, H, W from the sums; neither S + a_S nor T + a_T is made.

    ``square``: sum D^2, ``[...]``. ``channel``: D summed over the H*W ``positions``, ``[..., C]``. ``add``: a_S - a_T,
    ``[..., C]``. Equals sum D^2 + sum_c add_c (2 sum_hw D_c + H W add_c).

    >>> fgd_relation(torch.tensor(8.0), torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.0]), 2)
    tensor(18.)
    """
    return square + (add * (2.0 * channel + positions * add)).sum(-1)
