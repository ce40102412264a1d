"""FGD in its published form: level by level, box by box, every intermediate map made.

Written from the paper's equations (Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022); each box is
rasterised by its own slice assignment and its corners are read on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast import DistillContext, FGDLoss


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    spatial = (x.abs().mean(1).view(n, -1) / temperature).softmax(1).view(n, h, w) * h * w
    channel = (x.abs().mean(3).mean(2) / temperature).softmax(1) * c
    return spatial, channel


def _masks(boxes: list[Tensor], image_sizes: list[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Box by box, each corner read on the host, as the published module does."""
    n, _, h, w = like.shape
    foreground = torch.zeros(n, h, w, device=like.device)
    background = torch.ones(n, h, w, device=like.device)
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
    total = torch.zeros((), device=student[0].device)
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        part = loss.relation[str(level)]
        spatial_s, channel_s = _attention(s, loss.temperature)
        spatial_t, channel_t = _attention(t, loss.temperature)
        foreground, background = _masks(ctx.boxes, ctx.image_sizes, s)
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
