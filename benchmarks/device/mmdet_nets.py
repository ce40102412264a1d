"""mmdet's own RetinaNets, random weights, with the interface of ``nets.Detector``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

STUDENT, TEACHER = "retinanet_r50_fpn_1x_coco.py", "retinanet_x101-64x4d_fpn_1x_coco.py"


def importable() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mmdet", "mmengine", "mmcv"))


class MMDetRetinaNet(nn.Module):
    """A config that mmdet ships: ``features`` is its FPN's pyramid, ``logits`` and ``boxes`` those of its head."""

    pyramid = "net.neck"

    def __init__(self, config: str) -> None:
        super().__init__()
        import ikd_fast.mmdet  # noqa: F401
        from ikd_fast.mmdet.build import build_detector, without_init

        import mmdet
        from mmengine.config import Config
        from mmengine.registry import init_default_scope

        init_default_scope("mmdet")
        path = Path(mmdet.__file__).parent / ".mim" / "configs" / "retinanet" / config
        self.net: Any = build_detector(without_init(Config.fromfile(path).model.to_dict()))

    def features(self, images: Tensor) -> list[Tensor]:
        return list(self.net.extract_feat(images))

    def logits(self, maps: Sequence[Tensor]) -> list[Tensor]:
        head = self.net.bbox_head
        return [head.retina_cls(_through(head.cls_convs, x)) for x in maps]

    def boxes(self, maps: Sequence[Tensor]) -> list[Tensor]:
        head = self.net.bbox_head
        return [head.retina_reg(_through(head.reg_convs, x)) for x in maps]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.logits(self.features(images))


def _through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x
