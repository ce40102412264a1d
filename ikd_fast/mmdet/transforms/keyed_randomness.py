"""mmdet's own random transforms, as a function of the image and the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ikd_fast.generators import keyed_generators
from ikd_fast.mmdet.progress import SharedEpoch
from ikd_fast.mmdet.samples import image_key

from mmcv.transforms import BaseTransform, Compose
from mmdet.registry import TRANSFORMS


@TRANSFORMS.register_module()
class KeyedRandomness(BaseTransform):
    """Run ``transforms`` with the global generators seeded by (seed, epoch, image).

    ``RandomFlip``, ``RandomResize``, ``PhotoMetricDistortion``, ``Corrupt`` and the like draw from ``random``,
    ``numpy.random`` or torch, whose states depend on which worker loads the image and what it loaded before. Inside this
    transform an image in an epoch is the same for any number of workers and ranks, in any order, and after a resume. The
    generators' states are put back afterwards: with ``num_workers=0`` nothing else in the process notices.

    Wrap the whole pipeline::

        train_dataloader = dict(dataset=dict(pipeline=[dict(type="KeyedRandomness", transforms=train_pipeline)]))

    Not covered: a transform that keeps a generator of its own (recent Albumentations), and what is drawn outside the
    pipeline (the partners of Mosaic and MixUp in ``MultiImageMixDataset``, the substitute for an image whose pipeline
    returns None). With :class:`~ikd_fast.mmdet.KeyedSampler` the latter are keyed as well. An image that comes twice in an
    epoch looks the same both times.

    Args:
        transforms: configs of the transforms, or the transforms.
        seed: 0..2**64-1.

    Required keys: ``img_path`` or ``img_id``, which mmdet's data sets give before anything is loaded.
    """

    def __init__(self, transforms: Sequence[Any], seed: int = 0) -> None:
        if isinstance(transforms, dict) or not isinstance(transforms, Sequence):
            raise TypeError(
                f"KeyedRandomness wraps a list: write dict(type='KeyedRandomness', transforms=[...]), got {type(transforms).__name__}"
            )
        self._compose = Compose(transforms)
        self.seed = seed
        self._epoch = SharedEpoch()

    @property
    def transforms(self) -> list[Any]:
        """The wrapped transforms; :class:`~ikd_fast.mmdet.hooks.IKDHook` finds keyed ones among them."""
        return self._compose.transforms

    def set_epoch(self, epoch: int) -> None:
        """The sampler's pass; seen by loader workers that are already running."""
        self._epoch.set(epoch)

    def transform(self, results: dict) -> Any:
        with keyed_generators(self.seed, image_key(results), self._epoch.require("KeyedRandomness")):
            return self._compose(results)

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.transforms))
        return f"{type(self).__name__}(transforms=[{inner}], seed={self.seed})"
