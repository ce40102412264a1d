"""The modes that keep nothing: all their gradients are taken in the step that uses the images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ikd_fast.kernels import sign_step
from ikd_fast.kernels.reference.philox import Stream, uniform
from ikd_fast.pixels import PixelUnits

from .batch import AttackBatch, AttackOutput
from .diversity import draw_diversity
from .gradient import attack_gradient
from .visit import Visit

if TYPE_CHECKING:
    from .difgsm import OnlineDIFGSM


def craft(attack: OnlineDIFGSM, victim: Any, visit: Visit, units: PixelUnits) -> AttackOutput:
    """Adversarial examples of a visit's images: a start, ``attack.steps`` gradients, a projection after each."""
    images, targets, sizes = visit.images, visit.targets, visit.sizes
    ids, epoch, seed = visit.ids, visit.epoch, visit.seed
    clean = images.detach()
    work = clean.to(torch.float64 if clean.dtype == torch.float64 else torch.float32)
    valid = _valid(work, sizes)
    # Numbers in work's precision, read without waiting.
    host = work.new_empty(work.shape[1], 1, 1, device="cpu")
    grey, floor, ceiling = (units.grey_level(host), *units.bounds(host))
    radius, step, *limits = (
        v.flatten().tolist()
        for v in (attack.eps * grey, attack.step_size * (-grey if attack.targeted else grey), floor, ceiling)
    )
    advance = partial(
        sign_step, images=work, radius=radius, low=limits[0], high=limits[1],
        frames=None if valid is None else torch.tensor(sizes, device="cpu"),
    )  # fmt: skip
    # Mid-grey, the zero of the original code's -1..1 images, is the same colour in every scale.
    fill = units.from_pixels(torch.full_like(work[0, :, :1, :1], 127.5), work.dtype)

    delta = torch.zeros_like(work)
    if attack.random_start or attack.mode == "random_sign":
        noise = _keyed_uniform(work, sizes, ids, epoch, seed)
        if attack.mode == "random_sign":
            delta = advance(delta, noise, step=radius)
        else:
            delta = advance(noise.mul_(attack.eps * units.grey_level(work)), None, step=0.0)
    velocity = torch.zeros_like(work) if attack.momentum else None
    history: list[Tensor] = []
    nonfinite = torch.zeros(len(work), dtype=torch.bool, device=work.device)
    moved = torch.zeros_like(nonfinite)
    evals = 0
    for k in range(attack.steps):
        view = draw_diversity(
            sizes, ids, step=k, epoch=epoch, seed=seed, prob=attack.diversity_prob,
            rate=attack.diversity_rate, per_batch=attack.diversity_per_batch,
        )  # fmt: skip
        with torch.enable_grad():
            x = (work + delta).requires_grad_(True)
            batch = AttackBatch(
                view.images(x, fill), view.targets(targets), sizes, k, partial(view.images, work, fill), ids, epoch, seed,
                None if view.active else visit.clean_maps,
            )  # fmt: skip
            grad, value, passes = attack_gradient(
                attack.objective(victim, batch),
                x,
                images,
                ids,
                half=getattr(victim, "gradients_in_half", False),
            )
        evals += passes
        history.append(value)
        if valid is not None:
            grad = grad * valid
        # One NaN or infinity makes the image's sum one.
        scale = torch.linalg.vector_norm(grad, ord=1, dim=(1, 2, 3)) / grad[0].numel()
        finite = scale.isfinite()
        nonfinite |= ~finite
        moved |= finite & (scale > 0)
        if velocity is not None:
            direction = torch.masked_fill(grad, ~finite[:, None, None, None], 0.0)
            scale = torch.where(finite, scale, torch.ones_like(scale)).clamp_min_(1e-30)
            velocity.mul_(attack.momentum).add_(direction.div_(scale[:, None, None, None]))
            delta = advance(delta, velocity, step=step)
        else:
            delta = advance(delta, grad, step=step, moves=finite)  # the scale does not change a sign
    if attack.steps:
        # No gradient, no adversarial example: not a random start passed off as one.
        delta = torch.where(moved[:, None, None, None], delta, torch.zeros_like(delta))
    # Rounding x + delta must not leave the valid range, whatever the input held beyond it.
    low, high = units.bounds(work)
    low, high = torch.minimum(low, work), torch.maximum(high, work)
    adversarial = torch.minimum(torch.maximum(work + delta, low), high).to(images.dtype)
    return AttackOutput(adversarial, adversarial - clean, history, evals, nonfinite)


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
