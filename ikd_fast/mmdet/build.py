"""Detectors from configs: paths as users write them, preprocessors read out, teachers loaded whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ikd_fast.distill import FrozenTeacher, Renormalize, load_strict, read_weights
from ikd_fast.pixels import PixelUnits

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.runner import CheckpointLoader

PACKAGE = "ikd_fast::"


def resolve_path(path: str, folder: str) -> str:
    """``ikd_fast::name`` is a file this package ships (``folder``: ``configs`` or ``assets``); other paths stay."""
    if not path.startswith(PACKAGE):
        return path
    if folder == "configs":
        import ikd_fast.configs as home

        root = Path(next(iter(home.__path__)))
    else:
        root = Path(__file__).parents[1] / folder
    found = root / path.removeprefix(PACKAGE)
    if not found.exists():
        have = sorted(
            str(p.relative_to(root))
            for p in root.rglob("*")
            if p.is_file() and p.suffix in (".py", ".safetensors", ".json")
        )
        raise FileNotFoundError(f"{path}: ikd_fast ships no such file; it ships {have}")
    return str(found)


def model_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The ``model`` of a config file (also ``mmdet::`` and ``ikd_fast::`` paths), a Config, or a model dict as it is."""
    if isinstance(config, (str, Path)):
        path = str(config)
        if path.startswith("mmdet::"):
            from mmengine.hub import get_config

            config = get_config(path)
        else:
            path = resolve_path(path, "configs")
            if not Path(path).exists():
                raise FileNotFoundError(
                    f"teacher_config: no file {path} (relative to {Path.cwd()}); mmdet's own are written 'mmdet::retinanet/...'"
                )
            config = Config.fromfile(path)
    model = config.get("model", config) if isinstance(config, Mapping) or hasattr(config, "get") else None
    if not isinstance(model, Mapping) or "type" not in model:
        raise TypeError(
            f"expected a config file, a Config with 'model', or a model dict with 'type', got {config!r:.200}"
        )
    return Config(dict(model=model)).to_dict()["model"]


def preprocessor_facts(config: Mapping[str, Any]) -> tuple[PixelUnits, bool, int]:
    """(units, whether channels are turned round, pad divisor) of a model's ``data_preprocessor``."""
    pre = config.get("data_preprocessor") or {}
    if pre.get("mean") is None:
        units = PixelUnits(value_range=(0, 255))
    else:
        units = PixelUnits(mean=pre["mean"], std=pre["std"])
    turned = bool(pre.get("bgr_to_rgb", False)) or bool(pre.get("rgb_to_bgr", False))
    return units, turned, int(pre.get("pad_size_divisor", 1))


def build_detector(config: Mapping[str, Any]) -> nn.Module:
    """The detector alone: its data preprocessor is somebody else's job."""
    # Heads read test_cfg by attribute.
    return MODELS.build(
        ConfigDict({key: value for key, value in config.items() if key != "data_preprocessor"})
    )


def build_teacher(
    config: Mapping[str, Any],
    checkpoint: str | None,
    convert: Renormalize,
    call: Any,
    *,
    allow_random: bool = False,
) -> FrozenTeacher:
    """The teacher with every weight loaded, or an error listing what does not fit."""
    net = build_detector(without_init(config))
    if checkpoint is None:
        if not allow_random:
            raise ValueError(
                "the teacher has no weights: give teacher_ckpt='path.pth' (allow_random_teacher=True accepts random weights, for tests)"
            )
    else:
        load_strict(net, read_checkpoint(resolve_path(str(checkpoint), "assets")), allow_missing=allow_random)
    return FrozenTeacher(net, call=call, convert=None if convert.identity else convert)


def read_checkpoint(path: str) -> dict[str, Any]:
    """Weights from a file, or from what mmengine can fetch (``https://``, ``torchvision://``, ...)."""
    if "://" not in path:
        return read_weights(path)
    weights = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    return dict(weights)


def without_init(config: Any) -> Any:
    """A config with every ``init_cfg`` and ``pretrained`` taken out: a teacher's weights come from its checkpoint alone."""
    if isinstance(config, Mapping):
        return {k: without_init(v) for k, v in config.items() if k not in ("init_cfg", "pretrained")}
    return [without_init(v) for v in config] if isinstance(config, (list, tuple)) else config


def num_classes(model: nn.Module) -> int | None:
    """Of the head that classifies boxes, if it says."""
    for path in ("bbox_head", "roi_head.bbox_head"):
        module: Any = model
        for part in path.split("."):
            module = getattr(module, part, None)
        if isinstance(module, nn.ModuleList):
            module = module[0]
        if hasattr(module, "num_classes"):
            return int(module.num_classes)
    return None


def common_divisor(a: int, b: int) -> int:
    """The smallest padding that suits both nets."""
    return math.lcm(max(1, a), max(1, b))
