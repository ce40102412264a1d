"""A tiny detector-like pair: backbone, two-level neck, dense head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Neck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.lateral = nn.Conv2d(c, 8, 1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        p0 = self.lateral(x)
        return p0, self.down(p0)


class Net(nn.Module):
    """Stride-4 features with BatchNorm; ``forward`` gives class logits of every level."""

    def __init__(self, c=6, neck=Neck):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, c, 3, stride=4, padding=1), nn.BatchNorm2d(c), nn.ReLU())
        self.neck = neck(c)
        self.head = nn.Conv2d(8, 4, 1)
        self.forwards = 0

    def extract(self, x):
        self.forwards += 1
        return self.neck(self.backbone(x))

    def forward(self, x):
        return [self.head(f) for f in self.extract(x)]


def class_loss(net, images, targets):
    """Cross-entropy of the pooled logits against each image's first label."""
    labels = torch.stack([t["labels"][0] if len(t["labels"]) else torch.tensor(0) for t in targets])
    return sum(F.cross_entropy(level.flatten(2).mean(2), labels) for level in net(images))


def batch(n=3, h=64, w=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, h, w, generator=g)
    targets = [
        dict(boxes=torch.tensor([[4.0, 4.0, 4.0 + s, 4.0 + s]]), labels=torch.tensor([i % 4]))
        for i, s in enumerate([50, 12, 20, 40][:n])
    ]
    return images, targets
