"""What a distiller does with a batch, as plain values: the start-up banner and ``ikd-fast explain`` print them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ikd_fast.distill import StopAt
from ikd_fast.distill.teacher import run_tapped
from ikd_fast.kernels import DeltaCodes
from ikd_fast.kernels.ops.backend import choose
from ikd_fast.losses import KDLoss

from .build import num_classes

STRIDE_PROBE = 512
"""A side that every stride of a pyramid divides: there, side over map side is the stride exactly."""


def collect(
    model: Any, *, size: tuple[int, int] | None = None, run: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that is known of an :class:`~ikd_fast.mmdet.IKDDistiller`, ready for ``json.dumps``.

    Args:
        model: the distiller.
        size: (h, w) of a network input: maps are then given with the shapes they have there.
        run: what the model does not know: :func:`run_facts`.
    """
    ikd = model.ikd
    device = next(model.student.parameters()).device
    units, divisor = ikd.units, model.data_preprocessor.pad_size_divisor
    facts: dict[str, Any] = {
        "student": _net(model.student),
        "teacher": _teacher(ikd.teacher),
        "pixels": {
            "student": _units(units),
            "teacher": _units(units if ikd.teacher.convert is None else ikd.teacher.convert.target),
            "channels_turned_by_loader": bool(model.data_preprocessor._channel_conversion),
            "channels_turned_for_teacher": bool(getattr(ikd.teacher.convert, "flip_channels", False)),
            "converted": ikd.teacher.convert is not None,
            "pad_divisor": int(divisor),
        },
    }
    named = dict(zip([f"kd/{name}" for name in ikd._names], ikd.losses, strict=True))
    if ikd.adversarial:
        named["kd/adv"] = ikd.adv_loss
    shapes = _probe(ikd, list(named.values()), size)
    rows = [
        {"name": name, **_loss(ikd, loss, device, maps)}
        for (name, loss), maps in zip(named.items(), shapes, strict=True)
    ]
    facts["losses"] = rows[: len(ikd.losses)]
    facts["adversarial"] = None
    if ikd.adversarial:
        attack = ikd.attack
        facts["adversarial"] = {
            "beta": ikd.beta,
            "loss": rows[-1],
            "attack": attack_facts(attack),
        }
    facts["memory"] = kept_facts(ikd.attack) if ikd.adversarial else None
    facts["augment"] = _augment(model.data_preprocessor.augment)
    facts["batch_augments"] = [type(x).__name__ for x in model.data_preprocessor.batch_augments or []]
    facts["init_student"] = bool(model.init_student)
    length = {name: (run or {}).get(name) for name in ("epoch_iters", "max_iters", "max_epochs")}
    facts["stop"] = stop_point(ikd.stop_at, **length)
    facts["run"] = dict(run or {})
    return facts


