"""The chain out of albumentations' transforms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from .work import MEAN, SIGMA, STD, Work


def _noise():
    import albumentations as A

    return A.GaussNoise(std_range=(SIGMA / 255, SIGMA / 255), p=1.0)


def build(work: Work) -> Callable[[], Tensor]:
    pytest.importorskip("albumentations", reason="albumentations is not installed (requirements/bench.txt)")
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(torch.get_num_threads())  # its default is all cores
    height, width = work.padded
    finish = [
        A.Normalize(mean=[m / 255 for m in MEAN], std=[s / 255 for s in STD]),
        A.PadIfNeeded(height, width, position="top_left", fill=0),
        ToTensorV2(),
    ]
    chains = [
        A.Compose([_noise() if sigma else A.Crop(*window), *finish])
        for window, sigma in zip(work.windows, work.sigmas, strict=True)
    ]
    arrays = [image.numpy() for image in work.images]

    def run() -> Tensor:
        rows = [
            chain(image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB))["image"]
            for image, chain in zip(arrays, chains, strict=True)
        ]
        return torch.stack(rows).contiguous()

    return run


def build_noise(image: Tensor) -> Callable[[], np.ndarray]:
    """Noise alone on a uint8 ``[H, W, 3]`` image."""
    pytest.importorskip("albumentations", reason="albumentations is not installed (requirements/bench.txt)")
    noise, array = _noise(), image.numpy()
    return lambda: noise(image=array)["image"]
