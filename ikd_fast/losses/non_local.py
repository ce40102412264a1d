"""The non-local block of FKD, and batch normalisation in the maps' precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikd_fast.kernels.reference.precision import no_autocast

from .align import apply_conv


class NonLocal(nn.Module):
    """``X + BN(W y)``, where y gathers from all positions by dot products: a non-local block without softmax.

    With 1x1 convolutions theta, phi, g of C -> inner channels and phi(X), g(X) max-pooled k x k (stride k, floor) to
    K positions: ``y = theta(X)^T phi(X) / K  g(X)``, W a 1x1 convolution inner -> C. Wang et al., "Non-local neural
    networks", CVPR 2018, its dot-product form, as FKD takes it. The normalisation's scale and shift start at 0, so
    that the block is the identity at first.

    The product is taken from the right, ``theta(X)^T (phi(X) g(X)^T / K)``: equal, and it makes an inner x inner
    matrix in place of H W x K. On a map lower or narrower than k the pool takes its smaller side instead.

    >>> block = NonLocal(channels=8, inner=4, pool=2)
    >>> x = torch.rand(2, 8, 6, 6)
    >>> torch.equal(block(x), x)
    True
    """

    def __init__(self, channels: int, inner: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        size = min(self.pool, x.shape[2], x.shape[3])
        phi, g = (F.max_pool2d(apply_conv(layer, x), size).flatten(2) for layer in (self.phi, self.g))
        theta = apply_conv(self.theta, x)
        with no_autocast(x):
            gathered = (phi @ g.transpose(1, 2) / phi.shape[2]).transpose(1, 2) @ theta.flatten(2)
        return x + _batch_norm(self.norm, apply_conv(self.out, gathered.unflatten(2, theta.shape[2:])))

    def extra_repr(self) -> str:
        return f"pool={self.pool}"


def _batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The layer in ``x``'s dtype and outside autocast, whatever dtype it is kept in."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise RuntimeError("expected a batch normalisation with running statistics")
    same = mean.dtype == x.dtype
    kept = (mean, var) if same else (mean.to(x.dtype), var.to(x.dtype))
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    with no_autocast(x):
        out = F.batch_norm(x, *kept, weight, bias, layer.training, layer.momentum or 0.0, layer.eps)
    if layer.training:
        with torch.no_grad():
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(1)
            if not same:
                mean.copy_(kept[0])
                var.copy_(kept[1])
    return out
