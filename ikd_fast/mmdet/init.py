"""The config that distils one detector into another, written for two plain configs and checked against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ikd_fast.distill import load_strict
from ikd_fast.losses.presets import preset_values

from mmdet.models.detectors import (
    GFL,
    RPN,
    FasterRCNN,
    MaskRCNN,
    RepPointsDetector,
    RetinaNet,
    TwoStageDetector,
)
from mmengine.config import Config
from mmengine.registry import init_default_scope

from .build import (
    build_detector,
    model_config,
    num_classes,
    preprocessor_facts,
    read_named,
    resolve_path,
    without_init,
)
from .classes import Names, mismatch, names_of_config
from .config_text import beside, code, relative
from .distiller import lift_preprocessor
from .errors import InputError
from .facts import STRIDE_PROBE, map_shapes

PUBLISHED_TAP = "neck.fpn_convs.{i}.conv"
STOP_FRACTION = 2 / 3

FAMILIES: dict[type[nn.Module], tuple[str, str]] = {
    RetinaNet: ("retinanet", "retinanet"),
    RepPointsDetector: ("reppoints", "reppoints"),
    MaskRCNN: ("mask_rcnn", "mask_rcnn"),
    FasterRCNN: ("faster_rcnn", "mask_rcnn"),
    GFL: ("gfl", "retinanet"),
}
"""FGD's preset of a detector, and the one whose adversarial branch it takes: IKD has runs of the first three alone."""


