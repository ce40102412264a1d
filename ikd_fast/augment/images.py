"""Lists and stacks of images, HWC and CHW, tensors and arrays: seen as CHW, given back as they came."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Images = Any  # Tensor [N,3,H,W] | list of Tensor or numpy array, [3,H,W] or [H,W,3]


def as_tensor(image: Any, name: str) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, np.ndarray):
        with warnings.catch_warnings():  # a read-only array is fine here: it is never written
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(np.ascontiguousarray(image))
    raise TypeError(
        f"{name}: expected a tensor or a numpy array, got {type(image).__name__}; "
        "write torch.as_tensor(image)"
    )


def own(cut: Tensor, source: Tensor) -> Tensor:
    """Contiguous, and no view of ``source``: what the caller writes into the result never reaches the input."""
    shared = cut.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return cut.clone(memory_format=torch.contiguous_format) if shared else cut.contiguous()


def _is_hwc(shape: Sequence[int], name: str) -> bool:
    if len(shape) != 3 or 3 not in (shape[0], shape[2]):
        hint = (
            "; stack images of one size into [N, 3, H, W] or give a list of [3, H, W]"
            if len(shape) == 4
            else ""
        )
        raise ValueError(f"{name}: expected [3, H, W] or [H, W, 3], got {list(shape)}{hint}")
    return shape[0] != 3


@dataclass
class Batch:
    """Images as they came (``source``) and CHW views of their valid part (``views``)."""

    source: Images
    views: list[Tensor]
    hwc: list[bool]

    @property
    def stacked(self) -> bool:
        return isinstance(self.source, Tensor)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(v.shape[1], v.shape[2]) for v in self.views]

    @property
    def device(self) -> torch.device | None:
        return self.views[0].device if self.views else None

    @classmethod
    def of(cls, images: Images, sizes: Sequence[tuple[int, int] | None] | None = None) -> Batch:
        """Check and unpack. ``sizes``: valid (h, w) of each image in a padded stack, None for all of it."""
        if isinstance(images, Tensor):
            if images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(
                    f"images: expected a stack [N, 3, H, W] or a list of [3, H, W] or [H, W, 3], "
                    f"got {list(images.shape)}; write images[None] for one image, images.permute(0, 3, 1, 2) for [N, H, W, 3]"
                )
            views = [cls._valid(images[i], sizes[i] if sizes else None, i) for i in range(len(images))]
            return cls(images, views, [False] * len(views))
        if not isinstance(images, (list, tuple)):
            raise TypeError(
                f"images: expected a tensor [N, 3, H, W] or a list, got {type(images).__name__}; "
                "write [image]"
            )
        views, hwc = [], []
        for i, image in enumerate(images):
            tensor = as_tensor(image, f"images[{i}]")
            hwc.append(_is_hwc(tensor.shape, f"images[{i}]"))
            views.append(tensor.permute(2, 0, 1) if hwc[-1] else tensor)
            first = views[0]
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"images[{i}]: expected {first.dtype} on {first.device} as images[0], "
                    f"got {tensor.dtype} on {tensor.device}; write image.to({str(first.device)!r}, {first.dtype})"
                )
        return cls(images, views, hwc)

    @staticmethod
    def _valid(image: Tensor, size: tuple[int, int] | None, i: int) -> Tensor:
        if size is None:
            return image
        h, w = size
        if not (0 < h <= image.shape[1] and 0 < w <= image.shape[2]):
            raise ValueError(
                f"targets[{i}]['size']: expected (h, w) within the stack's {tuple(image.shape[1:])}, "
                f"got {(h, w)}; images of different size go in a list, or are padded to one size before torch.stack"
            )
        return image[:, :h, :w]

    def rebuild(self, views: list[Tensor], changed: Callable[[int], bool], *, clear: bool) -> Images:
        """Images like ``source`` with new CHW contents. Unchanged ones are returned as they are, none is written.

        Stacks keep their shape, contents at the top left, the rest zero (``clear``) or as it was.
        """
        if self.stacked:
            if not any(changed(i) for i in range(len(views))):
                return self.source
            out = self.source.clone()
            for i, view in enumerate(views):
                if changed(i):
                    if clear:
                        out[i].zero_()
                    out[i, :, : view.shape[1], : view.shape[2]] = view
            return out
        return [self._item(i, view) if changed(i) else self.source[i] for i, view in enumerate(views)]

    def _item(self, i: int, view: Tensor) -> Any:
        item = own(view.permute(1, 2, 0) if self.hwc[i] else view, self.views[i])
        return item.numpy() if isinstance(self.source[i], np.ndarray) else item
