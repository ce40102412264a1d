"""DI-FGSM of a frozen teacher, crafted inside the training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels.reference.philox import Stream, stable_id, uniform
from ikd_fast.pixels import PixelUnits

from .batch import AttackBatch, AttackOutput
from .diversity import draw_diversity
from .gradient import image_gradient, in_half
from .objectives import resolve_objective

_DEFAULT_STEPS = {"iterative": 5, "single": 1, "random_sign": 0}
MODES = tuple(_DEFAULT_STEPS)


class OnlineDIFGSM:
    r"""Adversarial examples of a victim within an L-infinity ball, as IKD's adversarial branch needs them.

    One step, from x_0 = x (or a random start), T re-drawn per image and step:

    .. math:: g \leftarrow \mu g + \nabla / \mathrm{mean}|\nabla|, \quad
              x \leftarrow \mathrm{clip}_{[lo, hi]}\,\mathrm{clip}_{x_0 \pm \epsilon}(x + \alpha\,\mathrm{sign}(g)),
              \quad \nabla = \nabla_x L(T(x), y)

    Source: DI2-FGSM and M-DI2-FGSM (Xie et al., CVPR 2019; ``momentum`` 0 and 1), with the settings of IKD (Liang et al.,
    ACM MM 2023: eps 8, step 2, 5 steps). Differences from IKD's published code: eps and the valid range are those of the
    pixels, not of each image's own contrast; T keeps the aspect and moves the boxes; every image has its own draws; a
    zero gradient leaves an image as it is.

    Args:
        mode: ``"iterative"``: ``steps`` gradients from the clean image. ``"single"``: one gradient from a random start
            uniform in the ball (FGSM with random start). ``"random_sign"``: the control, delta = +-eps at random, no
            gradient.
        eps: radius in 0..255 grey levels.
        step_size: grey levels a step. Default 2 (``iterative``) or 1.25 eps (``single``).
        steps: gradients of ``iterative``, default 5; ``single`` has one, ``random_sign`` none.
        momentum: mu above.
        diversity_prob: probability of T per image and step. Default 0.5 (``iterative``, as the paper) or 0 (``single``: T
            buys transfer to other nets, and costs strength on the victim itself).
        diversity_rate: smallest shrink factor of T.
        diversity_per_batch: one draw for the whole batch, as published.
        objective: ``"cls"`` (classification loss of the victim on moved ground truth), ``"feature"`` (relative distance of
            the feature maps), or a callable ``(features, batch) -> [N] or scalar``.
        random_start: start uniform in the ball. Default: only where it is needed (``single``, ``feature``).
        targeted: descend the objective instead (targets then say what the victim shall see).
        value_range, mean, std: what float images are (:class:`~ikd_fast.pixels.PixelUnits`).
        seed: key of every draw; ``None`` draws one from torch's generator at each call.

    Call:
        ``attack(victim, images, targets, image_ids=ids, epoch=e, sizes=None) -> AttackOutput``. ``images``: float
        ``[N, C, H, W]``; ``sizes``: (h, w) before padding (default: each target's ``"size"``, else all of it); padding is
        never perturbed. ``victim``: an object with ``features(images)`` and ``cls_loss(images, targets)``, or a callable
        that is the one the objective needs. The same image in the same epoch gets the same draws in any batch.

    Under float16 autocast the objective is scaled for the gradient, so that small gradients do not become zeros; an image whose
    gradient overflows by that gets further passes with less, which ``gradient_evals`` counts.

    Raises:
        ValueError, TypeError: unknown mode or objective (valid ones listed), sizes out of range, undeclared or wrong pixel
            units, missing ids, an objective that does not depend on the images.

    >>> import torch, torch.nn.functional as F
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).requires_grad_(False)
    >>> attack = OnlineDIFGSM(mode="single", eps=8, value_range=(0, 1))
    >>> victim = lambda x, y: F.cross_entropy(net(x), y, reduction="none")
    >>> out = attack(victim, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), image_ids=[10, 11], epoch=0)
    >>> bool(out.delta.abs().max() <= 8 / 255 + 1e-6), out.gradient_evals
    (True, 1)
    """

    def __init__(
        self,
        mode: str = "single",
        *,
        eps: float = 8.0,
        step_size: float | None = None,
        steps: int | None = None,
        momentum: float = 0.0,
        diversity_prob: float | None = None,
        diversity_rate: float = 0.9,
        diversity_per_batch: bool = False,
        objective: str | Callable = "cls",
        random_start: bool | None = None,
        targeted: bool = False,
        value_range: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int | None = 0,
    ) -> None:
        if mode == "carry":
            raise ValueError(
                "mode='carry' (perturbations kept from epoch to epoch) is not available in this version of ikd_fast; write "
                "mode='single', which costs one gradient a step, or mode='iterative'"
            )
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        self.mode = mode
        self.eps = _in_range("eps", eps, 0, 255)
        if 0 < self.eps < 0.5:
            warnings.warn(
                f"eps is in 0..255 grey levels, got {eps:g}; 8/255 of a 0..1 image is written eps=8",
                stacklevel=2,
            )
        self.step_size = _in_range(
            "step_size",
            (2.0 if mode == "iterative" else 1.25 * eps) if step_size is None else step_size,
            0,
            510,
        )
        steps = _DEFAULT_STEPS[mode] if steps is None else steps
        if not (isinstance(steps, int) and steps >= min(1, _DEFAULT_STEPS[mode])):
            raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
        if mode != "iterative" and steps != _DEFAULT_STEPS[mode]:
            raise ValueError(
                f"mode {mode!r} spends {_DEFAULT_STEPS[mode]} gradients, got steps={steps}; write mode='iterative'"
            )
        self.steps = steps
        self.momentum = _in_range("momentum", momentum, 0, float("inf"))
        default_prob = 0.5 if mode == "iterative" else 0.0
        self.diversity_prob = _in_range(
            "diversity_prob", default_prob if diversity_prob is None else diversity_prob, 0, 1
        )
        self.diversity_rate = _in_range("diversity_rate", diversity_rate, 0, 1)
        if self.diversity_rate == 0:
            raise ValueError("diversity_rate must be above 0: it is the smallest shrink factor, got 0")
        self.diversity_per_batch = diversity_per_batch
        self.objective_name = (
            objective if isinstance(objective, str) else getattr(objective, "__name__", "custom")
        )
        self.objective = resolve_objective(objective)
        self.random_start = (
            (mode == "single" or objective == "feature") if random_start is None else random_start
        )
        if objective == "feature" and not self.random_start:
            raise ValueError(
                "objective='feature' has an exactly zero gradient at the clean image, so it needs random_start=True (the "
                "default), got random_start=False"
            )
        self.targeted = targeted
        self.units = PixelUnits(value_range=value_range, mean=mean, std=std)
        self.seed = seed

    def __repr__(self) -> str:
        return (
            f"OnlineDIFGSM(mode={self.mode!r}, eps={self.eps:g}, step_size={self.step_size:g}, steps={self.steps}, "
            f"momentum={self.momentum:g}, diversity_prob={self.diversity_prob:g}, objective={self.objective_name!r}, seed={self.seed})"
        )

    def __call__(
        self,
        victim: Any,
        images: Tensor,
        targets: Any = None,
        *,
        image_ids: Sequence[int | str] | Tensor | None = None,
        epoch: int | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        units: PixelUnits | None = None,
    ) -> AttackOutput:
        seed, ids, epoch = self._keys(images, image_ids, epoch)
        units = self.units if units is None else units
        sizes = _sizes(images, targets, sizes)
        units.check(images)
        clean = images.detach()
        work = clean.to(torch.float64 if clean.dtype == torch.float64 else torch.float32)
        grey, (low, high) = units.grey_level(work), units.bounds(work)
        # Rounding x + delta must not leave the valid range or the ball, whatever the input held beyond it.
        low, high = torch.minimum(low, work), torch.maximum(high, work)
        valid = _valid(work, sizes)
        radius, step = self.eps * grey, self.step_size * grey
        # Mid-grey, the zero of the original code's -1..1 images, is the same colour in every scale.
        fill = units.from_pixels(torch.full_like(work[0, :, :1, :1], 127.5), work.dtype)

        def project(delta: Tensor) -> Tensor:
            """In place."""
            torch.clamp(delta, -radius, radius, out=delta)
            if valid is not None:
                delta.mul_(valid)
            return torch.clamp(delta.add_(work), low, high, out=delta).sub_(work)

        if self.random_start or self.mode == "random_sign":
            noise = _keyed_uniform(work, sizes, ids, epoch, seed)
            delta = project(radius * (noise.sign_() if self.mode == "random_sign" else noise))
        else:
            delta = project(torch.zeros_like(work))
        velocity = torch.zeros_like(work) if self.momentum else None
        history: list[Tensor] = []
        nonfinite = torch.zeros(len(work), dtype=torch.bool, device=work.device)
        moved = torch.zeros_like(nonfinite)
        evals = 0
        for k in range(self.steps):
            view = draw_diversity(
                sizes, ids, step=k, epoch=epoch, seed=seed, prob=self.diversity_prob,
                rate=self.diversity_rate, per_batch=self.diversity_per_batch,
            )  # fmt: skip
            with torch.enable_grad():
                x = (work + delta).requires_grad_(True)
                batch = AttackBatch(
                    view.images(x, fill), view.targets(targets), sizes, k, partial(view.images, work, fill), ids, epoch, seed,
                )  # fmt: skip
                grad, value, passes = self._gradient(victim, x, batch, images)
            evals += passes
            history.append(value)
            if valid is not None:
                grad = grad * valid
            # One NaN or infinity makes the image's sum one.
            scale = torch.linalg.vector_norm(grad, ord=1, dim=(1, 2, 3)) / grad[0].numel()
            finite = scale.isfinite()
            nonfinite |= ~finite
            moved |= finite & (scale > 0)
            direction = torch.masked_fill(grad, ~finite[:, None, None, None], 0.0)
            if velocity is not None:
                scale = torch.where(finite, scale, torch.ones_like(scale)).clamp_min_(1e-30)
                velocity.mul_(self.momentum).add_(direction.div_(scale[:, None, None, None]))
                direction = velocity.sign()
            else:
                direction.sign_()  # the scale does not change it
            delta = project(delta.addcmul_(direction, step, value=-1 if self.targeted else 1))
        if self.steps:
            # No gradient, no adversarial example: not a random start passed off as one.
            delta = torch.where(moved[:, None, None, None], delta, torch.zeros_like(delta))
        adversarial = torch.minimum(torch.maximum(work + delta, low), high).to(images.dtype)
        return AttackOutput(adversarial, adversarial - clean, history, evals, nonfinite)

    def _gradient(
        self, victim: Any, x: Tensor, batch: AttackBatch, images: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        value = self.objective(victim, batch)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise _independent(value)
        if value.dim() > 1 or (value.dim() == 1 and len(value) != len(x)):
            raise ValueError(
                f"the objective must be [N] = [{len(x)}] or a scalar, got shape {list(value.shape)}"
            )
        grad, passes = image_gradient(value, x, half=in_half(images, value))
        if grad is None:
            raise _independent(value)
        return grad, value.detach(), passes

    def _keys(
        self, images: Tensor, image_ids: Sequence[int | str] | Tensor | None, epoch: int | None
    ) -> tuple[int, list[int], int]:
        if not isinstance(images, Tensor) or images.dim() != 4:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be one stacked float tensor [N, C, H, W], got {got}")
        if not images.dtype.is_floating_point:
            raise TypeError(
                f"images must be floating to hold a perturbation, got {images.dtype}; write images.float() and value_range=(0, 255)"
            )
        if self.seed is None:
            # Nobody can name an image again without a seed, so position in the batch will do.
            ids = list(range(len(images))) if image_ids is None else [stable_id(_host(i)) for i in image_ids]
            return int(torch.randint(2**62, ())), ids, int(epoch or 0)
        if image_ids is None or epoch is None:
            raise ValueError(
                f"image_ids and epoch key the draws and are required with seed={self.seed}, got image_ids={image_ids}, epoch={epoch}; "
                "give both, or seed=None for fresh draws"
            )
        ids = [stable_id(_host(i)) for i in image_ids]
        if len(ids) != len(images):
            raise ValueError(
                f"image_ids must have one entry per image: expected {len(images)}, got {len(ids)}"
            )
        return self.seed, ids, int(epoch)


def _independent(value: Any) -> ValueError:
    return ValueError(
        "the objective does not depend on the images: the victim must keep the graph (no torch.no_grad, no .detach()) and return a "
        f"Tensor, got {value!r}"
    )


def _host(value: Any) -> int | str:
    return value if isinstance(value, str) else int(value)


def _in_range(name: str, value: float, low: float, high: float) -> float:
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise ValueError(f"{name} must be in {low:g}..{high:g}, got {value!r}")
    return float(value)


def _sizes(images: Tensor, targets: Any, sizes: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    height, width = images.shape[-2:]
    if sizes is None:
        dicts = targets if isinstance(targets, (list, tuple)) else [None] * len(images)
        sizes = [t["size"] if isinstance(t, dict) and "size" in t else (height, width) for t in dicts]
    sizes = [(int(h), int(w)) for h, w in sizes]
    if len(sizes) != len(images):
        raise ValueError(
            f"expected one (h, w) and one target per image: {len(images)} images, got {len(sizes)}"
        )
    for i, (h, w) in enumerate(sizes):
        if not (1 <= h <= height and 1 <= w <= width):
            raise ValueError(f"sizes[{i}] must lie within the batch's {height}x{width}, got {h}x{w}")
    return sizes


def _valid(work: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor | None:
    """``[N, 1, H, W]`` of 1 on pixels and 0 on padding, filled on the device; None where nothing is padding."""
    if all(size == tuple(work.shape[-2:]) for size in sizes):
        return None
    valid = work.new_ones(len(work), 1, *work.shape[-2:])
    for i, (h, w) in enumerate(sizes):
        valid[i, :, h:].zero_()
        valid[i, :, :, w:].zero_()
    return valid


def _keyed_uniform(
    work: Tensor, sizes: Sequence[tuple[int, int]], ids: Sequence[int], epoch: int, seed: int
) -> Tensor:
    """U[-1, 1) per element, indexed like image noise: word (c * h + y) * w4 + x, w4 = w rounded up to 4."""
    out = torch.zeros_like(work)
    for i, ((h, w), image_id) in enumerate(zip(sizes, ids, strict=True)):
        pitch = -(-w // 4) * 4
        u = uniform(
            (work.shape[1], h, pitch),
            seed=seed,
            id=image_id,
            epoch=epoch,
            stream=Stream.START,
            device=work.device,
        )
        out[i, :, :h, :w] = u[..., :w].to(work.dtype) * 2 - 1
    return out
