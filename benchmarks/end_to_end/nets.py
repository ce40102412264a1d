"""Small nets in plain PyTorch: a classifier to attack, and a student and a teacher with feature pyramids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class Classifier(nn.Sequential):
    """Four convolutions, pooling, a linear layer."""

    def __init__(self, classes: int = 10) -> None:
        widths = [3, 32, 64, 128, 128]
        blocks = [_block(a, b, 2) for a, b in itertools.pairwise(widths)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class Detector(nn.Module):
    """Backbone with strides 8, 16, 32, top-down pyramid, a head of per-cell class logits shared by the levels.

    ``forward`` gives the logits, ``features`` the pyramid; both nets of a pair have ``channels`` channels in theirs.
    """

    def __init__(self, width: int, depth: int, channels: int = 64, classes: int = 20) -> None:
        super().__init__()
        stem = [_block(3, width, 2), _block(width, width, 2)]
        stages = [self._stage(width * 2**i, width * 2 ** (i + 1), depth) for i in range(3)]
        self.stem, self.stages = nn.Sequential(*stem), nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(width * 2 ** (i + 1), channels, 1) for i in range(3))
        self.neck = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.head = nn.Sequential(_block(channels, channels, 1), nn.Conv2d(channels, classes, 3, padding=1))

    @staticmethod
    def _stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
        return nn.Sequential(_block(c_in, c_out, 2), *(_block(c_out, c_out, 1) for _ in range(depth)))

    def features(self, images: Tensor) -> list[Tensor]:
        x, maps = self.stem(images), []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[2:])
        return [conv(m) for conv, m in zip(self.neck, maps, strict=True)]

    def logits(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.head(m) for m in maps]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.logits(self.features(images))


def class_loss(logits: Sequence[Tensor], targets: Sequence[dict]) -> Tensor:
    """Cross-entropy of each level's mean logits against the image's first label, ``[N]``."""
    labels = torch.stack([t["labels"][0] for t in targets])
    return torch.stack(
        [F.cross_entropy(level.mean((2, 3)), labels, reduction="none") for level in logits]
    ).mean(0)