@dataclass
class Draft:
    """A config's text, what was chosen (``notes``), and what keeps it from training (``problems``, with remedies)."""

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class _Side:
    """One of the two nets: as it was named, its model's config, built, and the pyramid of its neck (C, H, W at 512 x 512)."""

    name: str
    model: Mapping[str, Any]
    net: nn.Module
    maps: list[tuple[int, ...]]

    @property
    def strides(self) -> list[int]:
        return [STRIDE_PROBE // shape[1] for shape in self.maps]

    @property
    def channels(self) -> list[int]:
        return [shape[0] for shape in self.maps]


def draft(student: str, teacher: str, checkpoint: str) -> Draft:
    """Write the config of ``student`` distilled from ``teacher``, paths relative to the current folder.

    Args:
        student, teacher: plain mmdet configs: files, ``mmdet::`` or ``ikd_fast::`` paths.
        checkpoint: the teacher's weights: a file, ``ikd_fast::`` path, or what mmengine can fetch.

    Raises:
        InputError: a config that is missing, of another kind or distilled already, or a checkpoint file that is not there.
    """
    init_default_scope("mmdet")
    if "://" not in checkpoint and not Path(resolve_path(checkpoint, "assets")).is_file():
        raise InputError(
            f"CKPT {checkpoint}: no such file; give the teacher's .pth or .safetensors, or its URL",
            usage=True,
        )
    cfg = _read(student, "STUDENT")
    _read(teacher, "TEACHER")
    found = Draft()
    s, t = _side(student, "STUDENT"), _side(teacher, "TEACHER")
    two_stage = isinstance(s.net, TwoStageDetector)
    preset, branch = _presets(s.net, found)
    adversarial = preset_values(branch, "IKD")
    levels = list(adversarial["levels"]) if adversarial["levels"] is not None else None
    _check_pyramids(s, t, levels, found)
    _check_classes(s, t, found)
    _check_preprocessor(s, found)
    _check_weights(t, checkpoint, names_of_config((cfg.get("train_dataloader") or {}).get("dataset")), found)

    loss: dict[str, Any] = dict(type="FGDLoss", preset=preset)
    if type(s.net) in FAMILIES and _has_tap(s.net) and _has_tap(t.net):
        loss["source"] = PUBLISHED_TAP
    adv: dict[str, Any] = dict(beta=adversarial["beta"], attack=dict(type="OnlineDIFGSM", mode="single"))
    if levels is not None:
        adv["loss"] = dict(type="AdvFeatureLoss", levels=levels)
    inherit = not two_stage and _same_outside_backbone(s.net, t.net)
    if not two_stage and not inherit:
        found.notes.append("neck and head differ: the student starts from its own (no init_student)")
    model = dict(
        losses=[loss],
        adv=adv,
        augment=dict(type="AdaptiveFreqAug"),
        **(dict(init_student=True) if inherit else {}),
        stop_at=_stop(cfg, found),
    )
    found.text = _text(student, teacher, checkpoint, cfg, model, s, t, found.problems)
    return found


def _read(path: str, role: str) -> Config:
    """A config file as mmengine reads it, known to hold a plain detector."""
    try:
        if path.startswith("mmdet::"):
            from mmengine.hub import get_config

            cfg = get_config(path)
        else:
            real = resolve_path(path, "configs")
            if not Path(real).is_file():
                raise InputError(
                    f"{role} {path}: no such file; mmdet's own configs are written mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
                    usage=True,
                )
            if real.endswith(".py") and Config._is_lazy_import(real):
                raise InputError(
                    f"{role} {path} is a new-style config (read_base, or imports of classes), which _base_ cannot extend; give its "
                    "text form, as under configs/ of mmdet"
                )
            cfg = Config.fromfile(real)
    except (FileNotFoundError, AssertionError) as error:
        raise InputError(f"{role} {path}: {error}", usage=True) from error
    model = cfg.get("model")
    if not isinstance(model, Mapping) or "type" not in model:
        raise InputError(f"{role} {path} has no model: expected a detector's config of mmdet")
    if str(model["type"]).endswith("IKDDistiller"):
        raise InputError(
            f"{role} {path} is a distilled student's config; give the plain config of that detector"
        )
    return cfg


def _side(path: str, role: str) -> _Side:
    config = model_config(path)
    net = build_detector(without_init(config))
    if not hasattr(net, "neck") or not hasattr(net, "extract_feat") or isinstance(net, RPN):
        raise InputError(
            f"{role} {path}: a {type(net).__name__} has no neck whose pyramid could be distilled; expected a detector with backbone, "
            "neck and head, such as RetinaNet, FCOS, GFL, ATSS, RepPoints, Faster, Mask or Cascade R-CNN"
        )
    (maps,) = map_shapes(net, ["neck"], lambda n, x: n.extract_feat(x), (STRIDE_PROBE, STRIDE_PROBE))
    return _Side(path, config, net, maps)


def _presets(net: nn.Module, found: Draft) -> tuple[str, str]:
    """The presets of FGD and of the adversarial branch."""
    name = type(net).__name__
    nearest = "mask_rcnn" if isinstance(net, TwoStageDetector) else "retinanet"
    preset, branch = FAMILIES.get(type(net), (nearest, nearest))
    if type(net) not in FAMILIES:
        found.notes.append(
            f"preset {preset!r}: no preset is of {name}; these numbers are published for {_kind(preset)}"
        )
    elif preset == branch:
        found.notes.append(f"preset {preset!r}: the published numbers for {name}")
    else:
        found.notes.append(
            f"preset {preset!r}: the published numbers of FGD for {name}; IKD has none: the adversarial branch has those for "
            f"{_kind(branch)}"
        )
    return preset, branch


def _kind(preset: str) -> str:
    return next(kind.__name__ for kind, (own, _) in FAMILIES.items() if own == preset)


def _check_pyramids(s: _Side, t: _Side, levels: list[int] | None, found: Draft) -> None:
    ours, theirs = s.strides, t.strides
    used = list(range(len(ours))) if levels is None else levels
    agree = [i for i in used if i < min(len(ours), len(theirs)) and ours[i] == theirs[i]]
    wanted = (
        f"levels={agree} in the losses (FGDLoss and adv.loss=dict(type='AdvFeatureLoss', levels={agree}))"
    )
    if max(used) >= len(ours):
        found.problems.append(
            f"the student's neck has {len(ours)} levels of strides {ours}, the preset wants {used}; write {wanted}"
        )
    elif (levels is None and len(ours) != len(theirs)) or max(used) >= len(theirs):
        both = (
            f"write {wanted}, which both have"
            if agree
            else "no level agrees: take a teacher of the student's family"
        )
        found.problems.append(
            f"the student's neck has {len(ours)} levels of strides {ours}, the teacher's {len(theirs)} of strides {theirs}; {both}"
        )
    elif len(agree) < len(used):
        found.problems.append(
            f"the levels have other strides: {ours} in the student, {theirs} in the teacher; {_equal_taps(s, t)}, or write match='resize'"
        )
    elif any(s.channels[i] != t.channels[i] for i in agree):
        found.notes.append(
            f"channels differ, {s.channels} in the student and {t.channels} in the teacher: 1x1 convolutions align them"
        )


def _equal_taps(s: _Side, t: _Side) -> str:
    """What to write so that both sides give the strides they share; the i-th convolution of an FPN makes its i-th level."""
    taps = []
    for side in (s, t):
        count = len(side.net.neck.fpn_convs) if _has_tap(side.net) else 0  # type: ignore[arg-type, union-attr]
        taps.append({stride: f"neck.fpn_convs.{i}.conv" for i, stride in enumerate(side.strides[:count])})
    shared = [stride for stride in taps[0] if stride in taps[1]]
    if not shared:
        return "tap modules of equal stride, features=[...] for the student and teacher_features=[...] for the teacher"
    ours, theirs = ([side[stride] for stride in shared] for side in taps)
    return (
        f"write features={ours}, teacher_features={theirs} (strides {shared}), levels={list(range(len(shared)))} in the losses and no "
        "source="
    )


def _check_classes(s: _Side, t: _Side, found: Draft) -> None:
    ours, theirs = num_classes(s.net), num_classes(t.net)
    if ours is None or theirs is None or ours == theirs:
        return
    if theirs < ours:
        found.problems.append(
            f"the teacher has fewer classes, {theirs} for the student's {ours}: it has no class loss on the student's labels to attack; "
            "take a teacher of the same classes, or write attack=dict(type='OnlineDIFGSM', mode='single', objective='feature')"
        )
    else:
        found.notes.append(
            f"the teacher has {theirs} classes, the student {ours}: class id k must mean the same in both"
        )


def _check_preprocessor(s: _Side, found: Draft) -> None:
    try:
        lift_preprocessor(s.model, None, 1)
        preprocessor_facts(s.model)
    except ValueError as error:
        found.problems.append(str(error))


def _check_weights(t: _Side, checkpoint: str, data: Names | None, found: Draft) -> None:
    if "://" in checkpoint:
        found.notes.append(
            f"{checkpoint} was not looked at: training fetches it and wants every weight of the teacher in it"
        )
        return
    try:
        named = read_named(resolve_path(checkpoint, "assets"))
        loaded = load_strict(t.net, named.weights)
        found.notes.append(f"{loaded.loaded} of {loaded.total} weights of the teacher are in {checkpoint}")
    except (ValueError, TypeError) as error:
        found.problems.append(f"{checkpoint}: {error}")
        return
    problem = mismatch(named.classes, data) if named.classes and data else None
    if problem is not None:
        found.problems.append(problem)


def _has_tap(net: nn.Module) -> bool:
    convs = getattr(net.neck, "fpn_convs", None)
    return convs is not None and len(convs) > 0 and all(hasattr(conv, "conv") for conv in convs)


def _same_outside_backbone(student: nn.Module, teacher: nn.Module) -> bool:
    """What ``init_student`` needs: every weight of the teacher's neck and head has its like in the student."""
    own = student.state_dict()
    chosen = {k: v for k, v in teacher.state_dict().items() if not k.startswith("backbone.")}
    return all(k in own and own[k].shape == v.shape for k, v in chosen.items())


def _stop(cfg: Config, found: Draft) -> Any:
    """Two thirds of the student's schedule, as published (16 of 24 epochs)."""
    loop = cfg.get("train_cfg") or {}
    if loop.get("max_epochs"):
        return dict(epoch=max(1, round(STOP_FRACTION * loop["max_epochs"])))
    if loop.get("max_iters"):
        return dict(iter=max(1, round(STOP_FRACTION * loop["max_iters"])))
    found.notes.append(
        "the student's train_cfg has no max_epochs or max_iters: stop_at is a fraction of the run"
    )
    return round(STOP_FRACTION, 3)


def _text(
    student: str,
    teacher: str,
    checkpoint: str,
    cfg: Config,
    model: dict[str, Any],
    s: _Side,
    t: _Side,
    problems: list[str],
) -> str:
    imports = ["ikd_fast.mmdet", *((cfg.get("custom_imports") or {}).get("imports") or [])]
    imports = list(dict.fromkeys(imports))
    head = f"# {type(t.net).__name__} distilled into {type(s.net).__name__} with FGD and IKD. Paths are relative to this file's folder."
    todo = [f"# NOT READY: {' '.join(problem.split())}" for problem in problems]
    lines = [
        head,
        *todo,
        f'_base_ = "{relative(student)}"',
        f"custom_imports = dict(imports={code(imports)})",
        "",
    ]
    lines += ["model = dict(", "    _delete_=True,", '    type="IKDDistiller",', "    student=_base_.model,"]
    lines += [f'    teacher_config="{beside(teacher)}",', f'    teacher_ckpt="{beside(checkpoint)}",']
    lines += [f"    {key}={code(value)}," for key, value in model.items()]
    return "\n".join([*lines, ")", ""])
