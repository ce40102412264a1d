"""The teachers of the shipped configs as mmdet publishes them, and downloads checked by the hash in their name."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import Tensor

from mmengine.dist import barrier, get_rank

_OLD_OFFSET = re.compile(r"(conv\d)_offset\.(weight|bias)$")
_HASH = re.compile(r"-(?!(?:19|20)\d\d(?:0[1-9]|1[0-2])[0-3]\d\.)([0-9a-f]{8,64})\.pth$")  # but for a date


@dataclass(frozen=True)
class PublishedTeacher:
    """A checkpoint of mmdet's model zoo.

    Args:
        config: as ``teacher_config`` takes it.
        url: as ``teacher_ckpt`` takes it.
        box_ap: COCO val2017 box AP in percent, as mmdet's metafile says.
        mask_ap: mask AP, where the teacher has masks.
    """

    config: str
    url: str
    box_ap: float
    mask_ap: float | None = None

    @property
    def sha256_prefix(self) -> str:
        """First hexadecimal digits of the file's sha256."""
        found = published_hash(self.url)
        assert found is not None
        return found


_ROOT = "https://download.openmmlab.com/mmdetection/v2.0"
_REPPOINTS = "reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco"
_CASCADE = "cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco"
_FASTER = "faster_rcnn_r101_fpn_2x_coco"
_GFL = "gfl_r101_fpn_mstrain_2x_coco"

TEACHERS: dict[str, PublishedTeacher] = {
    "retinanet": PublishedTeacher(
        "mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py",
        f"{_ROOT}/retinanet/retinanet_x101_64x4d_fpn_1x_coco/retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth",
        box_ap=41.0,
    ),
    "reppoints": PublishedTeacher(
        "mmdet::reppoints/reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py",
        f"{_ROOT}/reppoints/{_REPPOINTS}/{_REPPOINTS}_20200329-f87da1ea.pth",
        box_ap=44.2,
    ),
    "mask_rcnn": PublishedTeacher(
        "mmdet::dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py",
        f"{_ROOT}/dcn/{_CASCADE}/{_CASCADE}-e75f90c8.pth",
        box_ap=47.3,
        mask_ap=41.1,
    ),
    "faster_rcnn": PublishedTeacher(
        "mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py",
        f"{_ROOT}/faster_rcnn/{_FASTER}/{_FASTER}_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth",
        box_ap=39.8,
    ),
    "gfl": PublishedTeacher(
        "mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py",
        f"{_ROOT}/gfl/{_GFL}/{_GFL}_20200629_200126-dd12f847.pth",
        box_ap=44.7,
    ),
}
"""By the family of the student: the presets' names. The last two are of no row of the paper, but of other losses' published pairs."""


def published_hash(url: str) -> str | None:
    """The start of the sha256 that a checkpoint's name ends in, or None where it ends in none.

    >>> published_hash("https://example.org/net_20200130-366f5af1.pth")
    '366f5af1'
    >>> published_hash("https://example.org/net.pth"), published_hash("https://example.org/net-20240131.pth")
    (None, None)
    """
    found = _HASH.search(urlsplit(url).path)
    return found.group(1) if found else None


def cached_path(url: str) -> Path:
    """Where torch.hub, and so mmengine, keeps a download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(urlsplit(url).path).name


def fetch(url: str) -> Path:
    """The file at ``url``: downloaded unless it is in torch.hub's cache, and checked by the hash in its name.

    In a distributed run the first process downloads, the others wait for it.

    Raises:
        ValueError: the file's sha256 does not begin as its name says.
        OSError: it cannot be downloaded; the message says where to put the file.
    """
    path = cached_path(url)
    try:
        if get_rank() == 0:
            _download(url, path)
    finally:
        barrier()
    _download(url, path)  # on another node, if its cache is another
    verify(path, published_hash(url))
    return path


def _download(url: str, path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=os.isatty(2))
    except OSError as error:
        raise OSError(
            f"{url} cannot be downloaded ({error}); put the file at {path}, or write teacher_ckpt='its/path.pth'"
        ) from error


def current_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of deformable convolutions by the names of today, as mmcv renames those of files from before its version 2.

    >>> list(current_names({"layer2.0.conv2_offset.weight": torch.zeros(1), "layer2.0.conv2.weight": torch.zeros(1)}))
    ['layer2.0.conv2.conv_offset.weight', 'layer2.0.conv2.weight']
    """
    return {_OLD_OFFSET.sub(r"\1.conv_offset.\2", name): value for name, value in weights.items()}


def verify(path: Path, expected: str | None) -> None:
    """Raise unless the sha256 of ``path`` begins with ``expected`` (None: there is nothing to compare with)."""
    if expected is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    got = digest.hexdigest()
    if not got.startswith(expected):
        raise ValueError(
            f"{path} is not the published file: expected a sha256 that begins with {expected}, as its name says, got "
            f"{got[: len(expected)]} ({path.stat().st_size} bytes). The download was cut short, or it is another file: delete it, and "
            "the next run downloads it again"
        )
