"""RetinaNet in plain PyTorch, random weights: ResNet or ResNeXt, FPN P3 to P7, two towers of four convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, ANCHORS, CHANNELS = 80, 9, 256
STRIDES = (8, 16, 32, 64, 128)


def _conv(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt), 1x1."""

    def __init__(self, c_in: int, width: int, c_out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.reduce, self.spatial = _conv(c_in, width, 1), _conv(width, width, 3, stride, groups)
        self.expand = _conv(width, c_out, 1)
        self.skip = _conv(c_in, c_out, 1, stride) if stride > 1 or c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.spatial(F.relu(self.reduce(x))))
        return F.relu(self.expand(y) + self.skip(x))


class Backbone(nn.Module):
    """Maps of strides 8, 16, 32. ``depths`` (3, 4, 6, 3) is ResNet-50; (3, 4, 23, 3), 64 groups of 4 ResNeXt-101-64x4d."""

    def __init__(self, depths: Sequence[int], groups: int, group_width: int, base: int) -> None:
        super().__init__()
        self.stem = _conv(3, base, 7, 2)
        stages, c_in = [], base
        for i, depth in enumerate(depths):
            planes = base * 2**i
            width = planes if groups == 1 else groups * group_width * 2**i
            c_out = planes * 4
            blocks = [
                Bottleneck(c_in if j == 0 else c_out, width, c_out, 2 if i and j == 0 else 1, groups)
                for j in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            c_in = c_out
        self.stages = nn.ModuleList(stages)
        self.channels = [base * 2**i * 4 for i in (1, 2, 3)]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class Detector(nn.Module):
    """``features``: the pyramid; ``logits``: class maps of it; ``forward``: both. ``pyramid``: the modules that make it."""

    pyramid = ("smooth.0", "smooth.1", "smooth.2", "extra.0", "extra.1")

    def __init__(self, backbone: Backbone, channels: int = CHANNELS, classes: int = CLASSES) -> None:
        super().__init__()
        self.backbone, self.classes = backbone, classes
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in backbone.channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in backbone.channels)
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))
        self.class_tower, self.box_tower = (self._tower(channels) for _ in range(2))
        self.class_out = nn.Conv2d(channels, ANCHORS * classes, 3, padding=1)
        self.box_out = nn.Conv2d(channels, ANCHORS * 4, 3, padding=1)
        nn.init.constant_(self.class_out.bias, -4.6)  # a probability of 0.01, as focal loss wants

    @staticmethod
    def _tower(channels: int) -> nn.Sequential:
        layers = [nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(4)]
        return nn.Sequential(*layers)

    def features(self, images: Tensor) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral, self.backbone(images), strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[2:])
        maps = [conv(x) for conv, x in zip(self.smooth, maps, strict=True)]
        for conv in self.extra:
            maps.append(conv(maps[-1]))
        return maps

    def logits(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.class_out(self.class_tower(x)) for x in maps]

    def boxes(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.box_out(self.box_tower(x)) for x in maps]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.logits(self.features(images))


def student_net(base: int = 64, depths: Sequence[int] = (3, 4, 6, 3), channels: int = CHANNELS) -> Detector:
    """ResNet-50 by default."""
    return Detector(Backbone(depths, 1, 0, base), channels)


def teacher_net(
    base: int = 64, depths: Sequence[int] = (3, 4, 23, 3), groups: int = 64, channels: int = CHANNELS
) -> Detector:
    """ResNeXt-101-64x4d by default."""
    return Detector(Backbone(depths, groups, 4, base), channels)


def _class_targets(logits: Sequence[Tensor], targets: Sequence[dict], classes: int) -> list[Tensor]:
    """``[N, K, H*W]`` of every level: 1 for a box's class at the cell of its centre, on the level of its size.

    Made on the device without asking it for a value.
    """
    device = logits[0].device
    boxes = torch.cat([t["boxes"] for t in targets]).float()
    labels = torch.cat([t["labels"] for t in targets])
    image = torch.tensor([i for i, t in enumerate(targets) for _ in range(len(t["boxes"]))]).to(
        device, non_blocking=True
    )
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1)
    level = (sides.prod(1).sqrt() / 32).log2().floor().clamp(0, len(logits) - 1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    found = []
    for i, x in enumerate(logits):
        h, w = x.shape[2:]
        column = (centre[:, 0] / STRIDES[i]).long().clamp(0, w - 1)
        line = (centre[:, 1] / STRIDES[i]).long().clamp(0, h - 1)
        truth = torch.zeros(x.shape[0], classes, h * w, device=device)
        truth.index_put_((image, labels, line * w + column), (level == i).float(), accumulate=True)
        found.append(truth.clamp_max_(1))
    return found


def class_loss(logits: Sequence[Tensor], targets: Sequence[dict], classes: int = CLASSES) -> Tensor:
    """Focal loss of every image ``[N]``, divided by its number of boxes."""
    total = torch.zeros((), device=logits[0].device)
    for x, truth in zip(logits, _class_targets(logits, targets, classes), strict=True):
        x = x.float().unflatten(1, (-1, classes)).flatten(3)
        truth = truth[:, None].expand_as(x)
        p = x.sigmoid()
        wrong = p + truth - 2 * p * truth
        weight = (0.75 - 0.5 * truth) * wrong.square()
        loss = F.binary_cross_entropy_with_logits(x, truth, reduction="none")
        total = total + (weight * loss).sum((1, 2, 3))
    count = torch.tensor([max(len(t["boxes"]), 1) for t in targets], dtype=torch.float32)
    return total / count.to(total.device, non_blocking=True)


def box_loss(maps: Sequence[Tensor]) -> Tensor:
    """Stands in for the regression: smooth L1 of all outputs against zero, with the cost of the real one."""
    return torch.stack(
        [F.smooth_l1_loss(x.float(), torch.zeros_like(x, dtype=torch.float32)) for x in maps]
    ).mean()
