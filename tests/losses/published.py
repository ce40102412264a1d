"""The losses in their slow published form: loops over images and boxes, nothing fused, float64, autograd."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.losses import DistillContext


def golden_maps() -> tuple[Tensor, Tensor]:
    """Teacher and student of the specification's golden values: N=2, C=4, H=6, W=8."""
    k = torch.arange(384, dtype=torch.float64)
    teacher = torch.sin(0.37 * k) + 0.1 * torch.cos(0.05 * k)
    student = 0.8 * torch.sin(0.37 * k + 0.3)
    return student.reshape(2, 4, 6, 8), teacher.reshape(2, 4, 6, 8)


def golden_context() -> DistillContext:
    boxes = [[[5.0, 3, 21, 20], [30, 10, 63.5, 47]], [[16.0, 8, 32, 24]]]
    return DistillContext([torch.tensor(b) for b in boxes], None, [(48, 64)] * 2, (48, 64), [0, 1])


def attention(x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    spatial = torch.stack([h * w * torch.softmax(x[i].abs().mean(0).reshape(-1) / tau, 0) for i in range(n)])
    channel = torch.stack([c * torch.softmax(x[i].abs().mean((1, 2)) / tau, 0) for i in range(n)])
    return spatial.reshape(n, h, w), channel


def masks(boxes: list[Tensor], sizes: list[tuple[int, int]], h: int, w: int) -> tuple[Tensor, Tensor]:
    foreground = torch.zeros(len(boxes), h, w, dtype=torch.float64)
    background = torch.ones(len(boxes), h, w, dtype=torch.float64)
    for i, (image, (image_h, image_w)) in enumerate(zip(boxes, sizes, strict=True)):
        for box in image:
            xa, xb = math.floor(box[0] / image_w * w), math.ceil(box[2] / image_w * w)
            ya, yb = math.floor(box[1] / image_h * h), math.ceil(box[3] / image_h * h)
            area = 1.0 / ((yb + 1 - ya) * (xb + 1 - xa))
            rows, columns = slice(max(ya, 0), max(yb + 1, 0)), slice(max(xa, 0), max(xb + 1, 0))
            foreground[i, rows, columns] = foreground[i, rows, columns].clamp_min(area)
        background[i][foreground[i] > 0] = 0
        if background[i].sum() > 0:
            background[i] /= background[i].sum()
    return foreground, background


def respond(x: Tensor, weight: Tensor, branch: dict[str, Tensor]) -> Tensor:
    """R(X) by convolutions on the map, as published."""
    n, c, h, w = x.shape
    share = F.conv2d(x, weight.reshape(1, c, 1, 1)).reshape(n, 1, h * w).softmax(2)
    context = torch.matmul(x.reshape(n, c, h * w), share.transpose(1, 2)).reshape(n, c, 1, 1)
    y = F.conv2d(context, branch["reduce.weight"][..., None, None], branch["reduce.bias"])
    shape = list(y.shape[1:])
    y = F.layer_norm(y, shape, branch["norm.weight"].reshape(shape), branch["norm.bias"].reshape(shape))
    return x + F.conv2d(F.relu(y), branch["expand.weight"][..., None, None], branch["expand.bias"])


def fgd_terms(
    s: Tensor, t: Tensor, ctx: DistillContext, parameters: dict[str, Tensor], tau: float
) -> dict[str, Tensor]:
    """fg, bg, mask and rela of one level; ``parameters`` as an ``FGDLevel`` names them."""
    n, _, h, w = s.shape
    foreground, background = masks(ctx.boxes, ctx.image_sizes, h, w)
    spatial_t, channel_t = attention(t, tau)
    spatial_s, channel_s = attention(s, tau)

    def weighted(mask: Tensor) -> Tensor:
        root = mask.sqrt()[:, None] * spatial_t.sqrt()[:, None] * channel_t.sqrt()[..., None, None]
        return (s * root - t * root).square().sum() / n

    def branch(side: str) -> dict[str, Tensor]:
        start = f"{side}_context."
        return {k.removeprefix(start): v for k, v in parameters.items() if k.startswith(start)}

    student = respond(s, parameters["student_mask"], branch("student"))
    teacher = respond(t, parameters["teacher_mask"], branch("teacher"))
    return {
        "fg": weighted(foreground),
        "bg": weighted(background),
        "mask": ((channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum()) / n,
        "rela": (student - teacher).square().sum() / n,
    }


def adv(form: str, s: Tensor, t: Tensor, tau: float = 1.0) -> Tensor:
    """One level of the adversarial feature loss, image by image."""
    d = [s[i] - t[i] for i in range(len(s))]
    if form == "sum_per_image":
        return torch.stack([x.pow(2).sum() for x in d]).mean()
    if form == "norm":
        return (torch.cat([x.reshape(-1) for x in d]).pow(2).sum() + 1e-12) ** 0.5
    if form == "norm_per_image":
        return torch.stack([(x.pow(2).sum() + 1e-12) ** 0.5 for x in d]).mean()
    if form == "mean":
        return F.mse_loss(s, t)
    if form == "l1":
        return torch.stack([x.abs().sum() for x in d]).mean()
    p_t = torch.softmax(t.reshape(*t.shape[:2], -1) / tau, 2)
    p_s = torch.softmax(s.reshape(*s.shape[:2], -1) / tau, 2)
    return tau**2 * (p_t * (p_t / p_s).log()).sum() / (t.shape[0] * t.shape[1])
