"""The chain out of mmdet's transforms, as IKD's published pipeline has it: Corrupt, RandomCrop, then the data preprocessor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

from .work import DIVISOR, MEAN, STD, Work


def _corrupt() -> Callable[[dict], dict]:
    """ImageNet-C's Gaussian noise of severity 1: sigma 0.08, of 0..1 images."""
    pytest.importorskip(
        "imagecorruptions", reason="imagecorruptions is not installed (requirements/bench.txt)"
    )
    from mmdet.datasets.transforms.transforms import Corrupt

    return Corrupt("gaussian_noise", severity=1)


def _need_mmdet() -> None:
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    import ikd_fast.mmdet  # noqa: F401 - supplies the compiled operators that mmdet imports


def build(work: Work) -> Callable[[], Tensor]:
    _need_mmdet()
    from mmdet.datasets.transforms import PackDetInputs
    from mmdet.datasets.transforms.transforms import RandomCrop
    from mmdet.models.data_preprocessors import DetDataPreprocessor
    from mmengine.dataset import pseudo_collate

    class GivenCrop(RandomCrop):
        """``RandomCrop`` that draws the window it is told."""

        def __init__(self, window: tuple[int, int, int, int]) -> None:
            super().__init__((0.8, 0.8), crop_type="relative_range")
            self.window = window

        def _get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
            x0, y0, x1, y1 = self.window
            return y1 - y0, x1 - x0

        def _rand_offset(self, margin: tuple[int, int]) -> tuple[int, int]:
            return self.window[1], self.window[0]

    corrupt, pack = _corrupt() if any(work.sigmas) else None, PackDetInputs(meta_keys=())
    preprocess = DetDataPreprocessor(mean=MEAN, std=STD, bgr_to_rgb=True, pad_size_divisor=DIVISOR)
    arrays = [image.numpy() for image in work.images]
    crops = [GivenCrop(w) if not s else None for w, s in zip(work.windows, work.sigmas, strict=True)]

    def run() -> Tensor:
        packed = []
        for image, crop in zip(arrays, crops, strict=True):
            results = {"img": image, "img_shape": image.shape[:2]}
            packed.append(pack(corrupt(results) if crop is None else crop(results)))
        return preprocess(pseudo_collate(packed), training=True)["inputs"]

    return run


def build_noise(image: Tensor) -> Callable[[], np.ndarray]:
    """``Corrupt`` alone on a uint8 ``[H, W, 3]`` image."""
    _need_mmdet()
    corrupt, array = _corrupt(), image.numpy()
    return lambda: corrupt({"img": array})["img"]
