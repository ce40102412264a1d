"""A signed gradient step of packed perturbations: the operation and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.delta_codes import CellMap, DeltaCodes
from .apply_delta import check_cells
from .backend import check_backend, room
from .checks import FLOATING

OP, STEM = "fgsm_step_packed", "fgsm_step"


def _forward(
    gradient: Tensor,
    records: list[Tensor],
    cells: list[int],
    x_span: list[Tensor],
    y_span: list[Tensor],
    bits: int,
    levels: int,
    spacing: float,
    step: Tensor,
    backend: str,
) -> list[Tensor]:
    module = room(STEM, backend, gradient.device, gradient.dtype)
    out: list[Tensor] = module.forward(gradient, records, cells, x_span, y_span, bits, levels, spacing, step)
    return out


_op = torch.library.custom_op("ikd_fast::fgsm_step_packed", mutates_args=())(_forward)


@_op.register_fake
def _(gradient, records, cells, x_span, y_span, bits, levels, spacing, step, backend):
    return [torch.empty_like(x) for x in records]


def fgsm_step_packed(
    gradient: Tensor,
    records: Sequence[Tensor],
    maps: Sequence[CellMap],
    codes: DeltaCodes,
    step: Tensor,
    *,
    backend: str = "auto",
) -> list[Tensor]:
    r"""One projected step of every cell on the sign of its gradient, packed again: one launch for the batch on a GPU.

    .. math:: \delta \leftarrow \mathrm{clip}_{\pm limit}\Big(\delta + step_n\,\mathrm{sign} \sum_{y, x} g_{y, x}\Big)

    The sum runs over the cell's span in float32 (float64 of float64), rows outside, columns inside; sign(0) = 0. Every
    value is a level, so the step is taken in whole levels: the nearest number of them, halves away from 0.

    Args:
        gradient: ``[N, C, H, W]``, fp16, bf16, fp32 or fp64, in the (padded) frame of the view that was differentiated.
        records: N records of ``codes``, on the gradient's device.
        maps: N :class:`CellMap` whose frame is (H, W).
        step: float32 ``[N]``, signed grey levels, on the gradient's device. 0 leaves an image's record as it is bit for bit,
            whatever its gradient holds.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    Returns:
        N new records. A cell without a span keeps its code. There is no gradient.

    Raises:
        ValueError, TypeError: other dtypes, devices or shapes than these, a record or map of another size, an image of
            2**31 elements: before any launch.

    >>> codes = DeltaCodes.of(eps=8, step=2)
    >>> cell, span = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    >>> view = CellMap((2, 2), cell, cell, span, span)
    >>> record = codes.pack(codes.encode(torch.tensor([[[0.0, 8.0], [0.0, -4.0]]])))
    >>> gradient = torch.tensor([[[[0.1, 3.0], [0.0, -0.2]]]])
    >>> new = fgsm_step_packed(gradient, [record], [view], codes, torch.tensor([2.0]))
    >>> codes.decode(codes.unpack(new[0], (1, 2, 2))).tolist()
    [[[2.0, 8.0], [0.0, -6.0]]]
    """
    check_backend(OP, backend)
    check_cells(OP, "gradient", gradient, records, maps, codes, FLOATING)
    n = len(gradient)
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or tuple(step.shape) != (n,):
        got = f"{step.dtype} {list(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise ValueError(f"{OP}: step: expected float32 [{n}], one number of grey levels an image, got {got}")
    if step.device != gradient.device:
        raise ValueError(
            f"{OP}: step: expected {gradient.device} as the gradient, got {step.device}; write step.to(gradient.device)"
        )
    run: Any = _op if torch.compiler.is_compiling() else _forward
    out: list[Tensor] = run(
        gradient, list(records), [n for m in maps for n in m.cells], [m.x_span for m in maps],
        [m.y_span for m in maps], codes.bits, codes.levels, codes.spacing, step, backend,
    )  # fmt: skip
    return out
