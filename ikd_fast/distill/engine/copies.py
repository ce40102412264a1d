"""The engine's copy of a net: shared where nothing changes, folded and cast where asked."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .pairs import CONVOLUTIONS, Pair, plain

LAYERS = (*CONVOLUTIONS, nn.Linear)


def shared_copy(net: nn.Module) -> nn.Module:
    """Other modules, the same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return copy.deepcopy(net, memo)


def fold(net: nn.Module, pairs: Iterable[Pair]) -> None:
    """Make each norm part of its convolution, in place; computed in float64, kept in the convolution's dtype.

    .. math:: w' = w \\gamma / \\sqrt{v + \\epsilon}, \\quad b' = (b - m) \\gamma / \\sqrt{v + \\epsilon} + \\beta
    """
    folded = set()
    for pair in pairs:
        conv: Any = net.get_submodule(pair.conv)
        norm: Any = net.get_submodule(pair.norm)
        tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        w, b, mean, var, gamma, beta = (None if t is None else t.detach().double() for t in tensors)
        arguments: Any = (w, b, mean, var, norm.eps, gamma, beta, conv.transposed)
        weight, bias = fuse_conv_bn_weights(*arguments)
        dtype = conv.weight.dtype
        conv.weight, conv.bias = _fixed(weight.to(dtype)), _fixed(bias.to(dtype))
        folded.add(norm)
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):  # a shared norm under each of its names
            if child in folded:
                setattr(parent, name, nn.Identity())


def cast_layers(net: nn.Module, dtype: torch.dtype) -> None:
    """Weights of convolutions and linear layers in ``dtype``, in place; all others stay."""
    module: Any
    for module in net.modules():
        if plain(module, LAYERS):
            module.weight = _fixed(module.weight.detach().to(dtype))
            if module.bias is not None:
                module.bias = _fixed(module.bias.detach().to(dtype))


def lay_out(net: nn.Module) -> None:
    """Weights of 2-D convolutions channels last, in place of the modules' own."""
    module: Any
    for module in net.modules():
        if plain(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.weight = _fixed(module.weight.detach().contiguous(memory_format=torch.channels_last))


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
