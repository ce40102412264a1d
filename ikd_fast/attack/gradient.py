"""The gradient of an attack's objective, kept inside float16's range where float16 is on its way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import nan_watch

# float16 ends at 6e-8 below and 65504 above. A detector's class loss is divided by its boxes and passes heads of small weights:
# its gradients need the upper end. Where that overflows (a steep loss, a deep net), less is tried, and at last none.
HALF_SCALES = (2.0**15, 2.0**8, 1.0)


def attack_gradient(
    value: Any, x: Tensor, images: Tensor, ids: Sequence[int], *, half: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Gradient of an objective at x ``[N, C, H, W]``, the value (detached), and how many backward passes it took.

    Args:
        value: what the objective gave: ``[N]``, or a scalar summed over independent images.
        images: the batch as the user gave it; its dtype says whether gradients may pass through float16.
        ids: of the images, for messages.
        half: the victim says that its gradient passes through float16 (``victim.gradients_in_half``).

    Raises:
        ValueError: the value does not depend on x, has another shape, or is NaN (on a device that is found without waiting, so
            it may be raised by a later call).
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the objective must be a Tensor, [N] or a scalar, got {type(value).__name__}: {value!r:.100}"
        )
    if not value.requires_grad:
        raise _independent(value)
    if value.dim() > 1 or (value.dim() == 1 and len(value) != len(x)):
        raise ValueError(
            f"the objective must be [N] = [{len(x)}] or a scalar, one value an image or their sum, got shape {list(value.shape)}"
        )
    half = half or in_half(images, value)
    if not half:
        nan_watch.look(value, ids)
    grad, passes = image_gradient(value, x, half=half)
    if grad is None:
        raise _independent(value)
    return grad, value.detach(), passes


def _independent(value: Any) -> ValueError:
    return ValueError(
        "the objective does not depend on the images: the victim must keep the graph (no torch.no_grad, no .detach()) and return a "
        f"Tensor, got {value!r}"
    )


def in_half(images: Tensor, value: Tensor) -> bool:
    """Whether gradients may pass through float16: under its autocast, or with images or an objective of that type."""
    kind = value.device.type
    if torch.float16 in (images.dtype, value.dtype):
        return True
    return (
        torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) == torch.float16
    )


def image_gradient(value: Tensor, x: Tensor, *, half: bool) -> tuple[Tensor | None, int]:
    """d value.sum() / dx ``[N, C, H, W]`` (None where value does not depend on x), and how many backward passes it took.

    ``half``: the value is scaled by a power of two before the pass and the result scaled back, which is exact in x's own type.
    Images whose gradient overflows by it take theirs from a further pass with a smaller scale; to see that, each pass waits for
    the device.

    >>> x = torch.ones(1, 1, 1, 2, requires_grad=True)
    >>> image_gradient((x.half() * 2**-15 * 2**-13).float().sum(), x, half=False)[0].flatten().tolist()
    [0.0, 0.0]
    >>> image_gradient((x.half() * 2**-15 * 2**-13).float().sum(), x, half=True)[0].flatten().tolist() == [2**-28] * 2
    True
    """
    total = value.sum()
    if not half:
        return torch.autograd.grad(total, x, allow_unused=True)[0], 1
    grad = torch.full_like(x, float("nan"), requires_grad=False)
    passes = 0
    for scale in HALF_SCALES:
        slope, again = total.new_full((), scale), scale != HALF_SCALES[-1]
        scaled: Tensor | None = torch.autograd.grad(total, x, slope, retain_graph=again, allow_unused=True)[0]
        passes += 1
        if scaled is None:
            return None, passes
        grad = torch.where(_finite(grad), grad, scaled / scale)
        if bool(_finite(grad).all()):
            break
    return grad, passes


def _finite(grad: Tensor) -> Tensor:
    """``[N, 1, 1, 1]``: of each image, whether all of it is."""
    return grad.isfinite().all(3, True).all(2, True).all(1, True)
