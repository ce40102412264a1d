"""What the published code does to an adversarial image between making it and training on it: the control experiment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ikd_fast.pixels import PixelUnits

Size = tuple[int, int]


def saved_size(size: Size, original: Size, shrink: float) -> Size:
    """(h, w) at which the published code saves an image: its original one; where that is the network's, ``shrink`` of it.

    >>> saved_size((800, 1067), (480, 640), 0.6), saved_size((256, 256), (256, 256), 0.6)
    ((480, 640), (154, 154))
    """
    if tuple(original) != tuple(size):
        return int(original[0]), int(original[1])
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def published_round_trip(
    images: Tensor,
    sizes: Sequence[Size],
    saved: Sequence[Size],
    units: PixelUnits,
    *,
    rgb: bool = True,
    quality: int = 95,
) -> Tensor:
    """Truncated to uint8, resized to the saved size, written as JPEG, read, resized back; bilinear both ways (OpenCV).

    Args:
        images: ``[N, 3, H, W]`` in ``units``, on any device; padding stays as it is.
        sizes, saved: (h, w) of each image in the batch and in the file.
        rgb: the channels' order; a JPEG's luma depends on it.
        quality: of the JPEG, 0..100.

    Raises:
        ImportError: no OpenCV (``pip install opencv-python``, which mmdet brings).

    >>> x = torch.full((1, 3, 8, 8), 100.9)
    >>> published_round_trip(x, [(8, 8)], [(4, 4)], PixelUnits(value_range=(0, 255)))[0, :, 3, 3].tolist()
    [100.0, 100.0, 100.0]
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("the control with JPEG needs OpenCV: pip install opencv-python") from error
    out = images.clone()
    pixels = units.to_pixels(images).clamp(0, 255)
    for i, ((h, w), (small_h, small_w)) in enumerate(zip(sizes, saved, strict=True)):
        # A normalised integer comes back a rounding below itself, and truncation would take a whole level of it.
        whole = (pixels[i, :, :h, :w] + 1e-3).floor().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        bgr = np.ascontiguousarray(whole[..., ::-1] if rgb else whole)
        small = cv2.resize(bgr, (small_w, small_h), interpolation=cv2.INTER_LINEAR)
        done, data = cv2.imencode(".jpg", small, [int(cv2.IMWRITE_JPEG_QUALITY), int(quality)])
        if not done:
            raise RuntimeError(f"OpenCV cannot write an image of {small_h}x{small_w} as JPEG")
        read = cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), (w, h), interpolation=cv2.INTER_LINEAR)
        back = torch.from_numpy(np.ascontiguousarray((read[..., ::-1] if rgb else read).transpose(2, 0, 1)))
        out[i, :, :h, :w] = units.from_pixels(back.to(images.device).float(), images.dtype)
    return out
