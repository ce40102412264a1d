"""The feature loss of IKD's adversarial branch (eq. 6), and its other reductions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ikd_fast.kernels.ops.channel_kl import channel_kl
from ikd_fast.kernels.ops.pyramid_l2 import pyramid_l1, pyramid_l2

from .base import DistillContext, KDLoss
from .checks import check_number
from .registry import register_loss
from .valid import valid_masks

FORMS = {
    "sum_per_image": "sum over C, H, W; divided by N",
    "norm": "one norm over N, C, H, W",
    "norm_per_image": "norm over C, H, W; mean over N",
    "mean": "mean over N, C, H, W",
    "l1": "sum over C, H, W; divided by N",
    "cwd": "sum over C of divergences; divided by N and C",
}


@register_loss
class AdvFeatureLoss(KDLoss):
    """Distance of the teacher's and the student's features on the same adversarial images.

    Liang et al., "Inconsistent knowledge distillation for object detection", ACM MM 2023, eq. 6. With D = S -
    T of level l, N images, the loss is the sum over levels of ``weight`` times

    ==================  ===========================================  ==============================
    form                value of a level                             source and normaliser
    ==================  ===========================================  ==============================
    ``sum_per_image``   sum D^2 / N                                  published code; the default
    ``norm``            sqrt(sum D^2 + 1e-12), the batch as one      eq. 6 as printed
    ``norm_per_image``  mean over n of sqrt(sum_chw D^2 + 1e-12)     eq. 6 for each image
    ``mean``            sum D^2 / (N C H W)                          mean squared error
    ``l1``              sum |D| / N                                  published code's option
    ``cwd``             tau^2 / (N C) sum_nc KL(P_T || P_S)          CWD, P = softmax_hw(X / tau)
    ==================  ===========================================  ==============================

    Sums are not divided by C, H, W unless the table says so. ``1e-12`` keeps the gradient finite at D = 0.
    The default reaches 1e4..1e7, hence IKD's small ``beta`` (1e-5), which is not a part of this module. Where
    channels differ, a biased 1x1 convolution brings S to T's (``bind``).

    Args:
        form: one of the forms above.
        tau: temperature of ``cwd``; no other form has one.
        weight: factor of every level.
        ignore_padding: leave out the cells that hold no pixel of their image (``ctx.valid``, else from
            ``ctx.image_sizes`` and ``ctx.input_size``); ``mean`` then divides by the cells that are left. The
            published code counts padding. Not for ``cwd``.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (summed in fp32, never copied) or fp64. Returns ``{"0":
    scalar, ...}``.

    >>> import torch
    >>> s, t = [torch.full((2, 4, 3, 3), 3.0)], [torch.zeros(2, 4, 3, 3)]
    >>> ctx = DistillContext([], None, [(24, 24)] * 2, (24, 24), [0, 1])
    >>> AdvFeatureLoss()(s, t, ctx)["0"].item()  # 4 * 9 elements of 3^2
    324.0
    >>> AdvFeatureLoss(form="mean")(s, t, ctx)["0"].item()
    9.0
    """

    default_name = "adv_feature"
    reads_boxes = False
    align_channels = True

    def __init__(
        self,
        form: str = "sum_per_image",
        tau: float = 1.0,
        weight: float = 1.0,
        *,
        ignore_padding: bool = False,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(levels=levels, source=source, name=name, backend=backend)
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}; valid: {', '.join(FORMS)}")
        self.form, self.normaliser = form, FORMS[form]
        self.tau = check_number("AdvFeatureLoss", "tau", tau, above=0)
        if self.tau != 1.0 and form != "cwd":
            raise ValueError(f"AdvFeatureLoss: tau={tau} is for form='cwd', got form={form!r}; leave tau out")
        self.weight = check_number("AdvFeatureLoss", "weight", weight)
        if ignore_padding and form == "cwd":
            raise ValueError(
                "AdvFeatureLoss: ignore_padding=True is not for form='cwd', a softmax over the whole map"
            )
        self.ignore_padding = bool(ignore_padding)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        valid = valid_masks(ctx, s, levels) if self.ignore_padding else None
        values = self._values(s, t, valid)
        return {str(level): self.weight * value for level, value in zip(levels, values, strict=True)}

    def _values(
        self, s: Sequence[Tensor], t: Sequence[Tensor], valid: Sequence[Tensor] | None
    ) -> Sequence[Tensor]:
        if self.form == "cwd":
            sums = channel_kl(s, t, self.tau, backend=self.backend).mean(1).unbind()
            return [value * (self.tau**2 / x.shape[1]) for value, x in zip(sums, t, strict=True)]
        if self.form == "l1":
            return pyramid_l1(s, t, valid, backend=self.backend).mean(1).unbind()
        square = pyramid_l2(s, t, valid, backend=self.backend)
        if self.form == "norm":
            return (square.sum(1) + 1e-12).sqrt().unbind()
        if self.form == "norm_per_image":
            return (square + 1e-12).sqrt().mean(1).unbind()
        if self.form == "mean" and valid is not None:
            cells = zip(square.sum(1).unbind(), valid, t, strict=True)
            return [value / (v.sum().clamp_min(1) * x.shape[1]) for value, v, x in cells]
        if self.form == "mean":
            return [value / x[0].numel() for value, x in zip(square.mean(1).unbind(), t, strict=True)]
        return square.mean(1).unbind()

    def extra_repr(self) -> str:
        tau = f", tau={self.tau}" if self.form == "cwd" else ""
        return f"form={self.form!r}{tau}, weight={self.weight}, {super().extra_repr()}"
