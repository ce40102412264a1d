"""Operations on two pyramids, forward and backward. Peers: the same in plain PyTorch, eager and compiled, and FGD's loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.fgd_published import published_form
from ikd_fast import DistillContext, FGDLoss
from ikd_fast.kernels import (
    fgd_attention,
    fgd_context,
    fgd_masks,
    fgd_sums,
    keyed_mask,
    mask_maps,
    pyramid_l2,
)

from .problem import Outputs, Problem, Scale
from .pyramids import on_maps, pair_problem, random_pyramid, with_gradients

BOXES = 20


def _boxes(scale: Scale, batch: int, device: torch.device, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    h, w = scale.image
    size = torch.tensor([w, h])
    corner = torch.rand(batch, BOXES, 2, generator=g) * size * 0.8
    side = 4 + torch.rand(batch, BOXES, 2, generator=g) * size * 0.15
    return list(torch.cat([corner, corner + side], 2).to(device))


def plain_l2(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    values = []
    for pair in zip(student, teacher, strict=True):
        s, t = (x if x.dtype == torch.float64 else x.float() for x in pair)
        values.append((s - t).square().sum((1, 2, 3)))
    return torch.stack(values)


def l2_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    def ours(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        return pyramid_l2(s, t, backend=backend)

    sides = ("pyramid_l2", ours, plain_l2, scale, batch, dtype, device)
    yield pair_problem(*sides, work="forward", backward=False)
    yield pair_problem(*sides)


def plain_fgd(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    boxes: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    student_weight: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The sums of FGD, ``[4, L, N]`` and ``[3, R]``, vectorised over boxes, with autograd."""
    masks = fgd_masks(boxes, sizes, [tuple(s.shape[2:]) for s in student])
    terms, vectors = [], []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        s, t = (x if x.dtype == torch.float64 else x.float() for x in (s, t))
        spatial_s, channel_s = fgd_attention(s)
        spatial_t, channel_t = fgd_attention(t)
        d = s - t
        square = d.square()
        focused = spatial_t * torch.einsum("nchw,nc->nhw", square, channel_t)
        foreground, background = ((m * focused).sum((1, 2)) for m in masks[i])
        attention = (channel_s - channel_t).abs().sum(1) + (spatial_s - spatial_t).abs().sum((1, 2))
        terms.append(torch.stack([foreground, background, attention, square.sum((1, 2, 3))]))
        contexts = fgd_context(s, student_weight[i]), fgd_context(t, teacher_weight[i]), d.sum((2, 3))
        vectors.append(torch.stack([v.flatten() for v in contexts]))
    return torch.stack(terms, 1), torch.cat(vectors, 1)


def fgd_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    fields = on_maps("fgd", scale, batch, dtype)
    sizes = [scale.image] * batch

    def make(seed: int) -> tuple:
        s, t = (random_pyramid(scale, batch, dtype, device, 2 * seed + i) for i in range(2))
        g = torch.Generator(device).manual_seed(seed)
        weights = [
            [torch.randn(scale.channels, generator=g, device=device) / 16 for _ in s] for _ in range(2)
        ]
        maps = [x.requires_grad_() for x in s]
        return (
            maps,
            t,
            _boxes(scale, batch, device, seed),
            [[w.requires_grad_() for w in ws] for ws in weights],
        )

    def run(op: Callable) -> Callable[[Any], Outputs]:
        def call(x: Any) -> Outputs:
            maps, teacher, boxes, (ws, wt) = x
            terms, vectors = op(maps, teacher, boxes, sizes, ws, wt)[:2]
            upstream = [torch.full_like(terms, 1e-3), torch.full_like(vectors, 1e-3)]
            return with_gradients([terms, vectors], upstream, [*maps, *ws, *wt])

        return call

    def truth(x: Any) -> Outputs:
        maps, teacher, boxes, weights = x
        double = [[w.detach().double().requires_grad_() for w in ws] for ws in weights]
        wanted = [m.detach().double().requires_grad_() for m in maps]
        return run(plain_fgd)((wanted, [t.double() for t in teacher], boxes, double))

    fast = batch == 2 and dtype == torch.float32
    yield Problem(
        **fields("fgd_sums forward and backward, 20 boxes an image", 5),
        make=make,
        ours=("fgd_sums", run(lambda *args: fgd_sums(*args, backend=backend))),
        peers={"PyTorch": run(plain_fgd)},
        compiled={"PyTorch, compiled": run(torch.compile(plain_fgd, dynamic=False, backend=scale.compiler))},
        reference=truth,
        # sign(Ss - St) of the attention term turns where the two are closest.
        tolerance=1e-4 if dtype == torch.float32 else 4e-3,
        targets={"PyTorch": 5.0, "PyTorch, compiled": 1.5} if fast else {},
    )
    if batch == 2:
        yield _fgd_loss(scale, batch, dtype, device, fields)


