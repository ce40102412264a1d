"""All problems, in the order of a run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .attention_problems import attention_problems
from .channel_kl_problems import channel_kl_problems
from .delta_problems import delta_problems
from .diversity_problems import diversity_problems, sign_problems
from .image_problems import augment_problems, noise_problems, square_problems
from .map_problems import fgd_problems, l2_problems, mask_problems
from .pearson_problems import pearson_problems
from .problem import Problem, Scale
from .ssim_problems import ssim_problems

KINDS = (
    l2_problems,
    fgd_problems,
    mask_problems,
    channel_kl_problems,
    attention_problems,
    pearson_problems,
    ssim_problems,
    augment_problems,
    noise_problems,
    delta_problems,
    diversity_problems,
    sign_problems,
)


def all_problems(scale: Scale, device: torch.device, backend: str) -> Iterator[Problem]:
    """Batch 2 first, the papers' setting: what a short run still shows."""
    for batch in sorted(scale.batches, key=lambda n: (n != 2, -n)):
        for dtype in scale.dtypes:
            for kind in KINDS:
                yield from kind(scale, batch, dtype, device, backend)
        if batch == 2:
            for dtype in scale.dtypes:
                yield from square_problems(scale, dtype, device, backend)
