"""Neural attention distillation (NAD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ikd_fast.kernels.ops.attention_stats import attention_stats

from .base import DistillContext, KDLoss
from .checks import check_number
from .level_weights import check_weights, weights_of
from .registry import register_loss

PUBLISHED = (500.0, 1000.0, 1000.0)


def _normalised(mean: Tensor, channels: int, eps: float) -> Tensor:
    """``A / (||A|| + eps)`` over H, W of A = channels mean, ``[N, H, W]``.

    A is first divided by its largest entry, and eps with it, which changes nothing but that squares of large
    entries stay in float32.
    """
    top = mean.detach().amax((1, 2), keepdim=True).clamp_min(1e-30)
    scaled = mean / top
    norm = torch.linalg.vector_norm(scaled, dim=(1, 2), keepdim=True)
    return scaled / (norm + eps / (channels * top))


@register_loss
class NADLoss(KDLoss):
    """The student's attention map must be the teacher's.

    For every level (published: the three blocks of a classifier)::

        A(X)[n, h, w] = sum_c |X|^p;   A^ = A / (||A||_2 + eps), the norm over H, W of one image
        L = weight mean_{n,h,w} (A^(S) - A^(T))^2

    A mean over N H W, not a sum; channels need not agree, and a scale of S or T changes nothing (but for eps). Li et
    al., "Neural attention distillation: erasing backdoor triggers from deep neural networks", ICLR 2021, and its
    published code, which trains with cross-entropy on the student plus this at 500, 1000, 1000.

    Args:
        p: exponent >= 1; default 2. ``sum_c |X|^p`` must fit in float32.
        weight: a number for every level, or one for each of the chosen levels; default (500, 1000, 1000), so for
            three levels.
        eps: added to the norm; default 1e-6.
        levels, source, name, backend: see ``KDLoss``. The published taps are the outputs of the three blocks of a
            wide residual network before the last normalisation and activation.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (computed in fp32) or fp64. Returns ``{"0": scalar, ...}``.

    Raises:
        ValueError: p < 1, a number of weights other than that of the levels.

    >>> import torch
    >>> ctx = DistillContext([], None, [(32, 32)], (32, 32), [0])
    >>> s, t = [torch.tensor([[[[3.0, 0.0]]]])], [torch.tensor([[[[0.0, 2.0]]]])]
    >>> round(NADLoss(weight=1.0)(s, t, ctx)["0"].item(), 5)  # maps (1, 0) and (0, 1)
    1.0
    >>> NADLoss(weight=1.0)(s, [7 * s[0]], ctx)["0"].item() < 1e-10
    True
    """

    default_name = "nad"
    normaliser = "mean over N, H, W"
    reads_boxes = False

    def __init__(
        self,
        p: float = 2.0,
        weight: float | Sequence[float] = PUBLISHED,
        eps: float = 1e-6,
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(levels=levels, source=source, name=name, backend=backend)
        self.p = check_number("NADLoss", "p", p)
        if self.p < 1:
            raise ValueError(f"NADLoss: the exponent p must be >= 1, got {p}")
        self.weight = check_weights("NADLoss", weight)
        self.eps = check_number("NADLoss", "eps", eps, above=0)
        if self.levels is not None:
            weights_of("NADLoss", self.weight, self.levels)

    def check_bind(self, channels: Mapping[int, tuple[int, int]]) -> None:
        weights_of("NADLoss", self.weight, list(channels))

    def _check_channels(
        self, level: int, s: int, t: int, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        if s == t or (self._channels is not None and self._channels[level] != (s, t)):
            super()._check_channels(
                level, s, t, student, teacher
            )  # other counts than bound; else any will do

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        weights = weights_of("NADLoss", self.weight, levels)
        sides = []
        for maps in (s, t):
            stats = attention_stats(maps, p=self.p, over="channels", backend=self.backend)
            pairs = zip(stats.spatial, maps, strict=True)
            sides.append([_normalised(a, x.shape[1], self.eps) for a, x in pairs])
        return {
            str(level): weight * (a - b).square().mean()
            for level, weight, a, b in zip(levels, weights, *sides, strict=True)
        }

    def extra_repr(self) -> str:
        return f"p={self.p:g}, weight={self.weight}, eps={self.eps:g}, {super().extra_repr()}"