def _fgd_loss(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, fields: Callable
) -> Problem:
    """The whole loss beside the published loops, with the same parameters."""
    loss = FGDLoss(preset="retinanet", channels=scale.channels, num_levels=len(scale.strides)).to(device)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the last layers start at zero, which would hide the context branches
        for p in loss.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)

    def make(seed: int) -> tuple:
        s, t = (random_pyramid(scale, batch, dtype, device, 2 * seed + i) for i in range(2))
        sizes = [scale.image] * batch
        context = DistillContext(
            _boxes(scale, batch, device, seed), None, sizes, scale.image, list(range(batch))
        )
        return [x.requires_grad_() for x in s], t, context

    def run(value: Callable[..., Tensor]) -> Callable[[Any], Outputs]:
        def call(x: Any) -> Outputs:
            total = value(x)
            return with_gradients([total], [torch.ones_like(total)], x[0])

        return call

    def loops(x: Any) -> Tensor:
        with torch.device(device):  # it makes its masks wherever tensors are made by default
            return published_form(loss, [m.float() for m in x[0]], [m.float() for m in x[1]], x[2])

    return Problem(
        **fields("FGDLoss forward and backward, 20 boxes an image", 5),
        make=make,
        ours=("FGDLoss", run(lambda x: torch.stack(list(loss(*x).values())).sum())),
        peers={"published form": run(loops)},
        reference=run(loops),
        tolerance=1e-3 if dtype == torch.float32 else 8e-3,
        targets={"published form": 20.0} if dtype == torch.float32 else {},
    )


def plain_mask(student: Sequence[Tensor], ids: Sequence[int], ratio: float) -> list[Tensor]:
    out = []
    for level, s in enumerate(student):
        h, w = s.shape[2:]
        mask = keyed_mask(ids, h, w, ratio=ratio, level=level, seed=0, epoch=1, device=s.device)
        mask = mask.view(s.shape[0], 1, h, w)
        out.append((s if s.dtype == torch.float64 else s.float()) * mask)
    return out


def mask_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    fields = on_maps("masked_l2", scale, batch, dtype)
    ids = list(range(batch))

    def make(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        s = [x.requires_grad_() for x in random_pyramid(scale, batch, dtype, device, seed)]
        return s, [torch.randn(x.shape, device=device) for x in s]

    def run(op: Callable) -> Callable[[Any], Outputs]:
        def call(x: Any) -> Outputs:
            out = op(x[0])
            return with_gradients(out, [g.to(o.dtype) for g, o in zip(x[1], out, strict=True)], x[0])

        return call

    def truth(x: Any) -> Outputs:
        wanted = [m.detach().double().requires_grad_() for m in x[0]]
        return run(lambda s: plain_mask(s, ids, 0.65))((wanted, x[1]))

    # In and out each way; the masked maps and their gradient are float32.
    passes = 2 + 2 * 4 / dtype.itemsize
    yield Problem(
        **fields("mask_maps forward and backward", passes),
        make=make,
        ours=("mask_maps", run(lambda s: mask_maps(s, ids, ratio=0.65, seed=0, epoch=1, backend=backend))),
        peers={"PyTorch": run(lambda s: plain_mask(s, ids, 0.65))},
        reference=truth,
        tolerance=1e-6 if dtype == torch.float32 else 4e-3,
    )
