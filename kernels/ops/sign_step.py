"""One signed step of an image perturbation and its projection: the operation and its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import room
from .checks import FLOATING
from .frames import check_frames, check_small

OP = "sign_step"


def _forward(
    delta: Tensor,
    direction: Tensor | None,
    images: Tensor,
    moves: Tensor | None,
    frames: Tensor | None,
    step: list[float],
    radius: list[float],
    low: list[float],
    high: list[float],
    backend: str,
) -> Tensor:
    areas = None if frames is None else check_frames(OP, frames, images.shape[2:])
    module = room(OP, backend, delta.device, delta.dtype)
    out: Tensor = module.forward(delta, direction, images, moves, areas, step, radius, low, high)
    return out


_op = torch.library.custom_op("ikd_fast::sign_step", mutates_args=())(_forward)


@_op.register_fake
def _(delta, *rest):
    return torch.empty_like(delta)


def sign_step(
    delta: Tensor,
    direction: Tensor | None,
    images: Tensor,
    step: float | Sequence[float],
    *,
    radius: float | Sequence[float],
    low: float | Sequence[float],
    high: float | Sequence[float],
    frames: Tensor | None = None,
    moves: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""A step of a perturbation along the signs of ``direction``, back into the ball and the valid range; one launch on a GPU.

    .. math:: \delta' = \mathrm{clip}_{[\min(lo, x), \max(hi, x)]}\bigl(x + \mathrm{clip}_{\pm r}(\delta + s\,\mathrm{sign}(d))\bigr) - x

    for pixels x, and 0 on padding: the step of I-FGSM (Kurakin et al., "Adversarial Examples in the Physical World", 2017).
    A pixel that is itself beyond the range is not pulled into it. sign(0) = sign(NaN) = 0.

    Args:
        delta: ``[N, C, H, W]`` float32 or float64, which is also what is computed in; any strides.
        direction: the same shape, fp16, bf16, fp32 or (with a float64 ``delta``) fp64. None: no step, only the projection.
        images: the pixels x, shape and dtypes as ``direction``.
        step: s in the images' units, a number or one for each channel; negative descends. Unused without ``direction``.
        radius, low, high: r and the valid range, in the images' units: numbers, or one for each channel.
        frames: int64 ``[N, 2]``, (h, w) of the valid part at the top left; CPU. None: all of it.
        moves: bool ``[N]`` on the images' device: images of False take no step, whatever their direction holds; they are
            still projected. None: all of them move.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    Returns:
        A new ``[N, C, H, W]`` of ``delta``'s dtype. It has no gradient.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices than these, a tensor that requires a gradient while gradients are
            recorded, a number that is not finite, a negative radius, low > high, frames beyond an image: before any launch.

    >>> import torch
    >>> x, d = torch.tensor([0.0, 5.0, 250.0]).view(1, 1, 1, 3), torch.tensor([-1.0, 1.0, 1.0]).view(1, 1, 1, 3)
    >>> sign_step(torch.full_like(x, 3.0), d, x, 10, radius=8, low=0, high=255).flatten().tolist()
    [0.0, 8.0, 5.0]
    """
    _check_tensors(delta, direction, images, moves)
    n, channels = delta.shape[:2]
    named = (("step", step), ("radius", radius), ("low", low), ("high", high))
    steps, radii, lows, highs = (_per_channel(name, value, channels) for name, value in named)
    for c, (r, lo, hi) in enumerate(zip(radii, lows, highs, strict=True)):
        if r < 0 or lo > hi:
            raise ValueError(
                f"{OP}: channel {c}: expected radius >= 0 and low <= high, got radius={r}, low={lo}, high={hi}"
            )
    if frames is not None:
        check_small(OP, n, frames=(frames, (n, 2)))
    if delta.numel() == 0:
        return torch.empty_like(delta)
    call = _op if torch.compiler.is_compiling() else _forward
    return call(delta, direction, images, moves, frames, steps, radii, lows, highs, backend)


def _check_tensors(delta: Tensor, direction: Tensor | None, images: Tensor, moves: Tensor | None) -> None:
    if delta.dim() != 4 or delta.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{OP}: delta: expected float32 or float64 [N, C, H, W], got {delta.dtype} {list(delta.shape)}"
        )
    allowed = FLOATING if delta.dtype == torch.float64 else FLOATING[:3]
    for name, x in (("direction", direction), ("images", images)):
        if x is None:
            continue
        if x.shape != delta.shape or x.device != delta.device:
            raise ValueError(
                f"{OP}: {name}: expected {list(delta.shape)} on {delta.device} as delta, got {list(x.shape)} on {x.device}"
            )
        if x.dtype not in allowed:
            wanted = ", ".join(str(t) for t in allowed)
            raise TypeError(f"{OP}: {name}: expected {wanted} with a {delta.dtype} delta, got {x.dtype}")
    if torch.is_grad_enabled():
        for name, x in (("delta", delta), ("direction", direction), ("images", images)):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{OP}: {name} requires a gradient, which a step has not; write {name}.detach()"
                )
    if moves is not None and (
        moves.shape != delta.shape[:1] or moves.dtype != torch.bool or moves.device != delta.device
    ):
        raise ValueError(
            f"{OP}: moves: expected torch.bool {list(delta.shape[:1])} on {delta.device}, got {moves.dtype} "
            f"{list(moves.shape)} on {moves.device}"
        )


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    row = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
    if len(row) not in (1, channels) or not all(math.isfinite(v) for v in row):
        raise ValueError(
            f"{OP}: {name}: expected a finite number, or one for each of {channels} channels, got {value}"
        )
    return row * channels if len(row) == 1 else row
