"""A random crop, scale, flip and brightness whose draws depend on nothing but (seed, image, epoch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from ikd_fast.kernels.reference.philox import Stream, draw
from ikd_fast.mmdet.progress import SharedEpoch
from ikd_fast.mmdet.samples import image_key

from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import BaseBoxes, HorizontalBoxes

_DIRECTIONS = {
    (True, False): "horizontal",
    (False, True): "vertical",
    (True, True): "diagonal",
    (False, False): None,
}


@dataclass(frozen=True)
class CropDraw:
    """What is done to one image: window (x1, y1, x2, y2) in its pixels, output (w, h), flips, brightness factor."""

    window: tuple[int, int, int, int]
    size: tuple[int, int]
    hflip: bool
    vflip: bool
    gain: float

    @property
    def scale_factor(self) -> tuple[float, float]:
        """(w, h) output pixels per source pixel."""
        x1, y1, x2, y2 = self.window
        return self.size[0] / (x2 - x1), self.size[1] / (y2 - y1)

    def boxes(self, boxes: np.ndarray, min_kept: float) -> tuple[np.ndarray, np.ndarray]:
        """``[n,4]`` xyxy source boxes -> clipped boxes in the output, and the indices of those that are kept."""
        sx, sy = self.scale_factor
        w, h = self.size
        moved = (boxes.reshape(-1, 4).astype(np.float64) - np.tile(self.window[:2], 2)) * (sx, sy, sx, sy)
        clipped = np.stack([moved[:, i].clip(0, (w, h)[i % 2]) for i in range(4)], axis=1)
        sides, before = clipped[:, 2:] - clipped[:, :2], moved[:, 2:] - moved[:, :2]
        keep = np.flatnonzero((sides >= 1).all(1) & (sides.prod(1) >= min_kept * before.prod(1)))
        clipped = clipped[keep]
        if self.hflip:
            clipped[:, 0::2] = w - clipped[:, 2::-2]
        if self.vflip:
            clipped[:, 1::2] = h - clipped[:, 3::-2]
        return clipped.astype(np.float32), keep

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """``[H,W,C]`` uint8 source image -> ``[h,w,C]`` uint8 output."""
        x1, y1, x2, y2 = self.window
        out = cv2.resize(image[y1:y2, x1:x2], self.size, interpolation=cv2.INTER_LINEAR)
        out = out[:: -1 if self.vflip else 1, :: -1 if self.hflip else 1]
        if self.gain != 1.0:
            out = (out.astype(np.float32) * self.gain).round().clip(0, 255).astype(image.dtype)
        return np.ascontiguousarray(out)


@TRANSFORMS.register_module()
class KeyedRandomCrop(BaseTransform):
    """Crop a window at a random scale to a fixed size, flip it and change its brightness, the same way on every machine.

    Every draw is Philox of (seed, image, epoch): the same image in the same epoch gives the same crop whatever the batch
    size, the number of workers or a resume. The scale is log-uniform; the window is ``size / scale`` source pixels, less
    where the image ends (the output is then smaller than ``size`` too, and mmdet pads the batch).

    The epoch is shared with loader workers; :class:`ikd_fast.mmdet.hooks.IKDHook` calls :meth:`set_epoch` before each one.

    Args:
        size: side of the output in pixels.
        scale: lowest and highest scale, output pixels per source pixel.
        hflip_prob, vflip_prob: probabilities of a mirror along x and y.
        brightness: the factor is uniform in ``1 +- brightness``, 0..1.
        min_kept: a box stays if this share of its area (0..1) and a pixel on each side are left.
        seed: non-negative integer.

    Required keys: ``img`` (uint8 ``[H,W,C]``), ``img_path``, ``img_id``. Changed: ``img``, ``gt_bboxes``,
    ``gt_bboxes_labels``, ``gt_ignore_flags``. Set: ``img_shape``, ``scale_factor``, ``flip``, ``flip_direction``,
    ``homography_matrix``.
    """

    def __init__(
        self,
        size: int = 256,
        scale: tuple[float, float] = (0.75, 1.4),
        hflip_prob: float = 0.5,
        vflip_prob: float = 0.5,
        brightness: float = 0.2,
        min_kept: float = 0.4,
        seed: int = 0,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {scale}")
        shares = dict(hflip_prob=hflip_prob, vflip_prob=vflip_prob, brightness=brightness, min_kept=min_kept)
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        self.size, self.scale, self.seed = size, (float(scale[0]), float(scale[1])), seed
        self.hflip_prob, self.vflip_prob, self.brightness, self.min_kept = (
            hflip_prob,
            vflip_prob,
            brightness,
            min_kept,
        )
        self._epoch = SharedEpoch()

    @property
    def epoch(self) -> int:
        """The epoch the draws are for, as every worker sees it; raises before the first :meth:`set_epoch`."""
        return self._epoch.require("KeyedRandomCrop")

    def set_epoch(self, epoch: int) -> None:
        """Draw for ``epoch`` from now on, in this process and in loader workers that it has started or will start."""
        self._epoch.set(epoch)

    def draw(self, key: int, width: int, height: int) -> CropDraw:
        """The crop of a ``width`` x ``height`` image with this key (:func:`ikd_fast.mmdet.samples.image_key`) in this epoch."""
        u_scale, u_x, u_y, u_gain = draw(self.seed, key, self.epoch, Stream.LOADER, 0)
        u_hflip, u_vflip, _, _ = draw(self.seed, key, self.epoch, Stream.LOADER, 1)
        low, high = self.scale
        scale = low * (high / low) ** u_scale
        side = max(int(self.size / scale + 0.5), 1)
        w, h = min(side, width), min(side, height)
        x, y = int(u_x * (width - w + 1)), int(u_y * (height - h + 1))
        # A full window is exactly `size` wide; one cut short by the image keeps the scale.
        out_w, out_h = (self.size if n == side else max(int(n * scale + 0.5), 1) for n in (w, h))
        gain = 1 + self.brightness * (2 * u_gain - 1)
        return CropDraw(
            (x, y, x + w, y + h), (out_w, out_h), u_hflip < self.hflip_prob, u_vflip < self.vflip_prob, gain
        )

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Apply the crop of this image and epoch; raises if the pipeline loaded masks or the image is not uint8."""
        image = results["img"]
        if image.dtype != np.uint8:
            raise TypeError(
                f"KeyedRandomCrop expects uint8 images, got {image.dtype}: write it before any normalisation"
            )
        crop = self.draw_for(results)
        results["img"] = crop.pixels(image)
        self.record(results, crop)
        return results

    def draw_for(self, results: dict[str, Any]) -> CropDraw:
        """The crop of ``results``' image in this epoch; its pixels are looked at for their shape only."""
        if results.get("gt_masks") is not None:
            raise ValueError(
                "KeyedRandomCrop moves boxes only: write dict(type='LoadAnnotations', with_bbox=True) before it"
            )
        height, width = results["img"].shape[:2]
        return self.draw(image_key(results), width, height)

    def record(self, results: dict[str, Any], crop: CropDraw) -> None:
        """All that ``crop`` changes in ``results`` but the pixels: boxes and the geometry's keys."""
        results["img_shape"] = crop.size[::-1]
        results["scale_factor"] = crop.scale_factor
        direction = _DIRECTIONS[crop.hflip, crop.vflip]
        results["flip"], results["flip_direction"] = direction is not None, direction
        results["homography_matrix"] = _homography(crop)
        if "gt_bboxes" in results:
            self._move_boxes(results, crop)

    def _move_boxes(self, results: dict[str, Any], crop: CropDraw) -> None:
        given = results["gt_bboxes"]
        wrapped = isinstance(given, BaseBoxes)
        boxes, keep = crop.boxes(given.numpy() if wrapped else np.asarray(given), self.min_kept)
        results["gt_bboxes"] = HorizontalBoxes(torch.from_numpy(boxes)) if wrapped else boxes
        for name in ("gt_bboxes_labels", "gt_ignore_flags"):
            if name in results:
                results[name] = results[name][keep]

    def __repr__(self) -> str:
        names = ("size", "scale", "hflip_prob", "vflip_prob", "brightness", "min_kept", "seed")
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)}' for n in names)})"


def _homography(crop: CropDraw) -> np.ndarray:
    """``[3,3]`` float32: source pixel coordinates to output pixel coordinates."""
    (sx, sy), (w, h) = crop.scale_factor, crop.size
    matrix = np.array([[sx, 0, -sx * crop.window[0]], [0, sy, -sy * crop.window[1]], [0, 0, 1]])
    mirror = np.array(
        [
            [-1 if crop.hflip else 1, 0, w * crop.hflip],
            [0, -1 if crop.vflip else 1, h * crop.vflip],
            [0, 0, 1],
        ]
    )
    return (mirror @ matrix).astype(np.float32)
