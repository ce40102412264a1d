"""mmdet's data preprocessor with the adaptive augmentation planned on the host, before anything is on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ikd_fast.attack.memory import View
from ikd_fast.augment import AdaptiveFreqAug, AugPlan, execute
from ikd_fast.distill.prepare import planned_views
from ikd_fast.kernels import augment_batch
from ikd_fast.pixels import PixelUnits

from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import ImgDataPreprocessor

from .progress import Progress
from .samples import box_tensor, crop_sample, image_key
from .settings import check_parameters
from .views import check_sizes, loader_view


class _OnePass(ImgDataPreprocessor):
    """mmengine's preprocessor with lists of uint8 images mirrored, normalised, padded and stacked in one pass.

    Placed behind mmdet's in the order of inheritance, so that mmdet's calls it where it would call mmengine's.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        images, flips = data["inputs"], data.pop("flips", None)
        if not self._plain(images):
            if flips is not None:
                images = [x.flip(-1) if flip else x for x, flip in zip(images, flips, strict=True)]
            return super().forward({**data, "inputs": images}, training)
        data = self.cast_data(data)
        images = data["inputs"]
        units: PixelUnits = self.units
        n = len(images)
        data["inputs"] = augment_batch(
            images,
            window=torch.tensor([(0, 0, x.shape[2], x.shape[1]) for x in images], device="cpu"),
            flip=torch.tensor([False] * n if flips is None else flips, device="cpu"),
            sigma=torch.zeros(n, device="cpu"),
            ids=torch.zeros(n, dtype=torch.int64, device="cpu"),
            seed=0,
            epoch=0,
            layout="CHW",
            swap_channels=bool(self._channel_conversion),
            mean=units.mean,
            std=units.std,
            divisor=self.pad_size_divisor,
            pad_value=self.pad_value,
        )
        data.setdefault("data_samples", None)
        return data

    def _plain(self, images: Any) -> bool:
        """Whether these are what ``augment_batch`` takes; anything else is left to mmengine."""
        return (
            isinstance(images, (list, tuple))
            and len(images) > 0
            and all(
                isinstance(x, Tensor) and x.dtype == torch.uint8 and x.dim() == 3 and len(x) == 3
                for x in images
            )
            and (not self._enable_normalize or len(self.units.mean) == 3)
            and self.pad_size_divisor >= 1
        )


