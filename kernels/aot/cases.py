"""The calls that are compiled: every operation at the shapes of the papers, 800x1344, levels P3 to P7 of 256 channels.

Meta tensors go through the public functions, forward and backward, so that what is compiled is what is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.add_noise import add_noise
from ..ops.augment_batch import augment_batch
from ..ops.fgd import fgd_sums
from ..ops.masked_l2 import mask_maps
from ..ops.pyramid_l2 import pyramid_l1, pyramid_l2
from .attention_cases import attention_cases
from .attention_cases import stats as attention
from .compiling import Case
from .delta_cases import apply_cases, sized, step_cases
from .diversity_cases import diversity_cases, sign_cases
from .diversity_cases import sized as sized_diversity
from .pair_cases import OPS as PAIR_OPS
from .pair_cases import channel_kl_cases, pair_call, pearson_cases, ssim_cases

IMAGE = (800, 1344)
DECODED = (800, 1333)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIGMA = 20.4
STRIDES = (8, 16, 32, 64, 128)
CHANNELS = 256
BOXES = 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Multi-scale training and the batches of its last steps; none of these may compile anything anew.
SIZES = ((480, 1344), (640, 1056), (736, 1312), (800, 1344), (1333, 800))

Call = Callable[[], Any]
Size = tuple[int, int]


def levels_of(image: Size) -> list[tuple[int, int]]:
    return [(-(-image[0] // s), -(-image[1] // s)) for s in STRIDES]


def maps(
    batch: int, dtype: torch.dtype, layout: str, grad: bool = False, image: Size = IMAGE
) -> list[Tensor]:
    """A pyramid on the meta device; ``"strided"``: every other column of wider maps."""
    shapes = [(batch, CHANNELS, h, w) for h, w in levels_of(image)]
    if layout == "strided":
        found = [
            torch.empty(*shape[:3], 2 * shape[3], dtype=dtype, device="meta")[..., ::2] for shape in shapes
        ]
    else:
        found = [
            torch.empty(shape, dtype=dtype, device="meta", memory_format=LAYOUTS[layout]) for shape in shapes
        ]
    return [x.requires_grad_(grad) for x in found]


def _masks(batch: int, image: Size) -> list[Tensor]:
    return [torch.empty(batch, h, w, dtype=torch.bool, device="meta") for h, w in levels_of(image)]


def _pyramid(
    op: Callable,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    valid: bool = False,
    teacher: torch.dtype | None = None,
    image: Size = IMAGE,
) -> Call:
    def call() -> None:
        s, t = maps(batch, dtype, layout, True, image), maps(batch, teacher or dtype, layout, image=image)
        op(s, t, _masks(batch, image) if valid else None, backend="triton").sum().backward()

    return call


def _mask(batch: int, dtype: torch.dtype, layout: str, image: Size = IMAGE) -> Call:
    def call() -> None:
        s = maps(batch, dtype, layout, True, image)
        out = mask_maps(s, range(batch), ratio=0.5, seed=0, epoch=0, backend="triton")
        torch.autograd.backward(out, [torch.empty_like(x) for x in out])

    return call


def _fgd(
    batch: int,
    dtype: torch.dtype,
    layout: str,
    teacher_layout: str | None = None,
    teacher: torch.dtype | None = None,
    image: Size = IMAGE,
) -> Call:
    def call() -> None:
        s = maps(batch, dtype, layout, True, image)
        t = maps(batch, teacher or dtype, teacher_layout or layout, image=image)
        boxes = [torch.empty(BOXES, 4, device="meta") for _ in range(batch)]
        ws, wt = ([torch.empty(CHANNELS, device="meta", requires_grad=True) for _ in s] for _ in range(2))
        sums = fgd_sums(s, t, boxes, [image] * batch, ws, wt, backend="triton")
        outputs = [sums.terms, sums.vectors]
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])

    return call


def _usual(stem: str, make: Callable[..., Call], label: str = "", **options: Any) -> Iterator[Case]:
    """Every dtype and layout, 2 and 16 images."""
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS:
            for batch in (2, 16):
                what = " ".join(x for x in (name, layout, f"n{batch}", label) if x)
                yield Case(stem, what, make(batch=batch, dtype=dtype, layout=layout, **options))


def _pyramid_cases() -> Iterator[Case]:
    bf16, fp32 = DTYPES.values()
    yield from _usual("pyramid_l2", _pyramid, op=pyramid_l2)
    yield from _usual("pyramid_l2", _pyramid, "valid", op=pyramid_l2, valid=True)
    yield Case("pyramid_l2", "l1 bf16 contiguous", _pyramid(pyramid_l1, 2, bf16, "contiguous"))
    yield Case(
        "pyramid_l2",
        "l1 fp32 channels_last valid",
        _pyramid(pyramid_l1, 2, fp32, "channels_last", valid=True),
    )
    mixed = _pyramid(pyramid_l2, 2, bf16, "contiguous", teacher=fp32)
    yield Case("pyramid_l2", "bf16 student, fp32 teacher", mixed)
    strided = _pyramid(pyramid_l2, 2, fp32, "strided", valid=True)
    yield Case("pyramid_l2", "fp32 strided valid", strided, aligned=False)


def _mask_cases() -> Iterator[Case]:
    yield from _usual("masked_l2", _mask)
    yield Case("masked_l2", "fp32 strided", _mask(2, torch.float32, "strided"), aligned=False)


def _fgd_cases() -> Iterator[Case]:
    bf16, fp32 = DTYPES.values()
    yield from _usual("fgd", _fgd)
    yield Case("fgd", "bf16 student, fp32 teacher", _fgd(2, bf16, "contiguous", teacher=fp32))
    mixed = _fgd(2, bf16, "channels_last", teacher_layout="contiguous")
    yield Case("fgd", "bf16 channels_last student, contiguous teacher", mixed, aligned=False)
    yield Case("fgd", "fp32 strided", _fgd(2, fp32, "strided"), aligned=False)


def _plan(batch: int, sigma: float) -> dict[str, Any]:
    return dict(sigma=torch.full((batch,), sigma), ids=torch.arange(batch), seed=0, epoch=0, backend="triton")


def _augment(
    dtype: torch.dtype, layout: str, sigma: float, batch: int = 2, image: Size = DECODED, chw: bool = False
) -> Call:
    def call() -> None:
        h, w = image
        window = (0, 0, w, h) if sigma else (16, 8, w - 40, h - 24)
        size = (-(-h // 32) * 32, -(-w // 32) * 32)
        augment_batch(
            [torch.empty((3, h, w) if chw else (h, w, 3), dtype=torch.uint8, device="meta")] * batch,
            torch.tensor([window] * batch),
            torch.tensor([i % 2 == 0 for i in range(batch)]),
            layout="CHW" if chw else "HWC",
            swap_channels=True,
            mean=MEAN,
            std=STD,
            size=size,
            dtype=dtype,
            channels_last=layout == "channels_last",
            **_plan(batch, sigma),
        )

    return call


def _noise(dtype: torch.dtype, layout: str, batch: int = 2, image: Size = IMAGE) -> Call:
    def call() -> None:
        x = torch.empty(batch, 3, *image, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])
        x.requires_grad_(dtype.is_floating_point)
        grey = [1 / s for s in STD]
        low = [-m / s for m, s in zip(MEAN, STD, strict=True)]
        high = [(255 - m) / s for m, s in zip(MEAN, STD, strict=True)]
        out = add_noise(x, grey_level=grey, low=low, high=high, **_plan(batch, SIGMA))
        if out.requires_grad:
            out.backward(torch.empty_like(out))

    return call


def _augment_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS:
            for label, sigma in (("crop", 0.0), ("noise", SIGMA)):
                yield Case("augment_batch", f"{label} to {name} {layout}", _augment(dtype, layout, sigma))
    yield Case(
        "augment_batch",
        "noise, planar, to bf16 contiguous",
        _augment(torch.bfloat16, "contiguous", SIGMA, chw=True),
    )


def _noise_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS:
            yield Case("add_noise", f"{name} {layout}", _noise(dtype, layout))
    yield Case("add_noise", "uint8 contiguous", _noise(torch.uint8, "contiguous"))
    ragged = _noise(torch.float32, "contiguous", image=DECODED)
    yield Case("add_noise", "fp32, 1333 columns", ragged, aligned=False)


def sized_cases() -> Iterator[Case]:
    """One dtype and layout over many image sizes and batches: what multi-scale training launches."""
    for image in SIZES:
        for batch in (1, 2, 3):
            name = f"{image[0]}x{image[1]} n{batch}"
            options: dict[str, Any] = dict(
                batch=batch, dtype=torch.bfloat16, layout="contiguous", image=image
            )
            yield Case("pyramid_l2", name, _pyramid(op=pyramid_l2, **options))
            yield Case("masked_l2", name, _mask(**options))
            yield Case("fgd", name, _fgd(**options))
            for stem, op in PAIR_OPS.items():
                yield Case(stem, name, pair_call(op, maps, **options))
            yield Case("augment_batch", name, _augment(sigma=SIGMA, **options))
            yield Case("add_noise", name, _noise(**options))
            yield Case("attention_stats", name, attention(maps, **options))
            for stem, call in (*sized(**options), *sized_diversity(**options)):
                yield Case(stem, name, call)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "pyramid_l2": _pyramid_cases,
    "masked_l2": _mask_cases,
    "fgd": _fgd_cases,
    "attention_stats": lambda: attention_cases(maps),
    "channel_kl": lambda: channel_kl_cases(maps),
    "augment_batch": _augment_cases,
    "add_noise": _noise_cases,
    "apply_delta": apply_cases,
    "fgsm_step": step_cases,
    "input_diversity": diversity_cases,
    "sign_step": sign_cases,
    "ssim": lambda: ssim_cases(maps),
    "pearson": lambda: pearson_cases(maps),
}
