"""An adversarial image made before, loaded beside its clean one and moved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ikd_fast.attack.offline import AdversarialSet
from ikd_fast.mmdet.samples import image_key

from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadAdversarialImage(BaseTransform):
    """Put the adversarial image behind the clean one, as channels 3 to 5 of ``img``: what follows moves both as one.

    Write it behind the Resize of the pipeline (or behind LoadImageFromFile, for a set made with ``--resize none``) and before flips
    and crops; ``AdaptiveFreqAug`` belongs to the model. There, ``adv=dict(attack=dict(type="OfflineImages"))`` takes them apart again:
    the student's clean branch and its adversarial branch see one geometry. ::

        dict(type="Resize", scale=(1333, 800), keep_ratio=True),
        dict(type="LoadAdversarialImage", directory="adversarial/"),
        dict(type="RandomFlip", prob=0.5),

    A set saved at another size than it was attacked at (``--original-size``) is resized to the image's, bilinear, as published. Of
    PNG files and packed ones it is checked that they belong to the very image that was loaded.

    Args:
        directory: what ``ikd-fast attack ... --out`` has written.

    Required keys: ``img`` (``[H, W, 3]`` BGR in 0..255), ``img_path`` and ``img_id``. Changed: ``img``, to ``[H, W, 6]``.

    Raises:
        FileNotFoundError: there is no such set, or it lacks this image.
        ValueError: a flip or crop came before; the file is damaged or of another image.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.adversarial = AdversarialSet(directory)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results["img"]
        place = results.get("img_path")
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"{place}: LoadAdversarialImage expects [H, W, 3], got {list(image.shape)}: once in a pipeline, for colour images"
            )
        if results.get("flip"):
            raise ValueError(
                f"{place}: LoadAdversarialImage came behind a flip: write it before, that both images are flipped as one"
            )
        whole = image if image.dtype == np.uint8 else image.astype(np.uint8)
        if image.dtype != np.uint8 and not np.array_equal(whole, image):
            raise ValueError(
                f"{place}: LoadAdversarialImage expects whole grey levels, got {image.dtype} of {image.min():g}..{image.max():g}; "
                "write it before anything that changes colours, and LoadImageFromFile without to_float32 where it is resized"
            )
        moved = self.adversarial.load(image_key(results), None if place is None else Path(place).name, whole)
        results["img"] = np.concatenate([image, moved.astype(image.dtype)], axis=2)
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(directory={self.directory!r})"
