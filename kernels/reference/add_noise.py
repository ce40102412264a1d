"""Keyed Gaussian noise: the field of an image, and the field added to images in their own units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .philox import Stream, _key_words, chunk_blocks, normal, philox4x32

RNGS = ("philox", "torch")

# (channel, first row, last row) to the normals of those rows, ``[rows, W]``, which the caller may overwrite.
Rows = Callable[[int, int, int], Tensor]


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
        return torch.randn(
            (channels, height, width), generator=_generator(seed, id, epoch, device), device=device
        )
    stride = -(-width // 4) * 4
    field = normal(
        (channels, height, stride), seed=seed, id=id, epoch=epoch, stream=Stream.NOISE, device=device
    )
    return field[..., :width]


def _generator(seed: int, id: int, epoch: int, device: torch.device | str | None) -> torch.Generator:
    id_lo, id_hi, ep, k0, k1 = _key_words(seed, id, epoch, Stream.NOISE)
    words = philox4x32((0, id_lo, id_hi, ep), (k0, k1))
    return torch.Generator(device="cpu" if device is None else device).manual_seed(words[0] | words[1] << 32)


def noise_rows(
    shape: Sequence[int], *, seed: int, id: int, epoch: int, device: torch.device, rng: str
) -> Rows:
    """The field of ``noise_field`` a few rows at a time, which are asked for once and in order.

    On a CPU the field never exists as a whole: fetching 13 MB of new pages costs as much as the normals in it.
    """
    channels, height, width = shape
    if device.type != "cpu":
        field = noise_field(shape, seed=seed, id=id, epoch=epoch, device=device, rng=rng)
        return lambda c, first, last: field[c, first:last]
    stride, group = width, 16
    if rng == "torch":
        generator = _generator(seed, id, epoch, device)

        def fill(out: Tensor, offset: int) -> None:
            out.normal_(generator=generator)
    else:
        stride, group = -(-width // 4) * 4, 64

        def fill(out: Tensor, offset: int) -> None:
            out.copy_(normal(len(out), seed=seed, id=id, epoch=epoch, stream=Stream.NOISE, offset=offset))

    pieces = _Pieces(channels * height * stride, group, fill)
    return lambda c, first, last: pieces.take((last - first) * stride).view(last - first, stride)[:, :width]


class _Pieces:
    """Values of ``fill(out, offset)`` on a CPU, a piece at a time, the same bits as all ``total`` at once.

    It is called for multiples of ``group`` values but for the end. torch makes 16 normals of 16 uniforms, and the last 16
    twice if there is a rest; logarithms and cosines take another routine where less than a vector is left.
    """

    def __init__(self, total: int, group: int, fill: Callable[[Tensor, int], None]) -> None:
        self.total, self.group, self.fill = total, group, fill
        self.done, self.left = 0, torch.empty(0, device="cpu")

    def take(self, count: int) -> Tensor:
        remaining, group = self.total - self.done, self.group
        new = min(-(-max(count - len(self.left), 0) // group) * group, remaining)
        if remaining - new < group:
            new = remaining
        buffer = torch.empty(len(self.left) + new, device="cpu")
        buffer[: len(self.left)] = self.left
        if new:
            self.fill(buffer[len(self.left) :], self.done)
        self.done += new
        self.left = buffer[count:]
        return buffer[:count]


def chunks(height: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """First and last row of pieces that stay near the cache; the whole on a device, where launches cost more."""
    step = max(1, 4 * chunk_blocks(device) // max(width, 1)) if device.type == "cpu" else max(height, 1)
    for first in range(0, height, step):
        yield first, min(first + step, height)


def _noisy(
    image: Tensor,
    sigma: float,
    key: int,
    flip: bool,
    grey_level: Sequence[float],
    seed: int,
    epoch: int,
    reverse: bool,
    round_noise: bool,
    rng: str,
) -> Iterator[tuple[int, slice, Tensor]]:
    """(channel, rows, image plus noise) of ``[C, h, w]``, in float32 (float64 of float64)."""
    channels, height, width = image.shape
    work = torch.float64 if image.dtype == torch.float64 else torch.float32
    rows = noise_rows(image.shape, seed=seed, id=key, epoch=epoch, device=image.device, rng=rng)
    for c_noise in range(channels):
        c = channels - 1 - c_noise if reverse else c_noise
        for first, last in chunks(height, width, image.device):
            noise = rows(c_noise, first, last).mul_(sigma)
            if round_noise:
                noise.round_()
            if flip:
                noise = noise.flip(-1)
            noise = noise.to(work)
            if grey_level[c] != 1.0:
                noise.mul_(grey_level[c])
            yield c, slice(first, last), noise.add_(image[c, first:last])


def forward(
    images: Sequence[Tensor],
    sigma: Sequence[float],
    ids: Sequence[int],
    flip: Sequence[bool],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    epoch: int,
    grey_level: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    reverse: bool,
    round_noise: bool,
    rng: str,
) -> list[Tensor]:
    """``images``: stacks ``[n, C, H, W]``; the other lists have one entry for each image of each stack, in order."""
    out, i = [], 0
    for stack in images:
        new = torch.empty_like(stack)
        out.append(new)
        for source, target in zip(stack, new, strict=True):
            if sigma[i] > 0:
                h, w = sizes[i]
                target[:, h:] = source[:, h:]
                target[:, :h, w:] = source[:, :h, w:]
                parts = _noisy(
                    source[:, :h, :w],
                    sigma[i],
                    ids[i],
                    flip[i],
                    grey_level,
                    seed,
                    epoch,
                    reverse,
                    round_noise,
                    rng,
                )
                for c, rows, noisy in parts:
                    target[c, rows, :w] = noisy.clamp_(low[c], high[c])
            else:
                target.copy_(source)
            i += 1
    return out


def backward(
    grads: Sequence[Tensor],
    images: Sequence[Tensor],
    sigma: Sequence[float],
    ids: Sequence[int],
    flip: Sequence[bool],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    epoch: int,
    grey_level: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    reverse: bool,
    round_noise: bool,
    rng: str,
) -> list[Tensor]:
    """The gradient where ``low <= image + noise <= high`` and outside the valid part, else 0."""
    out, i = [], 0
    for grad, stack in zip(grads, images, strict=True):
        new = torch.empty_like(stack).copy_(grad)
        out.append(new)
        for source, target in zip(stack, new, strict=True):
            if sigma[i] > 0:
                h, w = sizes[i]
                parts = _noisy(
                    source[:, :h, :w],
                    sigma[i],
                    ids[i],
                    flip[i],
                    grey_level,
                    seed,
                    epoch,
                    reverse,
                    round_noise,
                    rng,
                )
                for c, rows, noisy in parts:
                    passes = (noisy >= low[c]).logical_and_(noisy <= high[c])
                    target[c, rows, :w].masked_fill_(passes.logical_not_(), 0.0)
            i += 1
    return out
