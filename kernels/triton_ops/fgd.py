"""Focal and global distillation on a GPU: three launches forward, two backward, whatever the levels, images and boxes.

Both maps are read from memory once each way. Partial sums of blocks of positions are added by a later launch, never
atomically, so that a repeat gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fgd_backward import fgd_backward
from .fgd_finish import fgd_combine, fgd_reduce, fgd_weights
from .fgd_forward import KINDS, STATS, fgd_forward
from .fgd_tiles import CHANNELS_LAST, CONTIGUOUS, STRIDED
from .launch import check_index_space, empty, empty_like, launch, table
from .levels import fixed
from .pyramid import strides_table

OP = "fgd_sums"
# Positions of a program.
BLOCK_P = 128


@dataclass(frozen=True)
class Tile:
    """Channels of a program's tile, warps, and how many tiles the first reading keeps in flight."""

    channels: int
    warps: int
    stages: int


# Positions innermost: 8 elements a thread, one 16-byte access in half precision; the first reading waits on memory
# alone, so two tiles are fetched ahead. Channels innermost: 16 elements a thread, or 32 where registers allow, so that
# more of a sum over positions stays within a thread; none are left to fetch ahead.
ROWS, LAST, LAST_WIDE, ANY = Tile(16, 8, 3), Tile(32, 8, 1), Tile(32, 4, 1), Tile(16, 8, 1)
# Boxes looked at together.
BLOCK_B = 16
# Of the finishing launches: blocks' statistics read at once; channels, blocks and positions of a part.
FINISH = dict(BLOCK=256, PART_C=8, BLOCK_N=32, PART_P=1024)
WEIGHTS_PART_C = 16


class _Plan:
    """Sizes of a pyramid as kernels take them."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        shapes = [tuple(x.shape) for x in maps]
        for level, (_, c, h, w) in enumerate(shapes):
            check_index_space(OP, f"level {level}", c * h * w, BLOCK_P * max(c, LAST.channels))
        self.images, self.levels = shapes[0][0], len(shapes)
        self.channels = [c for _, c, _, _ in shapes]
        self.positions = [h * w for _, _, h, w in shapes]
        self.blocks = [-(-p // BLOCK_P) for p in self.positions]
        self.programs = self.images * sum(self.blocks)
        self.rows = self.images * sum(b * c for b, c in zip(self.blocks, self.channels, strict=True))
        self.vector_size = self.images * sum(self.channels)
        self.map_size = self.images * sum(self.positions)
        self.sizes = tuple(fixed([shape[i] for shape in shapes]) for i in (1, 2, 3))

    def parts(self) -> int:
        """Programs of the launch that reduces over blocks."""
        c, p = FINISH["PART_C"], FINISH["PART_P"]
        return self.images * sum(
            -(-channels // c) + -(-positions // p)
            for channels, positions in zip(self.channels, self.positions, strict=True)
        )


def _layout(maps: Sequence[Tensor]) -> int:
    if all(x.is_contiguous() for x in maps):
        return CONTIGUOUS.value
    if all(x.is_contiguous(memory_format=torch.channels_last) for x in maps):
        return CHANNELS_LAST.value
    return STRIDED.value


def _tile(layout: int, wide: bool) -> dict[str, int]:
    if layout == CONTIGUOUS.value:
        tile = ROWS
    elif layout == CHANNELS_LAST.value:
        tile = LAST_WIDE if wide else LAST
    else:
        tile = ANY
    return dict(BLOCK_C=tile.channels, STAGES=tile.stages, num_warps=tile.warps)


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
    """float32 terms ``[4, L, N]``, vectors ``[3, R]`` and what the backward wants; see the reference."""
    plan, device = _Plan(student), student[0].device
    n, levels = plan.images, plan.levels

    def buffer(*shape: int) -> Tensor:
        return empty(shape, torch.float32, device)

    terms, scalars = buffer(4, levels, n), buffer(10, levels, n)
    vectors, factors, work = (buffer(k, plan.vector_size) for k in (3, 2, 5))
    maps, stats = buffer(5, plan.map_size), buffer(STATS, plan.programs)
    partial = buffer(KINDS.value * plan.rows)
    first = [sum(counts[:i]) for i in range(n)]
    images = table(list(zip(first, counts, sizes[::2], sizes[1::2], strict=True)), torch.int32, device)
    layouts = _layout(student), _layout(teacher)
    strides = strides_table(student, teacher, student) if STRIDED.value in layouts else images
    launch(
        fgd_forward,
        plan.programs,
        device,
        tuple(student),
        tuple(teacher),
        tuple(x.contiguous() for x in student_weight),
        tuple(x.contiguous() for x in teacher_weight),
        boxes.contiguous(),
        images,
        strides,
        maps,
        stats,
        partial,
        *plan.sizes,
        n,
        plan.map_size,
        plan.programs,
        temperature,
        LEVELS=levels,
        S_LAYOUT=layouts[0],
        T_LAYOUT=layouts[1],
        BLOCK_B=BLOCK_B,
        BLOCK_P=BLOCK_P,
        **_tile(layouts[0], wide=student[0].element_size() == 2),
    )
    launch(
        fgd_reduce,
        plan.parts(),
        device,
        maps,
        stats,
        partial,
        vectors,
        work,
        *plan.sizes,
        n,
        plan.map_size,
        plan.programs,
        plan.vector_size,
        LEVELS=levels,
        BLOCK_P=BLOCK_P,
        **FINISH,
        num_warps=4,
    )
    launch(
        fgd_combine,
        levels * n,
        device,
        stats,
        work,
        terms,
        factors,
        scalars,
        *plan.sizes,
        n,
        plan.programs,
        plan.vector_size,
        temperature,
        LEVELS=levels,
        BLOCK_P=BLOCK_P,
        PART_P=FINISH["PART_P"],
        BLOCK=FINISH["BLOCK"],
        num_warps=4,
    )
    return terms, vectors, maps, factors, scalars


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
    plan, device = _Plan(student), student[0].device
    out = [empty_like(x) for x in student]
    partial = empty(2 * plan.rows, torch.float32, device)
    weights = empty((2, sum(plan.channels)), torch.float32, device)
    layouts = _layout(student), _layout(teacher), _layout(out)
    strides = strides_table(student, teacher, out) if STRIDED.value in layouts else scalars
    launch(
        fgd_backward,
        plan.programs,
        device,
        tuple(student),
        tuple(teacher),
        tuple(out),
        tuple(x.contiguous() for x in student_weight),
        strides,
        grad_terms.contiguous(),
        grad_vectors.contiguous(),
        vectors,
        maps,
        factors,
        scalars,
        partial,
        *plan.sizes,
        plan.images,
        plan.map_size,
        plan.vector_size,
        temperature,
        LEVELS=plan.levels,
        S_LAYOUT=layouts[0],
        T_LAYOUT=layouts[1],
        G_LAYOUT=layouts[2],
        BLOCK_P=BLOCK_P,
        **_tile(layouts[0], wide=False),
    )
    launch(
        fgd_weights,
        2 * sum(-(-c // WEIGHTS_PART_C) for c in plan.channels),
        device,
        partial,
        weights,
        *plan.sizes,
        plan.images,
        sum(plan.channels),
        LEVELS=plan.levels,
        BLOCK_P=BLOCK_P,
        BLOCK_N=FINISH["BLOCK_N"],
        PART_C=WEIGHTS_PART_C,
        num_warps=4,
    )
    return out, weights
