"""mmdet's transforms without their pixels: the same objects, drawing the same numbers, on an image that is only a shape.

What they would do to the pixels is recorded as :mod:`~ikd_fast.dali.steps` for DALI's graph.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ikd_fast.augment import AdaptiveFreqAug, AugPlan, Branch
from ikd_fast.dali.errors import BadImage
from ikd_fast.dali.header import read_head
from ikd_fast.dali.steps import Step, crop, mirror, resize
from ikd_fast.mmdet.augment import AdaptiveFreqAugTransform
from ikd_fast.mmdet.pipeline_checks import HOMOGRAPHY, META_KEYS
from ikd_fast.mmdet.transforms import KeyedRandomCrop, KeyedRandomness

import mmcv.transforms as mmcv_transforms
import mmdet.datasets.transforms as mmdet_transforms
from mmcv.image import rescale_size
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine import fileio

RECORD, UNUSABLE = "ikd_dali", "ikd_unusable"
_META = ("img_id", "img_path", *META_KEYS, HOMOGRAPHY)


@dataclass
class Pixels:
    """What is to become of an image's pixels: its file, steps, a factor, and noise by ``plan`` of ``augment``."""

    encoded: np.ndarray
    steps: list[Step] = field(default_factory=list)
    gain: float = 1.0
    plan: AugPlan | None = None
    augment: AdaptiveFreqAug | None = None


def host_transforms(transforms: Sequence[Any]) -> list[Any]:
    """The transforms of a training pipeline in their pixel-free form.

    Raises:
        ValueError: one that DALI's graph has no counterpart for, or an order that it cannot follow; says which are possible.
    """
    found = [_host(t, f"pipeline[{i}]") for i, t in enumerate(transforms)]
    kinds = [type(t) for t in _flat(transforms)]
    if not kinds or kinds[0] not in _READERS or kinds[-1] is not mmdet_transforms.PackDetInputs:
        raise ValueError(
            "DALIDetLoader expects a pipeline from LoadImageFromFile to PackDetInputs, got "
            f"{[kind.__name__ for kind in kinds]}"
        )
    if AdaptiveFreqAugTransform in kinds:
        after = [k.__name__ for k in kinds[kinds.index(AdaptiveFreqAugTransform) + 1 : -1]]
        if after:
            raise ValueError(
                f"under DALIDetLoader AdaptiveFreqAug comes last, before PackDetInputs: its noise is added to what DALI gives; here "
                f"{after} follow it"
            )
    return found


def changes_levels(transforms: Sequence[Any]) -> bool:
    """Whether one of them scales the grey levels of an image."""
    return any(isinstance(t, KeyedRandomCrop) and t.brightness > 0 for t in _flat(transforms))


def _flat(transforms: Iterable[Any]) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, KeyedRandomness):
            yield from _flat(transform.transforms)
        elif isinstance(transform, mmcv_transforms.RandomChoice):
            for choice in transform.transforms:
                yield from _flat(choice.transforms)
        else:
            yield transform


def _host(transform: Any, place: str) -> Any:
    make = _HOSTS.get(type(transform))
    if make is None:
        names = sorted({kind.__name__.removesuffix("Transform") for kind in _HOSTS})
        raise ValueError(
            f"DALIDetLoader: {place} is {type(transform).__name__}, which DALI's graph has no counterpart for; it has {', '.join(names)}. "
            "Take it out, or leave type='DALIDetLoader' out of train_dataloader"
        )
    return make(transform, place)


def _with(original: Any, /, **methods: Callable[..., Any]) -> Any:
    """A copy with methods of its own, which pickle: loader workers may be spawned."""
    out = copy.copy(original)
    for name, method in methods.items():
        setattr(out, name, functools.partial(method, out))
    return out


def canvas(height: int, width: int) -> np.ndarray:
    """An image that is only a shape: one byte of memory."""
    return np.broadcast_to(np.zeros((), np.uint8), (height, width, 3))


def _reader(transform: Any, place: str) -> Any:
    if transform.color_type != "color" or transform.to_float32 or transform.imdecode_backend != "cv2":
        raise ValueError(
            f"DALIDetLoader decodes to uint8 colour, as cv2 does; {place} asks for color_type={transform.color_type!r}, "
            f"to_float32={transform.to_float32}, imdecode_backend={transform.imdecode_backend!r}"
        )
    return _with(transform, transform=_read)


def _read(self: Any, results: dict) -> dict:
    path = results["img_path"]
    _check_instances(path, results.get("instances", []))
    try:
        if self.file_client_args is not None:
            data = fileio.FileClient.infer_client(self.file_client_args, path).get(path)
        else:
            data = fileio.get(path, backend_args=self.backend_args)
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from None
    try:
        head = read_head(data)
    except ValueError as error:
        raise BadImage(path, str(error)) from None
    results["img"] = canvas(head.height, head.width)
    results["img_shape"] = results["ori_shape"] = (head.height, head.width)
    results[RECORD] = Pixels(np.frombuffer(data, np.uint8))
    return results


def _check_instances(path: str, instances: Sequence[dict]) -> None:
    for i, instance in enumerate(instances):
        if UNUSABLE in instance:
            raise BadImage(
                path, f"an annotation's bbox is {instance[UNUSABLE]}; expected four finite numbers"
            )
        if not np.isfinite(instance["bbox"]).all():
            raise BadImage(path, f"box {i} is {instance['bbox']}; expected finite numbers")


def _annotations(transform: Any, place: str) -> Any:
    if transform.with_seg:
        raise ValueError(
            f"DALIDetLoader: {place} is LoadAnnotations(with_seg=True); expected boxes and masks only"
        )
    return transform


