"""Maps of cells for tests, built pixel by pixel: flips, crops, scales, strides and padding in one frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ikd_fast.kernels import CellMap


@dataclass(frozen=True)
class Axis:
    """View pixel edges = scale * canonical pixel edges + offset; a mirror has a negative scale."""

    canonical: int
    valid: int
    stride: int = 1
    scale: float = 1.0
    offset: float = 0.0

    @property
    def cells(self) -> int:
        return math.ceil(self.canonical / self.stride)

    def tables(self, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        cell = [-1] * frame
        for pixel in range(self.valid):
            source = math.floor((pixel + 0.5 - self.offset) / self.scale)
            if 0 <= source < self.canonical:
                cell[pixel] = source // self.stride
        span = []
        for k in range(self.cells):
            found = [pixel for pixel in range(frame) if cell[pixel] == k]
            centre = math.floor(self.scale * (k + 0.5) * self.stride + self.offset)
            if not found and 0 <= centre < self.valid:
                found = [centre]
            span.append([found[0], found[-1] + 1] if found else [0, 0])
        return torch.tensor(cell, dtype=torch.int32), torch.tensor(span, dtype=torch.int32)


# (rows, columns) of images in a frame of 13 x 21, or larger. Together: every way that a cell can lie in a view.
VIEWS = {
    "identity": (Axis(13, 13), Axis(21, 21)),
    "padded": (Axis(9, 9), Axis(17, 17)),
    "mirrored": (Axis(13, 13), Axis(19, 19, scale=-1, offset=19)),
    "cropped": (Axis(30, 11, offset=-7), Axis(41, 20, offset=-13)),
    "cropped, mirrored": (Axis(30, 11, offset=-7), Axis(41, 20, scale=-1, offset=37)),
    "stride 2": (Axis(13, 13, 2), Axis(21, 21, 2)),
    "stride 2, cropped, mirrored": (Axis(15, 12, 2, offset=-3), Axis(23, 18, 2, scale=-1, offset=18)),
    "scale 0.75": (Axis(16, 12, scale=0.75), Axis(27, 20, scale=0.75)),
    "scale 1.4": (Axis(8, 11, scale=1.4), Axis(14, 19, scale=1.4)),
    "scale 1.4, stride 2, mirrored": (Axis(9, 12, 2, scale=1.4), Axis(15, 21, 2, scale=-1.4, offset=21)),
    "scale 0.75, stride 2, both mirrored": (
        Axis(16, 12, 2, scale=-0.75, offset=12),
        Axis(25, 18, 2, scale=-0.75, offset=18.75),
    ),
    "one pixel": (Axis(1, 1), Axis(1, 1)),
    "moved inwards": (Axis(5, 13, offset=4), Axis(6, 21, offset=3)),
    "nothing in view": (Axis(9, 9), Axis(5, 5, offset=-40)),
}


def cell_map(view: tuple[Axis, Axis], frame: tuple[int, int] = (13, 21)) -> CellMap:
    (y_cell, y_span), (x_cell, x_span) = (a.tables(n) for a, n in zip(view, frame, strict=True))
    return CellMap((view[0].cells, view[1].cells), x_cell, y_cell, x_span, y_span)


def all_maps(frame: tuple[int, int] = (13, 21)) -> list[CellMap]:
    return [cell_map(view, frame) for view in VIEWS.values()]
