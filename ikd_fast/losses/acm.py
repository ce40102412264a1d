"""Activated channel maps of MixACM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ikd_fast.kernels.ops.attention_stats import attention_stats
from ikd_fast.kernels.reference.precision import full

from .base import DistillContext, KDLoss
from .checks import check_number
from .level_weights import check_weights, weights_of
from .registry import register_loss
from .roots import safe_sqrt

MAPPINGS = ("relu_mean", "abs_mean", "mean")
NORMS = ("l2", "l1", "square")
ChannelMap = str | Callable[[Tensor], Tensor]
Norm = str | Callable[[Tensor], Tensor]


def _normalised(v: Tensor, eps: float) -> Tensor:
    """``v / (||v||_2 + eps)`` of every row; divided by its largest magnitude first, so that no square overflows."""
    top = v.detach().abs().amax(1, keepdim=True).clamp_min(1e-30)
    scaled = v / top
    return scaled / (torch.linalg.vector_norm(scaled, dim=1, keepdim=True) + eps / top)


@register_loss
class ACMLoss(KDLoss):
    """The student's activated channel maps must be the teacher's.

    For every level (a block of a classifier, or a pyramid level)::

        v(X)[n, c] = g(X)[n, c] / (||g(X)[n]||_2 + eps),  g: mean_hw max(X, 0)
        L = weight mean_n || v(S) - v(T) ||_2

    A mean over images; not divided by C. Awais et al., "MixACM: mixup-based robustness transfer via distillation of
    activated channel maps", NeurIPS 2021, has the structure: what follows from a block's activation is one number a
    channel, matched in a norm. Its exact g, norm and weights are not published in a form we could confirm: those here
    are choices, hence the arguments, and ``weight=1`` is no recommendation. The paper trains on mixed images through
    both networks, which the caller does.

    Args:
        weight: a number for every level, or one for each of the chosen levels.
        g: ``"relu_mean"``, ``"abs_mean"`` (mean of \\|X\\|), ``"mean"``, or a function of a float32 map ``[N, C, H,
            W]`` giving ``[N, C]``.
        normalize: divide g(X) by its length in every image; False compares g(X) itself.
        norm: of v(S) - v(T): ``"l2"`` (0 with gradient 0 at 0), ``"l1"``, ``"square"`` (sum of squares), or a function
            of ``[N, C]`` giving ``[N]``.
        eps: added to the length; default 1e-6.
        levels, source, name, backend: see ``KDLoss``.

    Where channels differ, a biased 1x1 convolution brings S to T's (``bind``).

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (computed in fp32) or fp64. Returns ``{"0": scalar, ...}``.

    >>> ctx = DistillContext([], None, [(32, 32)], (32, 32), [0])
    >>> s, t = torch.tensor([[[[4.0]], [[-1.0]]]]), torch.tensor([[[[-1.0]], [[2.0]]]])
    >>> round(ACMLoss()([s], [t], ctx)["0"].item(), 4)  # between (1, 0) and (0, 1)
    1.4142
    """

    default_name = "acm"
    normaliser = "norm over C; mean over N"
    reads_boxes = False
    align_channels = True

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        g: ChannelMap = "relu_mean",
        normalize: bool = True,
        norm: Norm = "l2",
        eps: float = 1e-6,
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(levels=levels, source=source, name=name, backend=backend)
        self.weight = check_weights("ACMLoss", weight)
        if self.levels is not None:
            weights_of("ACMLoss", self.weight, self.levels)
        for key, value, names in (("g", g, MAPPINGS), ("norm", norm, NORMS)):
            if not callable(value) and value not in names:
                known = ", ".join(map(repr, names))
                raise ValueError(f"ACMLoss: {key} must be one of {known} or a function, got {value!r}")
        self.g, self.norm = g, norm
        self.normalize = bool(normalize)
        self.eps = check_number("ACMLoss", "eps", eps, above=0)

    def check_bind(self, channels: Mapping[int, tuple[int, int]]) -> None:
        weights_of("ACMLoss", self.weight, list(channels))

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        weights = weights_of("ACMLoss", self.weight, levels)
        sides = [self._vectors(maps) for maps in (s, t)]
        return {
            str(level): weight * self._distance(a - b).mean()
            for level, weight, a, b in zip(levels, weights, *sides, strict=True)
        }

    def _vectors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if not isinstance(self.g, str):
            found = [self.g(full(x)) for x in maps]
            for v, x in zip(found, maps, strict=True):
                _check_shape("g", v, tuple(x.shape[:2]))
        else:
            stats = attention_stats(
                maps, positive=self.g == "relu_mean", over="positions", backend=self.backend
            )
            found = stats.channel_mean if self.g == "mean" else stats.channel
        return [_normalised(v, self.eps) for v in found] if self.normalize else found

    def _distance(self, d: Tensor) -> Tensor:
        if not isinstance(self.norm, str):
            out = self.norm(d)
            _check_shape("norm", out, (d.shape[0],))
            return out
        if self.norm == "l1":
            return d.abs().sum(1)
        square = d.square().sum(1)
        return square if self.norm == "square" else safe_sqrt(square)

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight}, g={self.g!r}, normalize={self.normalize}, norm={self.norm!r}, "
            f"{super().extra_repr()}"
        )


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"ACMLoss: expected the function {name} to give a tensor {shape}, got {got}")
