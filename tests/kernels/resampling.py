"""Input diversity by dense matrices of exact fractions, image by image in float64: what kernels are compared with."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import torch
from torch import Tensor


def matrix(frame: int, length: int) -> Tensor:
    """``[length, frame]``: output pixel k has its centre at (k + 1/2) frame / length, and takes from the two nearest centres."""
    out = torch.zeros(length, frame, dtype=torch.float64)
    for k in range(length):
        centre = min(
            max((k + Fraction(1, 2)) * frame / length - Fraction(1, 2), Fraction(0)), Fraction(frame - 1)
        )
        first = floor(centre)
        out[k, first] += float(first + 1 - centre)
        if centre > first:
            out[k, first + 1] += float(centre - first)
    return out


def by_matrix(images: Tensor, frames: Tensor, windows: Tensor, fill: Tensor) -> Tensor:
    out = images.detach().double().clone()
    for row, x, (h, w), (x0, y0, w_out, h_out) in zip(
        out, images.detach().double(), frames.tolist(), windows.tolist(), strict=True
    ):
        row[:, :h, :w] = fill.double().view(-1, 1, 1)
        row[:, y0 : y0 + h_out, x0 : x0 + w_out] = matrix(h, h_out) @ x[:, :h, :w] @ matrix(w, w_out).T
    return out


def adjoint_by_matrix(grad: Tensor, frames: Tensor, windows: Tensor) -> Tensor:
    out = grad.double().clone()
    for row, g, (h, w), (x0, y0, w_out, h_out) in zip(
        out, grad.double(), frames.tolist(), windows.tolist(), strict=True
    ):
        part = g[:, y0 : y0 + h_out, x0 : x0 + w_out]
        row[:, :h, :w] = matrix(h, h_out).T @ part @ matrix(w, w_out)
    return out


def every_window(largest: int, channels: int = 2) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    """Frames and windows of every length of every frame up to ``largest``, at some offset, and the shape of their images."""
    pairs = [(frame, length) for frame in range(1, largest + 1) for length in range(1, frame + 1)]
    frames, windows = [], []
    for i, (w, w_out) in enumerate(pairs):
        h, h_out = pairs[(7 * i + 3) % len(pairs)]
        frames.append((h, w))
        windows.append((i % (w - w_out + 1), (i // 2) % (h - h_out + 1), w_out, h_out))
    shape = (len(pairs), channels, largest + 2, largest + 3)
    return torch.tensor(frames), torch.tensor(windows), shape
