"""What is accepted as boxes, sizes and ids, and what is said when it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ikd_fast.kernels.reference.philox import stable_id


def same_length(n: int, what: str, **lists: Sequence[Any] | None) -> None:
    for name, value in lists.items():
        if value is not None and len(value) != n:
            raise ValueError(f"{name}: expected {n} entries, one per image ({what}), got {len(value)}")


def host_sizes(sizes: Any) -> list[tuple[int, int]]:
    """[(h, w)] as Python integers."""
    rows = sizes.tolist() if isinstance(sizes, (Tensor, np.ndarray)) else list(sizes)
    out = []
    for i, row in enumerate(rows):
        if len(row) < 2 or int(row[0]) < 1 or int(row[1]) < 1:
            raise ValueError(f"sizes[{i}]: expected (h, w), both >= 1, got {tuple(row)}")
        out.append((int(row[0]), int(row[1])))
    return out


def host_ids(ids: Any) -> list[int]:
    """64-bit keys: integers modulo 2**64, strings hashed."""
    rows = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else list(ids)
    return [stable_id(row) for row in rows]


def as_boxes(boxes: Any, name: str) -> Tensor:
    """``[n, 4]`` tensor on its device; an empty list is no boxes."""
    if not isinstance(boxes, Tensor):
        boxes = torch.as_tensor(np.asarray(boxes, dtype=None if len(boxes) else np.float32))
    if boxes.numel() == 0:
        return boxes.reshape(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: expected [n, 4], got {list(boxes.shape)}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"{name}: expected float or integer boxes, got {boxes.dtype}")
    return boxes


def as_flags(flags: Any, n: int, name: str) -> Tensor:
    flags = torch.as_tensor(np.asarray(flags)) if not isinstance(flags, Tensor) else flags
    if flags.numel() != n:
        raise ValueError(f"{name}: expected {n} flags, one per box, got {flags.numel()}")
    return flags.reshape(n).to(torch.bool)


def counted_boxes(
    boxes: Any, size: tuple[int, int], box_format: str, degenerate: str, ignore: Any, i: int
) -> np.ndarray:
    """Boxes of image ``i`` that count for its plan: float64 xyxy pixels, checked.

    Raises:
        ValueError: boxes on a device, NaN, infinite or inverted; with ``degenerate="error"`` also those that cover
            nothing of the image (zero area, or wholly outside). With "drop" these do not count.
    """
    name = f"boxes[{i}]"
    tensor = as_boxes(boxes, name)
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected boxes on the CPU, got {tensor.device}; plan before the copy to it, or write boxes.cpu()"
        )
    given = tensor.detach().to(torch.float64).numpy()
    height, width = size
    xyxy = given
    if box_format == "cxcywh_norm":
        centre, half = given[:, :2] * (width, height), given[:, 2:] * (width, height) / 2
        xyxy = np.concatenate([centre - half, centre + half], axis=1)
    x1, y1, x2, y2 = xyxy.T

    def require(good: np.ndarray, expected: str, write: str) -> None:
        if not good.all():
            j = int(np.flatnonzero(~good)[0])
            values = ", ".join(f"{v:g}" for v in given[j])
            raise ValueError(f"{name}[{j}]: expected {expected}, got ({values}); {write}")

    require(np.isfinite(xyxy).all(1), "finite numbers", "write boxes = boxes[torch.isfinite(boxes).all(1)]")
    ordered = (x1 <= x2) & (y1 <= y2)
    if box_format == "xyxy":
        write = "if the boxes are x, y, w, h write boxes[:, 2:] += boxes[:, :2]; if normalised box_format='cxcywh_norm'"
        require(ordered, "x1 <= x2 and y1 <= y2 (xyxy)", write)
    else:
        require(
            ordered, "w >= 0 and h >= 0 (cxcywh_norm)", "write box_format='xyxy' if these are pixel corners"
        )
    solid = (x1 < x2) & (y1 < y2)
    covers = solid & (x1 < width) & (x2 > 0) & (y1 < height) & (y2 > 0)
    if degenerate == "error":
        write = "drop such boxes from the targets, or write on_degenerate='drop'"
        require(solid, "a box of some area", write)
        require(covers, f"a box that overlaps its image of {height}x{width} (h x w)", write)
    if ignore is not None:
        covers = covers & ~as_flags(ignore, len(xyxy), f"ignore[{i}]").numpy()
    return xyxy[covers]


def resize_factor(scale: Any, i: int) -> tuple[float, float]:
    if scale is None:
        return 1.0, 1.0
    sx, sy = (float(v) for v in scale[:2])
    if not (0 < sx < float("inf") and 0 < sy < float("inf")):
        raise ValueError(f"scale[{i}]: expected two positive numbers (sx, sy), got {(sx, sy)}")
    return sx, sy


def croppable(size: tuple[int, int], crop_ratio: float, i: int) -> None:
    smallest = tuple(int((1 - crop_ratio) * side + 0.5) for side in size)
    if min(smallest) < 1:
        raise ValueError(
            f"sizes[{i}]: expected sides of which crop_ratio={crop_ratio} leaves a pixel, got {size} (h, w), "
            f"cropped to {smallest}; write a smaller crop_ratio, or leave such images out"
        )


def check_probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability in [0, 1], got {value}")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
