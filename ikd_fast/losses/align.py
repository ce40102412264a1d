"""Layers of a loss, run in the maps' precision whatever dtype their parameters are kept in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ikd_fast.kernels.reference.precision import no_autocast


def align_conv(student: int, teacher: int) -> nn.Conv2d:
    """Biased 1x1 convolution ``student -> teacher`` channels with the framework's default initialisation.

    >>> align_conv(64, 256)
    Conv2d(64, 256, kernel_size=(1, 1), stride=(1, 1))
    """
    return nn.Conv2d(student, teacher, kernel_size=1)


def apply_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution in ``x``'s dtype and outside autocast."""
    with no_autocast(x):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.conv2d(x, layer.weight.to(x.dtype), bias, layer.stride, layer.padding)


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The linear layer in ``x``'s dtype and outside autocast."""
    with no_autocast(x):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)


def apply_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """The layer normalisation in ``x``'s dtype and outside autocast."""
    with no_autocast(x):
        return F.layer_norm(
            x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps
        )
