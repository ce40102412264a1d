"""Square roots that losses differentiate where they are 0."""

from __future__ import annotations

from torch import Tensor

# Of a sum of squares: what lies below has no direction left in float32.
_TINY = 1e-24


def safe_sqrt(square: Tensor) -> Tensor:
    """The root of a sum of squares; 0 with gradient 0 where it is 0, NaN where it is NaN.

    A norm has no gradient at 0, and autograd's is NaN. Taking 0, the norm's smallest subgradient, keeps the value
    exact everywhere, where ``sqrt(x + eps)`` would not be 0 at 0.

    >>> import torch
    >>> safe_sqrt(torch.tensor([0.0, 9.0]))
    tensor([0., 3.])
    """
    zero = square <= _TINY  # not `square > _TINY`: that is false of NaN
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
