"""Perturbations in 2, 4 or 8 bits a cell: levels, packing, starting points, and where cells lie in a view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import Stream, uniform

BITS = (2, 4, 8)


@dataclass(frozen=True)
class DeltaCodes:
    """Evenly spaced grey levels around 0 and their packing: ``value(code) = (code - levels // 2) * spacing``.

    A *record* is the flat uint8 tensor of one image's cells ``[C, Hc, Wc]``: every row starts on a byte, the cell with the
    smaller column in the lower bits of its byte, unused bits 0.

    Args:
        bits: bits a cell, 2, 4 or 8.
        levels: how many, odd, at most ``2**bits - 1``.
        spacing: grey levels (0..255 scale) from one level to the next.

    Raises:
        ValueError: other bits, an even or too large number of levels, a spacing that is not positive and finite.

    >>> codes = DeltaCodes.of(eps=8, step=2, bits=4)
    >>> codes
    DeltaCodes(bits=4, levels=9, spacing=2.0)
    >>> codes.decode(codes.encode(torch.tensor([-9.0, -1.2, 0.0, 5.1]))).tolist()
    [-8.0, -2.0, 0.0, 6.0]
    >>> codes.nbytes(3, 800, 1333)
    1600800
    """

    bits: int
    levels: int
    spacing: float

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {list(BITS)}, got {self.bits!r}")
        most = 2**self.bits - 1
        if not (isinstance(self.levels, int) and self.levels % 2 and 1 <= self.levels <= most):
            raise ValueError(
                f"levels must be an odd integer in 1..{most} at {self.bits} bits, got {self.levels!r}"
            )
        if not 0 < self.spacing < math.inf:
            raise ValueError(f"spacing must be a finite number of grey levels > 0, got {self.spacing!r}")

    @classmethod
    def of(cls, eps: float, step: float, bits: int = 4) -> DeltaCodes:
        """Levels for an attack of radius ``eps`` that moves by ``step``, both in grey levels.

        The multiples of ``step`` where ``eps`` is one and they fit; else as many levels as fit, spread evenly over
        ``[-eps, eps]``. ``eps`` 0 has the one level 0.

        Raises:
            ValueError: other bits, eps negative or not finite, a step below half the spacing, which would be rounded away.

        >>> DeltaCodes.of(eps=8, step=10, bits=4).levels, DeltaCodes.of(eps=8, step=10, bits=2)
        (15, DeltaCodes(bits=2, levels=3, spacing=8.0))
        """
        if bits not in BITS:
            raise ValueError(f"bits must be one of {list(BITS)}, got {bits!r}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be a finite number of grey levels >= 0, got {eps!r}")
        if not 0 <= step < math.inf:
            raise ValueError(f"step must be a finite number of grey levels >= 0, got {step!r}")
        if eps == 0:
            return cls(bits, 1, 1.0)
        half = 2 ** (bits - 1) - 1
        ratio = eps / step if step else math.inf
        if 1 <= ratio < half + 0.5 and math.isclose(ratio, round(ratio), rel_tol=1e-9):
            half = round(ratio)
        codes = cls(bits, 2 * half + 1, eps / half)
        if step < codes.spacing / 2:
            least = codes.spacing / 2
            wider = next(
                (f", or bits={b}" for b in BITS if b > bits and eps / (2 ** (b - 1) - 1) <= 2 * step), ""
            )
            raise ValueError(
                f"step={step:g} is below half of the {codes.spacing:g} grey levels between levels (eps={eps:g}, bits={bits}) and "
                f"would be rounded away; write step={math.ceil(least * 1e6) / 1e6:g} or more{wider}"
            )
        return codes

    @property
    def limit(self) -> float:
        """The largest value, in grey levels."""
        return (self.levels // 2) * self.spacing

    @property
    def per_byte(self) -> int:
        """Cells in a byte."""
        return 8 // self.bits

    def encode(self, grey: Tensor) -> Tensor:
        """The nearest level of each value (grey levels, clamped to the limit), uint8; a tie goes to the even one."""
        half = self.levels // 2
        return (grey / self.spacing).round_().clamp_(-half, half).add_(half).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Grey levels of codes, float32."""
        return codes.to(torch.float32).sub_(self.levels // 2).mul_(self.spacing)

    def pitch(self, width: int) -> int:
        """Bytes of a row of ``width`` cells."""
        return -(-width // self.per_byte)

    def nbytes(self, channels: int, height: int, width: int) -> int:
        """Bytes of a record of ``[channels, height, width]`` cells."""
        return channels * height * self.pitch(width)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 ``[C, H, W]`` in ``0..levels - 1`` to a record, uint8 ``[nbytes(C, H, W)]``."""
        if codes.dtype != torch.uint8 or codes.dim() != 3:
            raise ValueError(f"codes must be uint8 [C, H, W], got {codes.dtype} {list(codes.shape)}")
        return pack_rows(codes, self.bits).flatten()

    def unpack(self, record: Tensor, shape: Sequence[int]) -> Tensor:
        """A record to its codes, uint8 ``[C, H, W]``."""
        channels, height, width = shape
        self.check_record("record", record, channels, (height, width))
        rows = record.reshape(channels, height, self.pitch(width))
        return unpack_rows(rows, self.bits)[..., :width]

    def start(
        self,
        shape: Sequence[int],
        *,
        seed: int,
        id: int,
        epoch: int,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A record of ``[C, Hc, Wc]`` cells that holds the nearest levels to keyed U[-limit, limit).

        Cell (c, y, x) takes number ``(c * Hc + y) * W4 + x`` of the START stream, W4 = Wc rounded up to a multiple of 4.
        """
        channels, height, width = shape
        pitch = -(-width // 4) * 4
        u = uniform(
            (channels, height, pitch), seed=seed, id=id, epoch=epoch, stream=Stream.START, device=device
        )
        return self.pack(self.encode(u[..., :width].mul(2).sub_(1).mul_(self.limit)))

    def check_record(self, name: str, record: Tensor, channels: int, cells: Sequence[int]) -> None:
        """ValueError unless ``record`` is the flat contiguous uint8 tensor of ``[channels, *cells]`` cells."""
        expected = self.nbytes(channels, *cells)
        if record.dtype != torch.uint8 or tuple(record.shape) != (expected,) or not record.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous uint8 [{expected}] for {channels}x{cells[0]}x{cells[1]} cells of {self.bits} bits, "
                f"got {record.dtype} {list(record.shape)}"
                + ("" if record.is_contiguous() else " with strides")
            )


@dataclass(frozen=True, eq=False)
class CellMap:
    """Where the cells of one image lie in the frame of a view: integer tables, so that flips and crops are exact.

    Args:
        cells: (Hc, Wc).
        x_cell: int32 ``[W]``, the cell column of every column of the (padded) frame, -1 on padding or outside; CPU.
        y_cell: int32 ``[H]``, the same for rows.
        x_span: int32 ``[Wc, 2]``, the frame's columns ``[start, stop)`` of every cell column, empty where the view does not
            reach it; spans may overlap. CPU.
        y_span: int32 ``[Hc, 2]``, the same for rows.

    Raises:
        ValueError: other dtypes, shapes or devices, cells or spans out of range.

    >>> columns, spans = torch.tensor([1, 0, -1], dtype=torch.int32), torch.tensor([[1, 2], [0, 1]], dtype=torch.int32)
    >>> CellMap((2, 2), columns, columns, spans, spans).frame
    (3, 3)
    """

    cells: tuple[int, int]
    x_cell: Tensor
    y_cell: Tensor
    x_span: Tensor
    y_span: Tensor

    def __post_init__(self) -> None:
        if len(self.cells) != 2 or min(self.cells) < 1:
            raise ValueError(f"cells must be (Hc, Wc), both >= 1, got {self.cells}")
        for axis, count in zip("yx", self.cells, strict=True):
            cell, span = getattr(self, f"{axis}_cell"), getattr(self, f"{axis}_span")
            for name, table, shape in ((f"{axis}_cell", cell, "[n]"), (f"{axis}_span", span, [count, 2])):
                fits = table.dim() == 1 and len(table) if shape == "[n]" else list(table.shape) == shape
                if not fits or table.dtype != torch.int32 or table.device.type != "cpu":
                    raise ValueError(
                        f"{name}: expected int32 {shape} on the CPU, got {table.dtype} {list(table.shape)} on {table.device}"
                    )
            low, high = int(cell.min()), int(cell.max())
            if low < -1 or high >= count:
                raise ValueError(f"{axis}_cell: expected cells in -1..{count - 1}, got {low}..{high}")
            start, stop = span.unbind(1)
            if bool((start > stop).any()) or int(start.min()) < 0 or int(stop.max()) > len(cell):
                raise ValueError(
                    f"{axis}_span: expected 0 <= start <= stop <= {len(cell)} in every row, got "
                    f"{int(span.min())}..{int(span.max())}"
                    + (", start > stop" if bool((start > stop).any()) else "")
                )

    @property
    def frame(self) -> tuple[int, int]:
        """(H, W) of the frame."""
        return len(self.y_cell), len(self.x_cell)


# Codes of a byte as the bytes of a word, the first in the lowest: little-endian, as every machine torch runs kernels on.
_WORDS = {4: (torch.int16, 0x0F0F), 2: (torch.int32, 0x03030303)}


def unpack_rows(rows: Tensor, bits: int) -> Tensor:
    """Bytes ``[..., pitch]`` to codes ``[..., pitch * 8 // bits]``."""
    if bits == 8:
        return rows
    dtype, mask = _WORDS[bits]
    byte = rows.to(dtype)
    word = byte.clone()
    for i in range(1, 8 // bits):
        word.bitwise_or_(byte << (8 - bits) * i)
    return word.bitwise_and_(mask).view(torch.uint8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., W]`` below ``2**bits`` to bytes ``[..., pitch]``; bits of a byte beyond the last code are 0."""
    if bits == 8:
        return codes.contiguous()
    per = 8 // bits
    if short := -codes.shape[-1] % per:
        codes = torch.nn.functional.pad(codes, (0, short))
    codes = codes.contiguous()
    if codes.storage_offset() % per:
        codes = codes.clone()
    word = codes.view(_WORDS[bits][0])
    out = word.clone()
    for i in range(1, per):
        out.bitwise_or_(word >> (8 - bits) * i)
    return out.to(torch.uint8)
