"""Detectors from configs: paths as users write them, preprocessors read out, teachers loaded whole or not at all."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ikd_fast.distill import FrozenTeacher, Renormalize, TeacherEngine, load_strict
from ikd_fast.distill.teacher import read_file, weights_of
from ikd_fast.pixels import PixelUnits
from ikd_fast.shipped import PACKAGE as PACKAGE
from ikd_fast.shipped import resolve_path as resolve_path

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

from .classes import Names, names_in_header, names_of
from .published import current_names, fetch


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
    engine: TeacherEngine | Mapping[str, Any] | None = None,
) -> FrozenTeacher:
    """The teacher with every weight loaded, or an error listing what does not fit.

    Args:
        engine: how it is run (:class:`~ikd_fast.distill.TeacherEngine`); what it says of its self-check goes to mmengine's log.
    """
    net = build_detector(without_init(config))
    loaded = None
    if checkpoint is None:
        if not allow_random:
            raise ValueError(
                "the teacher has no weights: give teacher_ckpt='path.pth' (allow_random_teacher=True accepts random weights, for tests)"
            )
    else:
        read = read_named(resolve_path(str(checkpoint), "assets"))
        loaded = load_strict(net, read.weights, allow_missing=allow_random)
        loaded = loaded._replace(origin=str(checkpoint), classes=read.classes)
    module: Any
    for module in net.modules():
        if getattr(module, "with_cp", False):
            # It saves nothing where no weight has a gradient, and has none for the images the attack asks about.
            module.with_cp = False
    options = TeacherEngine.of(engine)
    if options is not None and options.report is print:
        options = replace(options, report=_log)
    teacher = FrozenTeacher(
        net,
        call=call,
        convert=None if convert.identity else convert,
        engine=options,
        trace=_features_and_heads,
    )
    teacher.loaded = loaded
    return teacher


def _log(line: str) -> None:
    print_log(f"ikd_fast: {line}", logger="current", level=logging.INFO)


def _features_and_heads(net: Any, images: Tensor) -> list[Any]:
    """What a folded norm must not change: the pyramid, and what the dense heads make of it."""
    maps = net.extract_feat(images)
    heads = [getattr(net, name, None) for name in ("bbox_head", "rpn_head")]
    return [maps, *(head(maps) for head in heads if isinstance(head, BaseDenseHead))]


class NamedWeights(NamedTuple):
    """A checkpoint's weights, by today's names, and its class names where it has them."""

    weights: dict[str, Tensor]
    classes: Names | None


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Weights from a file, or from what mmengine can fetch (``https://``, ``torchvision://``, ...)."""
    return read_named(path).weights


def read_named(path: str) -> NamedWeights:
    """As :func:`read_checkpoint`, with the names of the classes."""
    remote = "://" in path
    if path.startswith(("https://", "http://")):
        path = str(fetch(path))  # checked by the hash in its name
    if path.endswith(".safetensors") and "://" not in path:
        return NamedWeights(current_names(weights_of(read_file(path), path)), names_in_header(path))
    held = CheckpointLoader.load_checkpoint(path, map_location="cpu") if remote else read_file(path)
    meta = held.get("meta") if isinstance(held, Mapping) else None
    return NamedWeights(current_names(weights_of(held, path)), names_of(meta))


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
