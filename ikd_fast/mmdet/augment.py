"""``AdaptiveFreqAug`` in mmdet's two other forms: a pipeline transform and a batch augment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ikd_fast.augment import AdaptiveFreqAug

from mmcv.transforms import BaseTransform
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes

from .preprocessor import build_augment, plan_samples
from .progress import Progress, SharedEpoch
from .samples import box_tensor, crop_masks, crop_sample, image_key, mirrored, move_boxes


@TRANSFORMS.register_module(name="AdaptiveFreqAug")
class AdaptiveFreqAugTransform(BaseTransform):
    """In the loader, on one uint8 image: ``dict(type="AdaptiveFreqAug", ...)`` in ``train_pipeline``.

    It goes on to the end of the run: ``stop_at`` of an ``IKDDistiller`` does not reach the loader, and its noise is in what
    the attack starts from. Give the distiller ``augment=`` instead where you have one.

    Placed after ``Resize`` and ``RandomFlip`` it makes the preprocessor's plan; placed before ``Resize`` the noise is resized
    with the image, as in the published code (a 1.67x bilinear resize leaves 0.68 of its standard deviation).

    Required keys: img, gt_bboxes, gt_bboxes_labels, gt_ignore_flags, img_id, img_path. Optional: gt_masks, gt_seg_map.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.augment = AdaptiveFreqAug(**kwargs)
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """The sampler's pass; seen by loader workers that are already running."""
        self._epoch.set(epoch)

    def transform(self, results: dict) -> dict:
        image = results["img"]
        boxes = box_tensor(results["gt_bboxes"])
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        ignore = torch.as_tensor(np.asarray(results.get("gt_ignore_flags", np.zeros(len(boxes), bool)), bool))
        scale = tuple(float(v) for v in results.get("scale_factor", (1.0, 1.0))[:2])
        plan = self.augment.plan(
            [boxes],
            [image.shape[:2]],
            [image_key(results)],
            self._epoch.require("AdaptiveFreqAug"),
            scale=[scale],
            ignore=[ignore],
        )
        target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.long), "ignore": ignore}
        images, _ = self.augment.apply([torch.from_numpy(np.ascontiguousarray(image))], [target], plan)
        x0, y0, x1, y1 = (int(v) for v in plan.window[0])
        window = (x0, y0, x1, y1)
        flip = bool(plan.flip[0])
        whole = (y1 - y0, x1 - x0) == tuple(image.shape[:2])
        moved, stays = move_boxes(boxes, window, flip, None if whole else plan.min_kept)
        keep = stays.numpy()
        results["img"] = np.ascontiguousarray(images[0].numpy())
        results["img_shape"] = results["img"].shape[:2]
        boxed = not isinstance(results["gt_bboxes"], (np.ndarray, Tensor))
        results["gt_bboxes"] = HorizontalBoxes(moved) if boxed else moved.numpy()
        for key in ("gt_bboxes_labels", "gt_ignore_flags"):
            if key in results:
                results[key] = np.asarray(results[key])[keep]
        if results.get("gt_masks") is not None:
            masks = results["gt_masks"][np.flatnonzero(keep)]
            results["gt_masks"] = crop_masks(masks, window, flip, image.shape[:2])
        if results.get("gt_seg_map") is not None:
            seg = results["gt_seg_map"][y0:y1, x0:x1]
            results["gt_seg_map"] = np.ascontiguousarray(seg[:, ::-1] if flip else seg)
        here = np.array(
            [[-1 if flip else 1, 0, x1 if flip else -x0], [0, 1, -y0], [0, 0, 1]], dtype=np.float32
        )
        there = results.get("homography_matrix")
        results["homography_matrix"] = here if there is None else here @ there
        if flip:
            results["flip"], results["flip_direction"] = mirrored(
                results.get("flip", False), results.get("flip_direction")
            )
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.augment!r})"


@MODELS.register_module(name="AdaptiveFreqAug")
class AdaptiveFreqAugBatch(nn.Module):
    """As one of a data preprocessor's ``batch_augments``, on the normalised, stacked batch.

    Boxes are on the device by then and are copied back once per batch to plan; ``IKDDetDataPreprocessor`` needs no such copy.
    Images keep their place in the batch: a cropped one lies top left, zeros around it. Noise is drawn in the network's
    channel order, so with ``bgr_to_rgb`` its pixels differ from the other ways in; branch, window and sigma do not.

    Args:
        mean, std: the preprocessor's, so that sigma means grey levels; or ``value_range``. Others as :class:`AdaptiveFreqAug`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        augment = build_augment(kwargs, None)
        assert augment is not None
        self.augment = augment
        self.progress = Progress()

    def set_progress(self, epoch: int, step: int) -> None:
        self.progress.epoch, self.progress.step = epoch, step

    def forward(
        self, inputs: Tensor, data_samples: list[DetDataSample]
    ) -> tuple[Tensor, list[DetDataSample]]:
        host = [sample.cpu() for sample in data_samples]
        sizes = [(int(h), int(w)) for h, w in (sample.metainfo["img_shape"][:2] for sample in host)]
        keys = [image_key(sample.metainfo) for sample in host]
        plan = plan_samples(self.augment, host, sizes, keys, self.progress.require_epoch("AdaptiveFreqAug"))
        targets = [
            {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "size": size}
            for size in sizes
        ]
        images, _ = self.augment.apply(inputs, targets, plan)
        return images, [crop_sample(sample, plan, i) for i, sample in enumerate(data_samples)]