def _resize(transform: Any, place: str) -> Any:
    if transform.interpolation != "bilinear" or transform.backend != "cv2":
        raise ValueError(
            f"DALIDetLoader resizes as cv2's bilinear does; {place} asks for {transform.interpolation!r} of {transform.backend!r}"
        )
    return _with(transform, _resize_img=_resize_canvas)


def _resize_canvas(self: Any, results: dict) -> None:
    height, width = results["img"].shape[:2]
    scale = results["scale"]
    if self.keep_ratio:
        new_width, new_height = rescale_size((width, height), scale)
    else:
        new_width, new_height = (scale, scale) if isinstance(scale, int) else scale
    if min(new_height, new_width) < 1:
        raise BadImage(
            results["img_path"],
            f"{height} x {width} pixels (height x width) would be resized to {new_height} x {new_width}",
        )
    results["img"] = canvas(new_height, new_width)
    results["img_shape"] = (new_height, new_width)
    results["scale_factor"] = (new_width / width, new_height / height)
    results["keep_ratio"] = self.keep_ratio
    results[RECORD].steps.append(resize((new_height, new_width)))


def _random_resize(transform: Any, place: str) -> Any:
    out = copy.copy(transform)
    out.resize = _host(transform.resize, f"{place}.resize")
    return out


def _random_flip(transform: Any, place: str) -> Any:
    return _with(transform, _flip=_flip_canvas)


def _flip_canvas(self: Any, results: dict) -> None:
    type(self)._flip(self, results)
    direction = results["flip_direction"]
    both = direction == "diagonal"
    results[RECORD].steps.append(
        mirror(horizontal=both or direction == "horizontal", vertical=both or direction == "vertical")
    )


def _random_crop(transform: Any, place: str) -> Any:
    return _with(transform, _crop_data=_crop_data_canvas)


def _crop_data_canvas(self: Any, results: dict, *args: Any) -> dict | None:
    before = np.eye(3) if results.get(HOMOGRAPHY) is None else results[HOMOGRAPHY]
    cropped: dict | None = type(self)._crop_data(self, results, *args)
    if cropped is not None:
        # Its offset is drawn inside; the homography, of float32, has it to a ten-thousandth of a pixel.
        x, y = (before - cropped[HOMOGRAPHY])[:2, 2].round()
        height, width = cropped["img_shape"]
        cropped[RECORD].steps.append(crop((x, y, x + width, y + height)))
    return cropped


def _keyed_crop(transform: Any, place: str) -> Any:
    return _with(transform, transform=_crop_canvas)


def _crop_canvas(self: Any, results: dict) -> dict:
    drawn = self.draw_for(results)
    self.record(results, drawn)
    results["img"] = canvas(*results["img_shape"])
    pixels: Pixels = results[RECORD]
    pixels.steps += [crop(drawn.window), resize(drawn.size[::-1])]
    if drawn.hflip or drawn.vflip:
        pixels.steps.append(mirror(horizontal=drawn.hflip, vertical=drawn.vflip))
    pixels.gain = drawn.gain
    return results


def _adaptive(transform: Any, place: str) -> Any:
    return _with(transform, transform=_augment_canvas)


def _augment_canvas(self: Any, results: dict) -> dict:
    try:
        plan = self.plan_for(results)
    except ValueError as error:
        raise BadImage(results["img_path"], str(error)) from None
    self.record(results, plan)
    results["img"] = canvas(*results["img_shape"])
    pixels: Pixels = results[RECORD]
    pixels.steps.append(crop(plan.window[0].tolist()))
    if plan.flip[0]:
        pixels.steps.append(mirror(horizontal=True, vertical=False))
    if int(plan.branch[0]) == Branch.NOISE:
        pixels.plan, pixels.augment = plan, self.augment
    return results


def _random_choice(transform: Any, place: str) -> Any:
    out = copy.copy(transform)
    out.transforms = [
        Compose([_host(t, f"{place}.transforms[{i}][{k}]") for k, t in enumerate(choice.transforms)])
        for i, choice in enumerate(transform.transforms)
    ]
    return out


def _keyed_randomness(transform: Any, place: str) -> Any:
    inner = [_host(t, f"{place}.transforms[{i}]") for i, t in enumerate(transform.transforms)]
    out = copy.copy(transform)
    out._compose = Compose(inner)
    return out


def _pack(transform: Any, place: str) -> Any:
    return _with(transform, transform=_pack_without_pixels)


def _pack_without_pixels(self: Any, results: dict) -> dict:
    pixels = results.pop(RECORD)
    results.pop("img")
    packed = type(self).transform(self, results)
    meta = {key: results[key] for key in _META if results.get(key) is not None}
    packed["data_samples"].set_metainfo(meta)
    return {**packed, RECORD: pixels}


def _same(transform: Any, place: str) -> Any:
    return transform


_READERS = (LoadImageFromFile,)
_HOSTS: dict[type, Callable[[Any, str], Any]] = {
    LoadImageFromFile: _reader,
    mmdet_transforms.LoadAnnotations: _annotations,
    mmdet_transforms.FilterAnnotations: _same,
    mmdet_transforms.Resize: _resize,
    mmcv_transforms.RandomResize: _random_resize,
    mmcv_transforms.RandomChoiceResize: _random_resize,
    mmcv_transforms.RandomChoice: _random_choice,
    mmdet_transforms.RandomFlip: _random_flip,
    mmdet_transforms.RandomCrop: _random_crop,
    mmdet_transforms.PackDetInputs: _pack,
    AdaptiveFreqAugTransform: _adaptive,
    KeyedRandomCrop: _keyed_crop,
    KeyedRandomness: _keyed_randomness,
}
