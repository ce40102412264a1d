"""Structural knowledge distillation: SSIM between feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ikd_fast.kernels.ops.ssim import check_window, ssim

from .base import DistillContext, KDLoss
from .checks import check_number
from .presets import resolve
from .registry import register_loss

DEFAULTS = {"weight": 4.0, "levels": None}
# What shares one minimum and one maximum, as the axes they are taken over.
RESCALES = {"image": (1, 2, 3), "batch": (0, 1, 2, 3), "channel": (2, 3)}
MIN_RANGE = 1e-6


def rescale(x: Tensor, how: str = "image") -> Tensor:
    """``(x - min) / max(max - min, 1e-6)`` over an image, the batch or a channel: values in 0..1.

    Gradients pass through the minimum and the maximum, shared equally by elements that tie.

    >>> import torch
    >>> rescale(torch.tensor([2.0, 3.0, 6.0, 4.0]).view(1, 1, 2, 2)).flatten().tolist()
    [0.0, 0.25, 1.0, 0.5]
    """
    axes = RESCALES[how]
    low = x.amin(axes, keepdim=True)
    return (x - low) / (x.amax(axes, keepdim=True) - low).clamp_min(MIN_RANGE)


@register_loss
class SSIMLoss(KDLoss):
    """Structural dissimilarity of the rescaled maps.

    ``L = weight / (N C H W) * sum over n, c, h, w of clamp((1 - SSIM(r(S), r(T))) / 2, 0, 1)`` for every level:
    a mean, so that levels count equally whatever their size. SSIM compares local mean, contrast and structure
    of each channel under a Gaussian window (``ikd_fast.kernels.ssim``), and r brings each map to 0..1: ``r(X) =
    (X - min X) / max(max X - min X, 1e-6)``. De Rijk et al., "Structural knowledge distillation for object
    detection", NeurIPS 2022, which uses kornia's ``ssim_loss``; 2 and 4 were its best weights.

    A level too small for the window takes a smaller one: the largest odd window with ``window // 2 < min(H, W)``.
    S = T gives 0 but for kornia's 1e-12 in the denominator of SSIM: less than 5.6e-6 times the weight.

    Args:
        preset: ``"retinanet"``, ``"reppoints"`` or ``"faster_rcnn"`` sets the published numbers; arguments given
            beside it win.
        weight: factor of every level, default 4.
        window: taps of the Gaussian, odd, 1..49.
        sigma: of the Gaussian, in cells.
        rescale: what shares one minimum and maximum: ``"image"`` (C, H, W of each image), ``"batch"`` or
            ``"channel"`` (H, W of each channel of each image). The paper does not say which. S and T have
            their own. The gradient passes through S's minimum and maximum; where a whole range is below
            1e-6 the rescaled map is divided by 1e-6, and its gradient is large: finite in fp32, while fp16 overflows
            where such a map has but a few elements.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (computed in fp32) or fp64; where channels differ, a biased
    1x1 convolution brings S to T's (``bind``). Returns ``{"0": scalar, ...}``.

    Raises:
        ValueError: a window that is even or out of range, a sigma not above 0, an unknown ``rescale``, maps
            that do not match.

    >>> import torch
    >>> ctx = DistillContext([], None, [(64, 64)], (64, 64), image_ids=[7])
    >>> ramp = torch.arange(64.0).view(1, 1, 8, 8)
    >>> round(SSIMLoss()([3 * ramp + 5], [ramp], ctx)["0"].item(), 5)  # scale and shift do not count
    0.0
    >>> round(SSIMLoss(weight=1.0)([-ramp], [ramp], ctx)["0"].item(), 3)
    0.835
    """

    default_name = "ssim"
    normaliser = "mean over N, C, H, W"
    reads_boxes = False
    align_channels = True

    def __init__(
        self,
        preset: str | None = None,
        weight: float | None = None,
        window: int = 11,
        sigma: float = 1.5,
        rescale: str = "image",
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        values = resolve("SSIMLoss", preset, {"weight": weight, "levels": levels}, DEFAULTS)
        super().__init__(levels=values["levels"], source=source, name=name, backend=backend)
        self.weight = check_number("SSIMLoss", "weight", values["weight"])
        self.window = check_window("SSIMLoss", window)
        self.sigma = check_number("SSIMLoss", "sigma", sigma, above=0)
        if rescale not in RESCALES:
            raise ValueError(f"SSIMLoss: unknown rescale {rescale!r}; valid: {', '.join(RESCALES)}")
        self.rescale = rescale

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.pairs(student, teacher), strict=True)
        pair = [[rescale(x, self.rescale) for x in maps] for maps in (s, t)]
        values = ssim(*pair, window=self.window, sigma=self.sigma, backend=self.backend).mean(1) * self.weight
        return {str(level): value for level, value in zip(levels, values.unbind(), strict=True)}

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight}, window={self.window}, sigma={self.sigma}, rescale={self.rescale!r}, "
            f"{super().extra_repr()}"
        )
