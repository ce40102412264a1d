"""Synthetic pictures for the examples: bright rectangles on noise, one class a colour."""

from __future__ import annotations

import torch
from torch import Tensor

COLOURS = torch.tensor([[220, 40, 40], [40, 200, 60], [50, 80, 230]], dtype=torch.uint8)


def scene(index: int, height: int = 64, width: int = 64) -> tuple[Tensor, dict]:
    """uint8 image ``[3, H, W]`` and its target; every second one has a large object, the others small ones only."""
    g = torch.Generator().manual_seed(index)
    image = torch.randint(70, 120, (3, height, width), generator=g, dtype=torch.uint8)
    boxes, labels = [], []
    for side in (40, 12) if index % 2 == 0 else (12, 20):
        x, y = (int(torch.randint(0, s - side, (), generator=g)) for s in (width, height))
        label = int(torch.randint(0, len(COLOURS), (), generator=g))
        image[:, y : y + side, x : x + side] = COLOURS[label].view(3, 1, 1)
        boxes.append([x, y, x + side, y + side])
        labels.append(label)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor(labels),
        "size": (height, width),
    }
    return image, target


def scenes(count: int, first: int = 0, **size: int) -> tuple[list[Tensor], list[dict]]:
    """Images and targets ``first .. first + count - 1``."""
    images, targets = zip(*(scene(i, **size) for i in range(first, first + count)), strict=True)
    return list(images), list(targets)