def run_facts(
    *,
    batch_size: int,
    ranks: int = 1,
    accumulate: int = 1,
    images: int | None = None,
    epoch_iters: float | None = None,
    max_epochs: int | None = None,
    max_iters: int | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The size of a run; None: not known. ``epoch_iters``: iterations in which all ranks together see each image once.

    ``class_names``: the training data's, in the order of its labels.
    """
    return {
        "batch_size": batch_size,
        "ranks": ranks,
        "accumulate": accumulate,
        "images_per_update": batch_size * ranks * accumulate,
        "images": images,
        "epoch_iters": epoch_iters,
        "max_epochs": max_epochs,
        "max_iters": max_iters,
        "class_names": None if class_names is None else list(class_names),
    }


def stop_point(
    stop_at: StopAt,
    *,
    epoch_iters: float | None = None,
    max_iters: int | None = None,
    max_epochs: int | None = None,
) -> dict[str, Any]:
    """Where augmentation and adversarial branch end: the rule, and the first epoch and iteration (from 0) without them.

    None where the run's length is needed and not known.

    >>> stop_point(StopAt(dict(epoch=16)), epoch_iters=7330)
    {'rule': {'epoch': 16}, 'epoch': 16, 'iter': 117280}
    >>> stop_point(StopAt(0.667), epoch_iters=10, max_iters=400)
    {'rule': 0.667, 'epoch': 26.7, 'iter': 267}
    """
    rule = dict(stop_at.rule) if isinstance(stop_at.rule, Mapping) else stop_at.rule
    epoch: float | None = None
    iteration: int | None = None
    if isinstance(rule, dict) and "epoch" in rule:
        epoch = rule["epoch"]
        iteration = None if epoch_iters is None else math.ceil(rule["epoch"] * epoch_iters)
    elif isinstance(rule, dict):
        iteration = rule["iter"]
    elif rule is not None and max_iters is not None:
        iteration = math.ceil(rule * max_iters)
    elif rule is not None and max_epochs is not None:
        epoch = round(rule * max_epochs, 2)
    if epoch is None and iteration is not None and epoch_iters:
        epoch = round(iteration / epoch_iters, 2)
    return {"rule": rule, "epoch": epoch, "iter": iteration}


def _net(net: nn.Module) -> dict[str, Any]:
    return {
        "type": type(net).__name__,
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "classes": num_classes(net),
    }


def _teacher(teacher: Any) -> dict[str, Any]:
    found = _net(teacher.net)
    found.pop("trainable")
    loaded = teacher.loaded
    keys = len(teacher.net.state_dict()) if loaded is None else loaded.total
    return {
        **found,
        "checkpoint": None if loaded is None else loaded.origin,
        "keys": keys,
        "keys_loaded": 0 if loaded is None else loaded.loaded,
        "class_names": None if loaded is None or loaded.classes is None else list(loaded.classes),
    }


def _units(units: Any) -> dict[str, Any]:
    if units.mean is not None:
        return {"mean": list(units.mean), "std": list(units.std)}
    return {"value_range": list(units.value_range)}


def _augment(augment: Any) -> dict[str, Any] | None:
    if augment is None:
        return None
    names = (
        "area_threshold", "crop_ratio", "crop_prob", "noise_prob", "noise_std", "hflip_prob", "no_boxes", "rng", "min_kept", "seed",
    )  # fmt: skip
    rule = augment.rule if isinstance(augment.rule, str) else getattr(augment.rule, "__name__", "callable")
    return {"type": type(augment).__name__, "rule": rule} | {name: getattr(augment, name) for name in names}


def attack_facts(attack: Any) -> dict[str, Any]:
    """Settings of an attack; of images that were made before there are none here."""
    names = ("mode", "eps", "step_size", "steps", "momentum", "diversity_prob", "random_start", "seed")
    found = {name: getattr(attack, name) for name in names if hasattr(attack, name)}
    return found | {"objective": attack.objective_name, "teacher_gradients": attack.steps}


def kept_facts(attack: Any) -> dict[str, Any] | None:
    """What an attack keeps of each image; ``canonical``: which image that is of, as far as the run has settled it."""
    memory = getattr(attack, "memory", None)
    if memory is None:
        return None
    codes = DeltaCodes.of(attack.eps, attack.step_size, memory.bits)
    settled = memory.settings.size if memory.settings is not None else ""
    return {
        "bits": memory.bits,
        "stride": memory.stride,
        "levels": codes.levels,
        "spacing": codes.spacing,
        "canonical": settled or memory.resolution,
        "forecast": None,
    }


def _loss(ikd: Any, loss: KDLoss, device: torch.device, maps: tuple[Any, Any, Any]) -> dict[str, Any]:
    student, teacher, strides = maps
    source = ikd._source(loss, ikd.features)
    (teacher_source,) = ikd._teacher_sources([loss])
    shared = ("levels", "source", "name", "backend")
    values = {
        name: getattr(loss, name)
        for name in inspect.signature(type(loss)).parameters
        if name not in shared and isinstance(getattr(loss, name, None), (int, float, str, tuple))
    }
    return {
        "type": type(loss).__name__,
        "settings": values,
        "normaliser": loss.normaliser,
        "reads_boxes": loss.reads_boxes,
        "source": _source_text(source),
        "teacher_source": _source_text(teacher_source),
        "backend": choose(type(loss).__name__, loss.backend, device, torch.float32),
        "levels": [
            {
                "level": i,
                "stride": strides[i],
                "student": list(student[i]),
                "teacher": list(teacher[i]),
                "align": f"1x1 conv {student[i][0]} -> {teacher[i][0]}" if str(i) in loss.align else None,
            }
            for i in loss.selected(len(student))
        ],
        "levels_of": len(student),
    }


def _source_text(source: Any) -> Any:
    if isinstance(source, str):
        return source
    return getattr(source, "__name__", repr(source)) if callable(source) else list(source)


def _probe(ikd: Any, losses: list[KDLoss], size: tuple[int, int] | None) -> list[tuple[Any, Any, Any]]:
    """For each loss: (C, H, W) of the student's maps, of the teacher's, and the strides of the teacher's."""
    square = (STRIDE_PROBE, STRIDE_PROBE)
    seen: dict[tuple[int, int], list[tuple[Any, Any]]] = {}
    for wanted in (square, size or square):
        if wanted not in seen:
            seen[wanted] = list(
                zip(
                    map_shapes(ikd.student, [ikd._source(x, ikd.features) for x in losses], ikd.call, wanted),
                    map_shapes(ikd.teacher.net, ikd._teacher_sources(losses), ikd.teacher.call, wanted),
                    strict=True,
                )
            )
    strides = [[STRIDE_PROBE // shape[1] for shape in teacher] for _, teacher in seen[square]]
    return [(s, t, row) for (s, t), row in zip(seen[size or square], strides, strict=True)]


def map_shapes(
    net: nn.Module, sources: list[Any], call: Any, size: tuple[int, int]
) -> list[list[tuple[int, ...]]]:
    """(C, H, W) of the maps at each source for one image of ``size``.

    Shapes are propagated and nothing is computed, except for a net whose operations cannot be propagated: that one runs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _shapes(net, sources, call, size)
    except Exception:  # whatever a user's operation makes of a tensor without values
        return _shapes(net, sources, call, size)
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def _shapes(
    net: nn.Module, sources: list[Any], call: Any, size: tuple[int, int]
) -> list[list[tuple[int, ...]]]:
    parameter = next(net.parameters())
    images = torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
    pyramids = run_tapped(net, sources, lambda: call(net, images), images, None)
    return [[tuple(m.shape[1:]) for m in maps] for maps in pyramids]
