"""Structural dissimilarity of two pyramids: two launches forward, two backward.

Forward: every program sums the losses of a block of columns, rows and channels; a second launch adds the sums. Backward:
one launch keeps the loss's slopes in its three local moments at every element (float32), the other filters them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import check_index_space, empty, empty_like, launch
from .levels import fixed
from .pyramid import Grid, grid_of, strides_table
from .pyramid_l2 import FINISH_BLOCK, pyramid_distance_finish
from .ssim_kernels import ssim_adjoint, ssim_moments

OP = "ssim"
# Columns, rows and channels of a program's block.
TILE = 16
CONTIGUOUS, CHANNELS_LAST, STRIDED = 0, 1, 2


def _layout(maps: Sequence[Tensor]) -> int:
    if all(x.is_contiguous() for x in maps):
        return CONTIGUOUS
    last = all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    return CHANNELS_LAST if last else STRIDED


def _plan(
    student: Sequence[Tensor], window: int, sigma: float, data_range: float
) -> tuple[Grid, tuple, tuple[int, float, float], dict]:
    """The grid, the size arguments, the filter's numbers and the compile-time options of every launch."""
    channels, heights, widths = zip(*(x.shape[1:] for x in student), strict=True)
    for level, x in enumerate(student):
        check_index_space(OP, f"level {level}", x[0].numel() if len(x) else 0)
    sizes = zip(channels, heights, widths, strict=True)
    counts = [-(-c // TILE) * -(-h // TILE) * -(-w // TILE) for c, h, w in sizes]
    grid = grid_of(OP, counts, student[0].shape[0], 1)
    shape = tuple(fixed(v) for v in (grid.starts[:-1], grid.blocks, channels, heights, widths))
    radius = window // 2
    span = 32 if TILE + 2 * radius <= 32 else 64
    options = dict(
        LEVELS=len(student),
        TILE=TILE,
        SPAN=span,
        CHANNEL_LANES=int(_layout(student) == CHANNELS_LAST),
        num_warps=span // 8,  # with fewer, wide windows spill
        num_stages=1,
    )
    return grid, shape, (radius, -0.5 / sigma**2, 1.0 / data_range), options


def _constants() -> dict[str, float]:
    from ..reference.ssim import EPS, K1, K2

    return dict(C1=K1**2, C2=K2**2, EPS=EPS)


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], window: int, sigma: float, data_range: float
) -> Tensor:
    """float32 ``[L, N]``; see the reference."""
    device, n = student[0].device, student[0].shape[0]
    out = empty((len(student), n), torch.float32, device)
    grid, shape, numbers, options = _plan(student, window, sigma, data_range)
    partial = empty(grid.programs, torch.float32, device)
    layouts = _layout(student), _layout(teacher)
    launch(
        ssim_moments,
        grid.programs,
        device,
        tuple(student),
        tuple(teacher),
        strides_table(student, teacher) if STRIDED in layouts else partial,
        partial,
        *shape,
        *numbers,
        LAYOUT_S=layouts[0],
        LAYOUT_T=layouts[1],
        SLOPES=False,
        **_constants(),
        **options,
    )
    launch(
        pyramid_distance_finish,
        out.numel(),
        device,
        partial,
        out,
        *shape[:2],
        n,
        LEVELS=len(student),
        BLOCK=FINISH_BLOCK,
        num_warps=4,
    )
    return out


def backward(
    grad: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    window: int,
    sigma: float,
    data_range: float,
) -> list[Tensor]:
    """The gradient of every student map, in its dtype and layout."""
    device, n = student[0].device, student[0].shape[0]
    out = [empty_like(x) for x in student]
    slopes = tuple(empty((n, 3, *x.shape[1:]), torch.float32, device) for x in student)
    grid, shape, numbers, options = _plan(student, window, sigma, data_range)
    layouts = [_layout(maps) for maps in (student, teacher, out)]
    launch(
        ssim_moments,
        grid.programs,
        device,
        tuple(student),
        tuple(teacher),
        strides_table(student, teacher) if STRIDED in layouts[:2] else grad,
        slopes,
        *shape,
        *numbers,
        LAYOUT_S=layouts[0],
        LAYOUT_T=layouts[1],
        SLOPES=True,
        **_constants(),
        **options,
    )
    launch(
        ssim_adjoint,
        grid.programs,
        device,
        grad.contiguous(),
        tuple(student),
        tuple(teacher),
        slopes,
        strides_table(student, teacher, out) if STRIDED in layouts else grad,
        tuple(out),
        *shape,
        *numbers,
        n,
        LAYOUT_S=layouts[0],
        LAYOUT_T=layouts[1],
        LAYOUT_O=layouts[2],
        **{**options, "num_warps": 8},  # with 4, Triton 3.6 spills on sm_100
    )
    return out
