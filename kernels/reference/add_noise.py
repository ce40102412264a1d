"""Keyed Gaussian noise on images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import Stream, _key_words, normal, philox4x32

RNGS = ("philox", "torch")


def noise_field(
    shape: Sequence[int],
    *,
    seed: int,
    id: int,
    epoch: int,
    device: torch.device | str | None = None,
    rng: str = "philox",
) -> Tensor:
    """Standard normals ``[C, H, W]`` float32 of one image.

    ``rng="philox"``: element (c, y, x) is number ``(c*H + y) * W4 + x`` of the NOISE stream, W4 = W rounded
    up to a multiple of 4 (a row starts on a block). ``rng="torch"``: ``torch.randn`` of a generator on
    ``device`` seeded by words 0 and 1 of that stream; faster on a CPU, but values differ between devices and
    torch versions.
    """
    if rng not in RNGS:
        raise ValueError(f"rng must be one of {', '.join(map(repr, RNGS))}, got {rng!r}")
    channels, height, width = shape
    if rng == "torch":
        id_lo, id_hi, ep, k0, k1 = _key_words(seed, id, epoch, Stream.NOISE)
        words = philox4x32((0, id_lo, id_hi, ep), (k0, k1))
        generator = torch.Generator(device="cpu" if device is None else device).manual_seed(
            words[0] | words[1] << 32
        )
        return torch.randn((channels, height, width), generator=generator, device=device)
    stride = -(-width // 4) * 4
    field = normal(
        (channels, height, stride), seed=seed, id=id, epoch=epoch, stream=Stream.NOISE, device=device
    )
    return field[..., :width]


def add_noise(
    image: Tensor,
    sigma: float,
    *,
    seed: int,
    id: int,
    epoch: int,
    grey_level: Tensor | float = 1.0,
    low: Tensor | float = 0.0,
    high: Tensor | float = 255.0,
    flip: bool = False,
    round_noise: bool = False,
    rng: str = "philox",
) -> Tensor:
    """``clamp(image + sigma * grey_level * n, low, high)`` with ``n = noise_field(image.shape)``, a new tensor.

    Args:
        image: ``[C, H, W]``, uint8 or float, any strides.
        sigma: standard deviation in 0..255 grey levels.
        grey_level, low, high: size of one grey level and valid range in the image's units, numbers or ``[1 or
            C, 1, 1]``.
        flip: the image has been mirrored, so the field is mirrored with it.
        round_noise: round ``sigma * n`` to whole grey levels (uint8 always does). The noise is rounded and
            not the sum, so that one image in different units gets the same noise.

    Computed in float32 (float64 for float64 images); the result has the image's dtype.
    """
    if sigma < 0:
        raise ValueError(f"sigma must be >= 0 grey levels, got {sigma}")
    field = noise_field(image.shape, seed=seed, id=id, epoch=epoch, device=image.device, rng=rng).mul_(sigma)
    if round_noise or image.dtype == torch.uint8:
        field.round_()
    if flip:
        field = field.flip(-1)
    work = torch.float64 if image.dtype == torch.float64 else torch.float32
    noisy = image.to(work) + field * grey_level
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(v, dtype=work, device=image.device) for v in (low, high))
    return noisy.clamp_(low, high).to(image.dtype)  # type: ignore[arg-type]
