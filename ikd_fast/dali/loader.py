"""``DALIDetLoader``: detection batches decoded and moved by DALI, as mmdet's models or plain PyTorch take them."""

from __future__ import annotations

from typing import Any

from .coco import CocoImages
from .host_loader import HostLoader
from .pipeline import Finish
from .require import require_dali
from .torch_batch import TorchBatch

OUTPUTS = ("mmdet", "torch")


class DALIDetLoader(HostLoader):
    """Detection images through DALI, in a keyed order, each file read, decoded, resized, cropped and mirrored once.

    ``output="mmdet"``: ``dataset`` is an mmdet data set and its own pipeline says what is done; boxes, masks and what is
    random come from mmdet's own transforms, which run without pixels (``dict(type="DALIDetLoader", ...)`` as
    ``train_dataloader`` builds one, see :mod:`ikd_fast.mmdet.dali`). A batch is ``dict(inputs, data_samples)``: uint8
    ``[3, H, W]`` and ``DetDataSample`` with ``img_id, img_path, ori_shape, img_shape, scale_factor, flip, flip_direction,
    homography_matrix``; the model's data preprocessor normalises, and augments if it is an ``IKDDetDataPreprocessor``.

    ``output="torch"``: ``dataset`` is :class:`~ikd_fast.dali.CocoImages`. A batch is ``(images, targets, plan)``: normalised
    ``[N, 3, H, W]`` padded to ``divisor``; dicts as torchvision's detectors take them (``boxes`` xyxy, ``labels``,
    ``image_id``, ``area``, ``iscrowd``, ``masks`` where asked) and ``size``, ``orig_size``, ``scale``; the plan that was made.

    Pixels: DALI's decoder gives libjpeg-turbo's values. ``resizer="cv2"`` does then what mmdet's transforms do, to the bit;
    ``resizer="dali"`` makes one linear resize of it, without antialiasing and with half-pixel centres, as ``cv2.INTER_LINEAR``
    (at most 1 grey level apart inside an image; a crop before a resize sees a pixel beyond its border).

    Args:
        dataset, output: above.
        batch_size, sampler, batch_sampler, num_workers, ...: of ``torch.utils.data.DataLoader``; ``num_workers`` processes read
            files and annotations (0: this one). ``output="torch"`` needs ``batch_sampler=KeyedShardSampler(dataset, batch_size)``.
        mean, std, divisor, dtype, pixels: of ``output="torch"``, see :class:`~ikd_fast.dali.torch_batch.TorchBatch`.
        device, device_id, threads, prefetch, on_error, channel_order, resizer: see :class:`~ikd_fast.dali.host_loader.HostLoader`.
            ``channel_order`` is ``"bgr"`` for mmdet and ``"rgb"`` for torch if not given.

    Raises:
        ImportError: DALI is not installed; names the package for the CUDA version found.
        BadImage: a file that cannot be used, with ``on_error="raise"``.
        TypeError, ValueError: a data set, pipeline or setting that does not fit.
    """

    def __init__(
        self, dataset: Any, *, output: str = "mmdet", channel_order: str | None = None, **kwargs: Any
    ) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"DALIDetLoader: output must be 'mmdet' or 'torch', got {output!r}")
        require_dali()
        self.output = output
        if output == "mmdet":
            from ikd_fast.mmdet.dali.source import collate, prepare

            gain = prepare(dataset)
            super().__init__(dataset, collate, channel_order=channel_order or "bgr", gain=gain, **kwargs)
            return
        if not isinstance(dataset, CocoImages):
            raise TypeError(
                f"DALIDetLoader(output='torch') expects ikd_fast.dali.CocoImages, got {type(dataset).__name__}"
            )
        if kwargs.get("batch_sampler") is None:
            given = [
                f"{name}={kwargs[name]!r}" for name in ("batch_size", "shuffle", "sampler") if name in kwargs
            ]
            raise ValueError(
                "DALIDetLoader(output='torch') takes its order, and the epoch of what is drawn, from "
                f"batch_sampler=ikd_fast.dali.KeyedShardSampler(images, batch_size); got {', '.join(given) or 'none'}"
            )
        order = channel_order or "rgb"
        names = ("mean", "std", "divisor", "dtype", "pixels")
        batch = TorchBatch(**{name: kwargs.pop(name) for name in names if name in kwargs})
        finish = (
            Finish(
                batch.mean, batch.std, batch.divisor, (dataset.seed or 0) % 2**31
            )  # DALI's seeds are shorter
            if batch.pixels == "dali"
            else None
        )
        super().__init__(dataset, batch, channel_order=order, finish=finish, **kwargs)
