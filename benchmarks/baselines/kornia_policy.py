"""The chain out of kornia's pieces, each in its cheapest form: slices instead of warps, 0..255 floats instead of rescaling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .work import MEAN, SIGMA, STD, Work


def build(work: Work) -> Callable[[], Tensor]:
    pytest.importorskip("kornia", reason="kornia is not installed (requirements/bench.txt)")
    import kornia.augmentation as K
    from kornia.color import bgr_to_rgb
    from kornia.enhance import normalize
    from kornia.geometry.transform import crop_by_indices

    noise, pad = K.RandomGaussianNoise(mean=0.0, std=SIGMA, p=1.0), K.PadTo(work.padded)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    # Corners are inclusive.
    corners = [
        torch.tensor([[[x0, y0], [x1 - 1, y0], [x1 - 1, y1 - 1], [x0, y1 - 1]]])
        for x0, y0, x1, y1 in work.windows
    ]

    def run() -> Tensor:
        rows = []
        for image, box, cropped, sigma in zip(
            work.images, corners, work.plan.branch.tolist(), work.sigmas, strict=True
        ):
            x = image.permute(2, 0, 1)[None]
            if cropped and not sigma:
                x = crop_by_indices(x, box)
            x = x.to(torch.float32, memory_format=torch.contiguous_format)
            if sigma:
                x = noise(x).clamp_(0, 255)
            rows.append(pad(normalize(bgr_to_rgb(x), mean, std)))
        return torch.cat(rows)

    return run


def build_noise(image: Tensor) -> Callable[[], Tensor]:
    """Noise alone on a uint8 ``[H, W, 3]`` image, back to uint8."""
    pytest.importorskip("kornia", reason="kornia is not installed (requirements/bench.txt)")
    from kornia.augmentation import RandomGaussianNoise

    noise = RandomGaussianNoise(mean=0.0, std=SIGMA, p=1.0)
    return lambda: (
        noise(image.permute(2, 0, 1)[None].float())
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)[0]
        .permute(1, 2, 0)
    )
