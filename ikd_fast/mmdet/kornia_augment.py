"""kornia augmentations as one of a data preprocessor's ``batch_augments``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ikd_fast.augment.geometry import clip_to_window, kept
from ikd_fast.pixels import PixelUnits

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes, HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData

from .progress import Progress
from .samples import box_tensor, image_key

_INSTANCES = ("gt_instances", "ignored_instances")
_IGNORE = 255


@MODELS.register_module()
class KorniaBatchAugment(nn.Module):
    """2D augmentations of kornia on the normalised, stacked batch; boxes, masks and metadata move with it::

        data_preprocessor = dict(..., mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], batch_augments=[
            dict(type='KorniaBatchAugment', augs=[dict(type='RandomHorizontalFlip', p=0.5)]),
            dict(type='KorniaBatchAugment', seed=1, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                 augs=[dict(type='RandomErasing', scale=(0.02, 0.2), ratio=(0.5, 2.0), value=0.5, p=0.5)])])

    Inside an ``IKDDistiller`` it comes after the adaptive crop and before its noise; both branches see it.
    It goes on after ``stop_at``. It needs kornia (``pip install 'ikd_fast[kornia]'``) and nothing of the distiller.

    What is drawn for an image depends on (seed, epoch, image id) alone. kornia draws from torch's global generators, so these are
    seeded for each image and put back: one image at a time, on its own pixels, without the padding, which stays zero.

    Args:
        augs: ``dict(type="RandomErasing", ...)`` by class name in ``kornia.augmentation``, or objects. Not those that warp by no
            matrix (elastic, thin plate, fisheye) or mix images (MixUp, CutMix, Mosaic, Jigsaw).
        mean, std: the preprocessor's, in grey levels: kornia works on 0..1, pixels are converted and back. Or ``value_range``. Not
            needed if all augmentations are geometric; then pixels move as they are, and uncovered ones are 0, the mean.
        seed: keys the draws; different ones for two of these in one config.
        min_kept: a moved box stays if at least this share of its area is inside the image (0..1); empty ones always go, with
            labels and masks.
        random_apply: as in ``kornia.augmentation.AugmentationSequential``.

    Boxes are the axis-aligned boxes that enclose the moved ones, clipped. ``RandomErasing`` leaves boxes as they are and erases
    masks too, as in kornia. Polygon masks come back as bitmaps. ``img_shape``, ``flip`` and ``flip_direction`` follow, and
    ``homography_matrix`` where there is one; ``scale_factor`` stays that of the loader. Output larger than the batch raises.
    Selecting boxes waits for the device, once per image.
    """

    def __init__(
        self,
        augs: Sequence[Mapping[str, Any] | nn.Module],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: tuple[float, float] | None = None,
        seed: int = 0,
        min_kept: float = 0.0,
        random_apply: Any = False,
    ) -> None:
        super().__init__()
        try:
            from ikd_fast.kornia import KeyedSequential
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "kornia":
                raise
            raise ModuleNotFoundError(
                "KorniaBatchAugment needs kornia: pip install 'ikd_fast[kornia]'", name="kornia"
            ) from None
        if not 0 <= min_kept <= 1:
            raise ValueError(f"min_kept must be a share of a box's area in [0, 1], got {min_kept}")
        self.augment = KeyedSequential(augs, seed=seed, random_apply=random_apply)
        self.units = PixelUnits(value_range, mean, std)
        if self.units == PixelUnits() and not self.augment.geometric:
            raise ValueError(
                f"{self.augment!r} changes colours, which kornia does on 0..1: say what the images are by the preprocessor's mean and "
                "std, e.g. mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], or value_range=(0, 255) without normalisation"
            )
        self.min_kept = float(min_kept)
        self.progress = Progress()

    def set_progress(self, epoch: int, step: int) -> None:
        """Where training is; :class:`~ikd_fast.mmdet.hooks.IKDHook` calls it."""
        self.progress.epoch, self.progress.step = epoch, step

    def extra_repr(self) -> str:
        return repr(self.augment)

    @torch.no_grad()
    def forward(
        self, inputs: Tensor, data_samples: list[DetDataSample]
    ) -> tuple[Tensor, list[DetDataSample]]:
        """``[N, 3, H, W]`` and its samples to new ones; the inputs are not changed."""
        epoch = self.progress.require_epoch("KorniaBatchAugment")
        images, samples = inputs.clone(), []
        for i, sample in enumerate(data_samples):
            h, w = (int(v) for v in sample.metainfo["img_shape"][:2])
            moved, out = self._one(inputs[i, :, :h, :w], sample, epoch)
            if moved is not None:
                height, width = moved.shape[-2:]
                if height > inputs.shape[-2] or width > inputs.shape[-1]:
                    raise ValueError(
                        f"{self.augment!r} made {height}x{width} (h x w) of an image of {h}x{w}, more than the batch's "
                        f"{inputs.shape[-2]}x{inputs.shape[-1]}; enlarge images in the pipeline instead"
                    )
                images[i, :, :h, :w] = 0
                images[i, :, :height, :width] = moved
            samples.append(out)
        return images, samples

    def _one(self, image: Tensor, sample: DetDataSample, epoch: int) -> tuple[Tensor | None, DetDataSample]:
        """One image and its sample; None for an image that no augmentation was drawn for."""
        if "proposals" in sample:
            raise ValueError(
                "KorniaBatchAugment moves gt_instances and ignored_instances, not precomputed proposals: remove them"
            )
        size = (image.shape[-2], image.shape[-1])
        names = [name for name in _INSTANCES if name in sample]
        fields = [sample.get(name) for name in names]
        counts = [len(field) for field in fields]
        boxes = [box_tensor(f.bboxes).reshape(-1, 4).to(image.device) for f in fields]
        layers = _layers(sample, fields, size, image.device)
        unit = self._to_unit(image)
        out = self.augment(
            unit,
            torch.cat(boxes).float() if boxes else image.new_zeros(0, 4).float(),
            torch.cat(layers) if layers else None,
            image_id=image_key(sample.metainfo),
            epoch=epoch,
        )
        if not out.changed:
            return None, sample
        new_size = (out.image.shape[-2], out.image.shape[-1])
        result = sample.new()
        layer = 0
        for name, field, moved in zip(names, fields, out.boxes.split(counts), strict=True):
            masks = None
            if "masks" in field:
                assert out.masks is not None
                masks, layer = out.masks[layer : layer + len(field)], layer + len(field)
            canvas = None if "masks" not in field else _canvas(field.masks, size, new_size)
            min_kept = self.min_kept if name == "gt_instances" else 0.0
            stays = kept(moved.double(), (0, 0, new_size[1], new_size[0]), min_kept) if out.moved else None
            result.set_field(_instances(field, moved, stays, masks, new_size, canvas), name, InstanceData)
        if "gt_sem_seg" in sample:
            assert out.masks is not None
            result.gt_sem_seg = _segmentation(sample.gt_sem_seg, out.masks[layer:], size, new_size)
        _describe(result, out, new_size)
        pixels = self._from_unit(out.image, image.dtype)
        if out.image.shape == unit.shape:
            # What kornia left alone stays exact, not rounded on the way to 0..1 and back.
            pixels = torch.where(out.image == unit, image, pixels)
        return pixels, result

    def _to_unit(self, image: Tensor) -> Tensor:
        if self.units == PixelUnits():
            return image.float()
        self.units.check(image)
        return (self.units.to_pixels(image) / 255).float().clamp(0, 1)

    def _from_unit(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        return image.to(dtype) if self.units == PixelUnits() else self.units.from_pixels(image * 255, dtype)


def _instances(
    field: InstanceData,
    moved: Tensor,
    stays: Tensor | None,
    masks: Tensor | None,
    size: tuple[int, int],
    canvas: tuple[int, int] | None,
) -> InstanceData:
    """Those that stay, with their boxes clipped to ``size``; ``stays=None``: all of them, with the boxes they have."""
    if stays is None:
        stays = torch.ones(len(field), dtype=torch.bool, device=moved.device)
        out = field.new()
    else:
        given = box_tensor(field.bboxes)
        out = field[stays.to(given.device)]
        clipped = clip_to_window(moved[stays].double(), (0, 0, size[1], size[0])).to(given)
        out.bboxes = HorizontalBoxes(clipped) if isinstance(field.bboxes, BaseBoxes) else clipped
    if masks is not None:
        assert canvas is not None
        cut = np.zeros((int(stays.sum()), *canvas), dtype=np.uint8)
        cut[:, : size[0], : size[1]] = masks[stays].cpu().numpy().astype(np.uint8)
        out.masks = BitmapMasks(cut, *canvas)
    return out


def _layers(
    sample: DetDataSample, fields: Sequence[InstanceData], size: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """Masks ``[k, h, w]`` of the instances, then the semantic map with 0 for "ignore", which is what uncovered pixels get."""
    h, w = size
    layers = [
        torch.from_numpy(np.ascontiguousarray(f.masks.to_ndarray()[:, :h, :w]).astype(np.float32)).to(device)
        for f in fields
        if "masks" in f
    ]
    if "gt_sem_seg" in sample:
        seg = sample.gt_sem_seg.sem_seg[..., :h, :w].reshape(-1, h, w).to(device).long()
        layers.append(torch.where(seg == _IGNORE, 0, seg + 1).float())
    return layers


def _canvas(masks: Any, size: tuple[int, int], new_size: tuple[int, int]) -> tuple[int, int]:
    """Masks as large as the image stay so; padded ones keep their padded size."""
    given = (int(masks.height), int(masks.width))
    return new_size if given == size else given


def _segmentation(
    seg: PixelData, layers: Tensor, size: tuple[int, int], new_size: tuple[int, int]
) -> PixelData:
    given = seg.sem_seg
    labels = layers.round().long()
    labels = torch.where(labels == 0, _IGNORE, labels - 1).to(given.device, given.dtype)
    if tuple(given.shape[-2:]) != size:
        padded = torch.full((len(labels), *given.shape[-2:]), _IGNORE, dtype=given.dtype, device=given.device)
        padded[:, : new_size[0], : new_size[1]] = labels
        labels = padded
    return PixelData(metainfo=seg.metainfo, sem_seg=labels)


def _describe(sample: DetDataSample, out: Any, size: tuple[int, int]) -> None:
    """``img_shape``, ``flip``, ``flip_direction`` and ``homography_matrix`` after the augmentation."""
    meta: dict[str, Any] = {"img_shape": size}
    if out.hflips % 2 or out.vflips % 2:
        direction = sample.metainfo.get("flip_direction") if sample.metainfo.get("flip", False) else None
        across = (direction in ("horizontal", "diagonal")) != bool(out.hflips % 2)
        down = (direction in ("vertical", "diagonal")) != bool(out.vflips % 2)
        names = {(True, True): "diagonal", (True, False): "horizontal", (False, True): "vertical"}
        meta.update(flip=across or down, flip_direction=names.get((across, down)))
    if sample.metainfo.get("homography_matrix") is not None:
        before = np.asarray(sample.metainfo["homography_matrix"])
        meta["homography_matrix"] = (out.matrix.double().cpu().numpy() @ before).astype(before.dtype)
    sample.set_metainfo(meta)
