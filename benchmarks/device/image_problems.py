"""Operations on images. Peers: the reference and, where there is no noise, plain PyTorch image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels import add_noise, augment_batch

from .problem import Outputs, Problem, Scale, name_of

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIGMA = 20.4


def _chain(
    images: Sequence[Tensor],
    windows: Sequence,
    flips: Sequence[bool],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Crop, flip, BGR to RGB, normalise, pad, stack in plain PyTorch."""
    device = images[0].device
    out = torch.zeros(len(images), 3, *size, dtype=dtype, device=device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    for row, image, (x0, y0, x1, y1), flip in zip(out, images, windows, flips, strict=True):
        x = image[y0:y1, x0:x1].permute(2, 0, 1).flip(0)
        x = (x.flip(2) if flip else x).float()
        row[:, : y1 - y0, : x1 - x0] = (x - mean) / std
    return out


def augment_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    h, w = scale.decoded
    whole = scale.image
    for label, sigma, window in (
        ("crop", 0.0, (w // 20, h // 30, w - w // 15, h - h // 25)),
        ("noise", SIGMA, (0, 0, w, h)),
    ):
        windows, flips = [window] * batch, [i % 2 == 0 for i in range(batch)]
        x0, y0, x1, y1 = window
        work = f"augment_batch, {label}, normalise, pad, {batch} images {h}x{w} uint8"
        yield _augment(
            f"{work} to {whole[0]}x{whole[1]} {name_of(dtype)}",
            (h, w, batch, windows, flips, sigma, whole),
            dtype,
            device,
            backend,
            moved=batch * (3 * (y1 - y0) * (x1 - x0) + 3 * whole[0] * whole[1] * dtype.itemsize),
        )


def square_problems(
    scale: Scale, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    """The shapes that triton-augment publishes."""
    n = scale.square_batch
    for side, crop in scale.squares:
        g = torch.Generator().manual_seed(0)
        corners = torch.randint(side - crop + 1, (n, 2), generator=g).tolist()
        windows = [(x, y, x + crop, y + crop) for x, y in corners]
        flips = torch.randint(2, (n,), generator=g).bool().tolist()
        yield _augment(
            f"augment_batch, crop, flip, normalise, {n} images {side}x{side} uint8 to {crop}x{crop} {name_of(dtype)}",
            (side, side, n, windows, flips, 0.0, (crop, crop)),
            dtype,
            device,
            backend,
            moved=n * 3 * crop * crop * (1 + dtype.itemsize),
        )


def _augment(
    group: str, work: tuple, dtype: torch.dtype, device: torch.device, backend: str, moved: int
) -> Problem:
    h, w, n, windows, flips, sigma, size = work
    plan = dict(
        window=torch.tensor(windows),
        flip=torch.tensor(flips),
        sigma=torch.full((n,), sigma),
        ids=torch.arange(n),
        seed=0,
        epoch=0,
        swap_channels=True,
        mean=MEAN,
        std=STD,
        size=size,
    )

    def make(seed: int) -> list[Tensor]:
        g = torch.Generator(device).manual_seed(seed)
        return [
            torch.randint(256, (h, w, 3), dtype=torch.uint8, generator=g, device=device) for _ in range(n)
        ]

    def run(room: str, kind: torch.dtype) -> Callable[[Any], Outputs]:
        return lambda x: [augment_batch(x, **plan, dtype=kind, backend=room)]

    peers: dict[str, Callable[[Any], Outputs]] = {"reference": run("reference", dtype)}
    if not sigma:
        peers["PyTorch"] = lambda x: [_chain(x, windows, flips, size, dtype)]
    return Problem(
        "augment_batch",
        group,
        make,
        ("augment_batch", run(backend, dtype)),
        peers,
        run("reference", torch.float32),
        moved,
        inputs=3 * h * w * n,
        # Rounded noise that differs by 1e-5 may fall to the next grey level, in one of many thousand pixels.
        tolerance=1e-3 if dtype == torch.float32 else 4e-3,
    )


def noise_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    h, w = scale.image
    low, high = ([(v - m) / s for m, s in zip(MEAN, STD, strict=True)] for v in (0.0, 255.0))
    grey = [1 / s for s in STD]
    plan = dict(grey_level=grey, low=low, high=high, seed=0, epoch=0)
    sigma, ids = torch.full((batch,), SIGMA), torch.arange(batch)

    def make(seed: int) -> Tensor:
        g = torch.Generator(device).manual_seed(seed)
        return torch.rand(batch, 3, h, w, generator=g, device=device).to(dtype)

    def run(room: str) -> Callable[[Any], Outputs]:
        return lambda x: [add_noise(x, sigma, ids, **plan, backend=room)]

    size = 3 * batch * h * w * dtype.itemsize
    yield Problem(
        "add_noise",
        f"add_noise, {batch} images {h}x{w}, normalised, {name_of(dtype)}",
        make,
        ("add_noise", run(backend)),
        {"reference": run("reference")},
        lambda x: [add_noise(x.double(), sigma, ids, **plan, backend="reference")],
        moved=2 * size,
        inputs=size,
        tolerance=1e-4 if dtype == torch.float32 else 4e-3,
    )
