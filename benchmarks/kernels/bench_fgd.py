"""FGD, forward and backward over a whole pyramid: the loss of the library, the published form (loops over boxes), and
the same sums in whole-tensor PyTorch with autograd, eager and compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.baselines.fgd_published import published_form
from benchmarks.comparison import label
from ikd_fast import DistillContext, FGDLoss
from ikd_fast.kernels import fgd_attention, fgd_context, fgd_masks

N, BOXES = 2, 20


@dataclass(frozen=True)
class Size:
    """Channels, network input (h, w) and timed rounds; levels have strides 8 to 128."""

    channels: int
    input_size: tuple[int, int]
    rounds: int

    def maps(self) -> list[tuple[int, int]]:
        h, w = self.input_size
        return [(-(-h // s), -(-w // s)) for s in (8, 16, 32, 64, 128)]


SIZES = {"small": Size(64, (256, 256), 30), "paper": Size(256, (800, 1344), 7)}


def library(loss: FGDLoss, student: list[Tensor], teacher: list[Tensor], ctx: DistillContext) -> Tensor:
    return torch.stack(list(loss(student, teacher, ctx).values())).sum()


def whole_tensors(loss: FGDLoss, student: list[Tensor], teacher: list[Tensor], ctx: DistillContext) -> Tensor:
    """No loop over boxes and no map of R(X); autograd makes the gradient."""
    masks = fgd_masks(ctx.boxes, ctx.image_sizes, [(x.shape[2], x.shape[3]) for x in student])
    total = student[0].new_zeros(())
    for level, (s, t, (foreground, background)) in enumerate(zip(student, teacher, masks, strict=True)):
        part = loss.relation[str(level)]
        spatial_s, channel_s = fgd_attention(s, loss.temperature)
        spatial_t, channel_t = fgd_attention(t, loss.temperature)
        d = (s - t).flatten(2)
        focus = spatial_t.flatten(1) * (channel_t[:, None] @ d.square()).squeeze(1)
        fg, bg = ((m.flatten(1) * focus).sum() for m in (foreground, background))
        mask = (channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum()
        add = part.student_context(fgd_context(s, part.student_mask))
        add = add - part.teacher_context(fgd_context(t, part.teacher_mask))
        relation = d.square().sum() + (add * (2.0 * d.sum(-1) + d.shape[2] * add)).sum()
        weighted = loss.alpha * fg + loss.beta * bg + loss.gamma * mask + loss.lambda_ * relation
        total = total + weighted / s.shape[0]
    return total


FORMS = {
    "ours": library,
    "published": published_form,
    "autograd": whole_tensors,
    "autograd_compiled": torch.compile(whole_tensors, dynamic=False),
}
SIDES = {
    "ours": "FGDLoss",
    "published": "published loops",
    "autograd": "PyTorch",
    "autograd_compiled": "PyTorch, compiled",
}


def _problem(size: Size) -> tuple[FGDLoss, list[Tensor], list[Tensor], DistillContext]:
    g = torch.Generator().manual_seed(0)
    loss = FGDLoss(preset="retinanet", channels=size.channels, num_levels=5)
    with (
        torch.no_grad()
    ):  # at its start the last layer is zero and the context branches would not be compared
        for p in loss.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    shapes = [(N, size.channels, h, w) for h, w in size.maps()]
    student = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
    teacher = [torch.randn(shape, generator=g) for shape in shapes]
    h, w = size.input_size
    corner = torch.rand(N, BOXES, 2, generator=g) * torch.tensor([w, h]) * 0.8
    side = 4 + torch.rand(N, BOXES, 2, generator=g) * torch.tensor([w, h]) * 0.15
    boxes = list(torch.cat([corner, corner + side], dim=2))
    ctx = DistillContext(boxes, None, [(h, w)] * N, (h, w), list(range(N)))
    return loss, student, teacher, ctx


def _step(form, loss: FGDLoss, student: list[Tensor], teacher: list[Tensor], ctx: DistillContext):
    wanted = [*student, *loss.parameters()]
    value = form(loss, student, teacher, ctx)
    return value.detach(), torch.autograd.grad(value, wanted)


# Compiling takes a minute a size.
CASES = [(size, form) for size in SIZES for form in FORMS if (size, form) != ("small", "autograd_compiled")]


@pytest.fixture(scope="module")
def problem(request):
    """A size's tensors, and what the library makes of them: value and every gradient."""
    args = _problem(SIZES[request.param])
    return request.param, args, _step(library, *args)


@pytest.mark.parametrize(("problem", "form"), CASES, indirect=["problem"])
def test_fgd_forward_and_backward(benchmark, problem, form: str) -> None:
    name, args, (value, grads) = problem
    value_too, grads_too = _step(FORMS[form], *args)
    # float32 sums over up to 1e7 elements in different order
    torch.testing.assert_close(value, value_too, rtol=1e-5, atol=0)
    for ours, theirs in zip(grads, grads_too, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    size = SIZES[name]
    label(
        benchmark,
        f"FGD forward+backward, {N}x{size.channels} channels, input {size.input_size}, {BOXES} boxes an image",
        SIDES[form],
        peer=form != "ours",
        targets={"published loops": 1.5} if form == "ours" else None,
    )
    benchmark.pedantic(_step, args=(FORMS[form], *args), rounds=size.rounds, warmup_rounds=2)