@MODELS.register_module()
class IKDDetDataPreprocessor(DetDataPreprocessor, _OnePass):
    """``DetDataPreprocessor`` that crops, flips and adds noise by :class:`~ikd_fast.AdaptiveFreqAug` in training.

    The plan is made from CPU boxes before ``cast_data``, so nothing waits for the device; the noise is added on the device
    after normalisation. In evaluation, or with ``augment=None``, it does what mmdet's own does. Lists of uint8 images are
    normalised, padded and stacked in one pass.

    Args:
        augment: ``dict(type="AdaptiveFreqAug", ...)`` or an object; None for no augmentation.
        teacher_classes: if given, labels outside ``0..teacher_classes-1`` raise (the teacher has no such class).
        return_geo: also return ``geo`` (images without the noise), ``plan`` and ``image_keys``, for the distiller.
        Others as mmdet's ``DetDataPreprocessor``.

    Attributes:
        needs_views: with ``return_geo``, also return ``views``: where each image lies in the one its perturbation is kept for
            (:class:`~ikd_fast.attack.memory.View`). The distiller sets it.
        takes_adversarial: images come with their adversarial ones behind them, as channels
            (:class:`~ikd_fast.mmdet.LoadAdversarialImage`); ``adversarial`` is then returned too. The distiller sets it.
        resolution: that image is the file's (``"original"``) or the resized one (``"network"``); the hook sets it.
    """

    def __init__(
        self,
        *args: Any,
        augment: AdaptiveFreqAug | Mapping[str, Any] | None = None,
        teacher_classes: int | None = None,
        return_geo: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # What the images are after this preprocessor. Once: reading the buffers on a device would be a sync.
        self.units = PixelUnits(value_range=(0, 255))
        if self._enable_normalize:
            self.units = PixelUnits(mean=self.mean.flatten().tolist(), std=self.std.flatten().tolist())
        self.augment = build_augment(augment, self.units)
        self.teacher_classes = teacher_classes
        self.return_geo = return_geo
        self.needs_views = False
        self.takes_adversarial = False
        self.resolution = "original"
        self.progress = Progress()
        self.is_active: Callable[[], bool] = _always

    def set_progress(self, epoch: int, step: int) -> None:
        """Where training is; :class:`~ikd_fast.mmdet.hooks.IKDHook` calls it."""
        self.progress.epoch, self.progress.step = epoch, step

    def forward(self, data: dict, training: bool = False) -> dict:
        if not training or not (self.augment is not None or self.return_geo):
            return super().forward(data, training)
        samples: list[DetDataSample] = data["data_samples"]
        keys = [image_key(sample.metainfo) for sample in samples]
        self._check_labels(samples)
        check_boxes(samples)
        plan = None
        views = self._views(samples)
        data, adversarial = self._apart(data)
        flips: Any = None
        if self.augment is not None and self.is_active():
            plan = plan_samples(
                self.augment,
                samples,
                [tuple(image.shape[-2:]) for image in data["inputs"]],
                keys,
                self._epoch(),
            )
            flips = tuple(plan.flip.tolist())
            if adversarial is not None:
                adversarial = [crop_image(image, plan, i) for i, image in enumerate(adversarial)]
            data = {
                **data,
                "inputs": [crop_image(image, plan, i) for i, image in enumerate(data["inputs"])],
                "flips": flips,
                "data_samples": [crop_sample(sample, plan, i) for i, sample in enumerate(samples)],
            }
        out = super().forward(data, training)
        geo = out["inputs"]
        out["inputs"] = geo if plan is None else self._noisy(geo, out["data_samples"], plan)
        if self.return_geo:
            out.update(geo=geo, plan=plan, image_keys=keys)
        if adversarial is not None:
            beside = {"inputs": adversarial} if flips is None else {"inputs": adversarial, "flips": flips}
            out["adversarial"] = _OnePass.forward(self, beside, training)["inputs"]
        if views is not None:
            out["views"] = planned_views(views, plan)
            check_sizes(out["views"], out["data_samples"])
        return out

    def _apart(self, data: dict) -> tuple[dict, list[Tensor] | None]:
        """Clean images and, where they came along and the branch is on, adversarial ones."""
        images, expected = data["inputs"], 6 if self.takes_adversarial else 3
        got = {len(x) for x in images if x.dim() == 3}
        if self.takes_adversarial and got != {6}:
            raise ValueError(
                f"adv.attack is OfflineImages, which takes images with their adversarial ones behind them, 6 channels; got "
                f"{sorted(got)}: write dict(type='LoadAdversarialImage', directory=...) in the train pipeline, behind its Resize"
            )
        if expected == 3 and got == {6}:
            raise ValueError(
                "the pipeline loads adversarial images (LoadAdversarialImage), and nothing takes them: write "
                "adv=dict(attack=dict(type='OfflineImages')), or take that transform out"
            )
        if expected == 3:
            return data, None
        clean = {**data, "inputs": [x[:3] for x in images]}
        return clean, [x[3:] for x in images] if self.is_active() else None

    def _views(self, samples: list[DetDataSample]) -> list[View] | None:
        if not (self.return_geo and self.needs_views and self.is_active()):
            return None
        return [loader_view(sample.metainfo, self.resolution) for sample in samples]

    def _epoch(self) -> int:
        return self.progress.require_epoch(type(self).__name__)

    def _noisy(self, geo: Tensor, samples: list[DetDataSample], plan: AugPlan) -> Tensor:
        """A copy of the batch with noise on the images that get it, drawn in the loader's channel order."""
        if not bool((plan.sigma > 0).any()):
            return geo
        sizes = [tuple(sample.metainfo["img_shape"][:2]) for sample in samples]
        if sizes != plan.out_sizes:
            raise ValueError(
                f"img_shape: expected what the plan's crop leaves, {plan.out_sizes}, got {sizes}; a batch augment that resizes "
                "images has to come before the noise: leave it out, or use AdaptiveFreqAug in the pipeline"
            )
        return execute.add_planned_noise(
            geo,
            plan,
            self.units,
            sizes=torch.tensor(sizes, device="cpu"),
            channels_reversed=bool(self._channel_conversion),
        )

    def _check_labels(self, samples: list[DetDataSample]) -> None:
        if self.teacher_classes is None:
            return
        for sample in samples:
            labels = sample.gt_instances.labels
            if (
                labels.device.type == "cpu"
                and len(labels)
                and not 0 <= int(labels.min()) <= int(labels.max()) < self.teacher_classes
            ):
                raise ValueError(
                    f"{sample.metainfo.get('img_path', 'an image')} has class ids {sorted(set(labels.tolist()))}, but the "
                    f"teacher has {self.teacher_classes} classes (0..{self.teacher_classes - 1}); give the classes it was "
                    "trained on in metainfo"
                )


def _always() -> bool:
    return True


def check_boxes(samples: list[DetDataSample]) -> None:
    """Finite, ordered boxes or an error naming the file; boxes on a device are not looked at."""
    for sample in samples:
        boxes = box_tensor(sample.gt_instances.bboxes)
        if boxes.device.type != "cpu" or len(boxes) == 0:
            continue
        good = boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
        if not bool(good.all()):
            i = int((~good).nonzero()[0])
            raise ValueError(
                f"{sample.metainfo.get('img_path', 'an image')}: box {i} is {boxes[i].tolist()}; expected finite xyxy with x1 <= x2 and "
                "y1 <= y2: mend or filter the annotation"
            )


def build_augment(
    augment: AdaptiveFreqAug | Mapping[str, Any] | None, units: PixelUnits | None
) -> AdaptiveFreqAug | None:
    """From a config dict, with the scale of the images filled in unless it says one itself."""
    if augment is None or isinstance(augment, AdaptiveFreqAug):
        return augment
    if not isinstance(augment, Mapping):
        raise TypeError(f"augment must be dict(type='AdaptiveFreqAug', ...) or None, got {augment!r}")
    kwargs = dict(augment)
    kind = kwargs.pop("type", "AdaptiveFreqAug")
    if kind not in ("AdaptiveFreqAug", AdaptiveFreqAug):
        raise ValueError(f"augment must be dict(type='AdaptiveFreqAug', ...), got type={kind!r}")
    if units is not None and not {"value_range", "mean", "std"} & kwargs.keys():
        kwargs.update(value_range=units.value_range) if units.value_range else kwargs.update(
            mean=units.mean, std=units.std
        )
    check_parameters(AdaptiveFreqAug, kwargs, "augment")
    return AdaptiveFreqAug(**kwargs)


def plan_samples(
    augment: AdaptiveFreqAug,
    samples: list[DetDataSample],
    sizes: list[tuple[int, int]],
    keys: list[int],
    epoch: int,
) -> AugPlan:
    """Plan from ground truth; crowd and ignored boxes are in ``ignored_instances`` and do not count."""
    boxes = [box_tensor(sample.gt_instances.bboxes) for sample in samples]
    scale = [
        tuple(float(v) for v in sample.metainfo.get("scale_factor", (1.0, 1.0))[:2]) for sample in samples
    ]
    try:
        return augment.plan(boxes, sizes, keys, epoch, scale=scale)
    except ValueError:
        # Which file it is: the batch's index says little to a user.
        for i, sample in enumerate(samples):
            try:
                augment.plan(
                    boxes[i : i + 1], sizes[i : i + 1], keys[i : i + 1], epoch, scale=scale[i : i + 1]
                )
            except ValueError as error:
                raise ValueError(f"{sample.metainfo.get('img_path', 'an image')}: {error}") from None
        raise


def crop_image(image: Tensor, plan: AugPlan, i: int) -> Tensor:
    """Window ``i`` of the plan on ``[C, H, W]``: a view."""
    x0, y0, x1, y1 = (int(v) for v in plan.window[i])
    return image[:, y0:y1, x0:x1]
