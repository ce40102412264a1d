"""What an attack did to a batch, image by image: maps against maps, pixels against pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ikd_fast.pixels import PixelUnits

SLACK = 1e-3
"""Grey levels beyond eps that are float32 rounding of a normalised image, not a perturbation out of bounds."""


def pyramid_change(clean: Sequence[Tensor], moved: Sequence[Tensor]) -> Tensor:
    """``[N, K, 2]`` float64 on the host: ||b - a|| / ||a|| and 1 - cos(a, b) of each image and level, a clean and b moved.

    >>> a = torch.tensor([[3.0, 4.0]])[..., None, None]
    >>> pyramid_change([a], [2 * a]).tolist()
    [[[1.0, 0.0]]]
    """
    levels = []
    for a, b in zip(clean, moved, strict=True):
        a, b = a.detach().double().flatten(1), b.detach().double().flatten(1)
        size = a.norm(dim=1).clamp_min(1e-12)
        cosine = (a * b).sum(1) / (size * b.norm(dim=1).clamp_min(1e-12))
        levels.append(torch.stack([(b - a).norm(dim=1) / size, (1 - cosine).clamp_min(0)], dim=1))
    return torch.stack(levels, dim=1).cpu()


def pixel_change(
    clean: Tensor,
    moved: Tensor,
    sizes: Sequence[tuple[int, int]],
    units: PixelUnits,
    eps: float = float("inf"),
) -> Tensor:
    """``[N, 3]`` float64 on the host: max and mean of |moved - clean| in grey levels, and the share of values beyond eps.

    Padding, beyond each image's (h, w), does not count. The difference is taken of what the net reads, in the images' dtype.
    """
    grey = units.grey_level(clean).double()
    rows = []
    for i, (h, w) in enumerate(sizes):
        gap = ((moved[i, :, :h, :w].double() - clean[i, :, :h, :w].double()) / grey).abs()
        rows.append(torch.stack([gap.max(), gap.mean(), (gap > eps + SLACK).double().mean()]))
    return torch.stack(rows).cpu()


@dataclass
class Tally:
    """Sums over the images of a row."""

    images: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    evals: float = 0.0
    linf: float = 0.0
    mean_abs: float = 0.0
    outside: float = 0.0
    levels: Tensor | None = field(default=None, repr=False)

    def add(self, loss: Tensor, pyramid: Tensor, pixels: Tensor, *, seconds: float, evals: float) -> None:
        """One batch: its class loss (``[N]``, or a scalar for all), :func:`pyramid_change`, :func:`pixel_change`."""
        n = len(pixels)
        self.images += n
        self.loss += float(loss.mean()) * n
        self.seconds += seconds
        self.evals += evals * n
        self.linf = max(self.linf, float(pixels[:, 0].max()))
        self.mean_abs += float(pixels[:, 1].sum())
        self.outside += float(pixels[:, 2].sum())
        total = pyramid.sum(0)
        self.levels = total if self.levels is None else self.levels + total
