"""FGD, forward and backward over a whole pyramid: the loss of the library beside the published form (loops over boxes)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast import DistillContext, FGDLoss

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


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    spatial = (x.abs().mean(1).view(n, -1) / temperature).softmax(1).view(n, h, w) * h * w
    channel = (x.abs().mean(3).mean(2) / temperature).softmax(1) * c
    return spatial, channel


def _masks(boxes: list[Tensor], image_sizes: list[tuple[int, int]], h: int, w: int) -> tuple[Tensor, Tensor]:
    """Box by box, each corner read on the host, as the published module does."""
    foreground = torch.zeros(len(boxes), h, w)
    background = torch.ones(len(boxes), h, w)
    for i, (per_image, (image_h, image_w)) in enumerate(zip(boxes, image_sizes, strict=True)):
        for x1, y1, x2, y2 in per_image:
            xa, xb = int(torch.floor(x1 / image_w * w)), int(torch.ceil(x2 / image_w * w))
            ya, yb = int(torch.floor(y1 / image_h * h)), int(torch.ceil(y2 / image_h * h))
            window = foreground[i, ya : yb + 1, xa : xb + 1]
            torch.maximum(window, torch.tensor(1.0 / ((yb + 1 - ya) * (xb + 1 - xa))), out=window)
        background[i] = torch.where(foreground[i] > 0, 0.0, 1.0)
        if background[i].sum() > 0:
            background[i] /= background[i].sum()
    return foreground, background


def _weighted_error(s: Tensor, t: Tensor, mask: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
    """sum M St Ct D^2 with the square roots of the weights multiplied into both maps."""
    root = mask.sqrt()[:, None] * spatial.sqrt()[:, None] * channel.sqrt()[:, :, None, None]
    return F.mse_loss(s * root, t * root, reduction="sum")


def _related(x: Tensor, weight: Tensor, branch: torch.nn.Module) -> Tensor:
    pooled = F.conv2d(x, weight[None, :, None, None]).flatten(1).softmax(1)
    context = torch.einsum("nchw,nhw->nc", x, pooled.view(x.shape[0], *x.shape[2:]))
    return x + branch(context)[:, :, None, None]


def published_form(
    loss: FGDLoss, student: list[Tensor], teacher: list[Tensor], ctx: DistillContext
) -> Tensor:
    """FGD level by level and box by box, with the parameters of ``loss``; every intermediate map is made."""
    total = torch.zeros(())
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        part = loss.relation[str(level)]
        spatial_s, channel_s = _attention(s, loss.temperature)
        spatial_t, channel_t = _attention(t, loss.temperature)
        foreground, background = _masks(ctx.boxes, ctx.image_sizes, *s.shape[2:])
        fg = _weighted_error(s, t, foreground, spatial_t, channel_t)
        bg = _weighted_error(s, t, background, spatial_t, channel_t)
        mask = (channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum()
        relation = F.mse_loss(
            _related(s, part.student_mask, part.student_context),
            _related(t, part.teacher_mask, part.teacher_context),
            reduction="sum",
        )
        weighted = loss.alpha * fg + loss.beta * bg + loss.gamma * mask + loss.lambda_ * relation
        total = total + weighted / s.shape[0]
    return total


def vectorised(loss: FGDLoss, student: list[Tensor], teacher: list[Tensor], ctx: DistillContext) -> Tensor:
    return torch.stack(list(loss(student, teacher, ctx).values())).sum()


FORMS = {"vectorised": vectorised, "published_loops": published_form}


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


@pytest.fixture(scope="module", params=SIZES)
def problem(request):
    """A size's tensors, on which both forms have been shown to agree in value and in every gradient."""
    args = _problem(SIZES[request.param])
    value, grads = _step(vectorised, *args)
    value_loop, grads_loop = _step(published_form, *args)
    # float32 sums over up to 1e7 elements in different order
    torch.testing.assert_close(value, value_loop, rtol=1e-5, atol=0)
    for ours, theirs in zip(grads, grads_loop, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    return request.param, args


@pytest.mark.parametrize("form", FORMS)
def test_fgd_forward_and_backward(benchmark, problem, form: str) -> None:
    name, args = problem
    size = SIZES[name]
    benchmark.group = (
        f"FGD forward+backward, {N}x{size.channels} channels, input {size.input_size}, {BOXES} boxes an image"
    )
    benchmark.pedantic(_step, args=(FORMS[form], *args), rounds=size.rounds, warmup_rounds=2)
