"""What problems on pyramids share: maps, gradients, and the fields that say how much is moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .problem import Outputs, Problem, Scale, name_of


def random_pyramid(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    shapes = [(batch, scale.channels, h, w) for h, w in scale.levels()]
    return [torch.randn(shape, generator=g, device=device).to(dtype) for shape in shapes]


def _elements(scale: Scale, batch: int) -> int:
    return batch * scale.channels * sum(h * w for h, w in scale.levels())


def with_gradients(outputs: Outputs, upstream: Outputs, wanted: Outputs) -> list[Tensor]:
    grads = torch.autograd.grad(outputs, wanted, upstream)
    return [*(x.detach() for x in outputs), *grads]


def on_maps(op: str, scale: Scale, batch: int, dtype: torch.dtype) -> Callable[..., dict[str, Any]]:
    """The fields that all operations on two pyramids share."""
    one = _elements(scale, batch) * dtype.itemsize
    h, w = scale.image
    what = f"{batch}x{scale.channels} channels of {h}x{w}, {name_of(dtype)}"

    def fields(work: str, passes: float) -> dict[str, Any]:
        return dict(op=op, group=f"{work}, {what}", moved=int(passes * one), inputs=2 * one, maps=2 * one)

    return fields


PairOp = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def pair_problem(
    op: str,
    ours: PairOp,
    plain: PairOp,
    scale: Scale,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    work: str = "forward and backward",
    per_image: bool = True,
    squash: Callable[[Tensor], Tensor] | None = None,
    backward: bool = True,
    tolerance: float = 1e-5,
    targets: tuple[float, float] = (1.5, 1.0),
) -> Problem:
    """An operation on two pyramids beside ``plain``, eager and compiled; both give a value a level, or one an image of each.

    Args:
        plain: stays in float64 where it is given it: the truth.
        squash: into the range that the operation expects.
        tolerance: of float32; bf16 gradients are rounded to 8 bits, inside it is float32 either way.
        targets: over ``plain`` and over it compiled, for 2 images in float32.
    """
    levels = len(scale.strides)

    def make(seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        s, t = (random_pyramid(scale, batch, dtype, device, 2 * seed + i) for i in range(2))
        if squash is not None:
            s, t = ([squash(x) for x in maps] for maps in (s, t))
        weight = torch.rand((levels, batch) if per_image else levels, device=device)
        return [x.requires_grad_() for x in s], t, weight

    def run(f: PairOp) -> Callable[[Any], Outputs]:
        if backward:
            return lambda x: with_gradients([f(x[0], x[1])], [x[2]], x[0])
        return lambda x: [f([s.detach() for s in x[0]], x[1])]

    def truth(x: Any) -> Outputs:
        s = [m.detach().double().requires_grad_() for m in x[0]]
        return run(plain)((s, [t.double() for t in x[1]], x[2].double()))

    compiled = torch.compile(plain, dynamic=False, backend=scale.compiler)
    fast = backward and batch == 2 and dtype == torch.float32
    return Problem(
        **on_maps(op, scale, batch, dtype)(f"{op} {work}", 5 if backward else 2),
        make=make,
        ours=(op, run(ours)),
        peers={"PyTorch": run(plain)},
        compiled={"PyTorch, compiled": run(compiled)} if backward else {},
        reference=truth,
        tolerance=tolerance if dtype == torch.float32 or not backward else 4e-3,
        targets=dict(zip(("PyTorch", "PyTorch, compiled"), targets, strict=True)) if fast else {},
    )
