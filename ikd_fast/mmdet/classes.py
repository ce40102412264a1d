"""Class names of checkpoints and data sets: class id k has to mean the same to a teacher whose class loss is attacked."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmdet.registry import DATASETS
from mmengine.logging import print_log

Names = tuple[str, ...]


def names_of(meta: Any) -> Names | None:
    """The class names in a ``metainfo`` or in the ``meta`` of a checkpoint, mmdet 2's ``CLASSES`` too; None where it has none.

    >>> names_of(dict(dataset_meta=dict(classes=("cat", "dog")))), names_of(dict(CLASSES=["cat"])), names_of({})
    (('cat', 'dog'), ('cat',), None)
    """
    if not isinstance(meta, Mapping):
        return None
    for place in (meta.get("dataset_meta"), meta):
        for key in ("classes", "CLASSES"):
            found = place.get(key) if isinstance(place, Mapping) else None
            if found:
                return (found,) if isinstance(found, str) else tuple(str(name) for name in found)
    return None


def names_in_header(path: str) -> Names | None:
    """The class names that ``ikd-fast export`` writes into the header of a ``.safetensors`` file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get("classes")
    try:
        return names_of({"classes": json.loads(written)}) if written else None
    except ValueError:
        return None  # somebody else's key of that name


def names_of_data(dataset: Any) -> list[Names]:
    """The class names of a data set; one tuple, or one for each part of a set whose parts differ."""
    metainfo = getattr(dataset, "metainfo", None)
    parts = metainfo if isinstance(metainfo, (list, tuple)) else [metainfo]
    return [names for names in map(names_of, parts) if names is not None]


def names_of_config(dataset: Any) -> Names | None:
    """The class names that a data set's config gives it, without building it: its ``metainfo``, else its class's own."""
    while isinstance(dataset, Mapping) and "metainfo" not in dataset:
        inner = dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None)
        if inner is None:
            break
        dataset = inner
    if not isinstance(dataset, Mapping):
        return None
    named = names_of(dataset.get("metainfo"))
    if named is not None or isinstance(dataset.get("metainfo"), str):
        return named
    kind = dataset.get("type")
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    return names_of(getattr(kind, "METAINFO", None))


def check_counts(student: int | None, teacher: int | None, names: Names | None) -> None:
    """Raise where the teacher has fewer classes than the student; where it has more, say so unless names tell which they are."""
    if student is None or teacher is None:
        return
    if teacher < student:
        raise ValueError(
            f"the student has {student} classes, the teacher {teacher}: objective 'cls' attacks the teacher's classification of the "
            "student's classes; use a teacher of the same classes, or attack=dict(type='OnlineDIFGSM', objective='feature')"
        )
    if teacher > student and names is None:
        print_log(
            f"ikd_fast: the teacher has {teacher} classes, the student {student}: class id k must mean the same in both",
            logger="current",
            level=logging.WARNING,
        )


def check_names(teacher: Names | None, dataset: Any, *, attacked: bool) -> None:
    """Raise unless the data set's classes are the first of the teacher's, by name and in their order.

    Compared are small letters without what separates words: "traffic_light" is "Traffic light". Names that are not known are
    not compared, nor is anything where the teacher's class loss is not ``attacked``.

    Raises:
        ValueError: names differ; the first positions where they do, and what to write.
    """
    if teacher is None or not attacked:
        return
    for data in names_of_data(dataset):
        problem = mismatch(teacher, data)
        if problem is not None:
            raise ValueError(problem)


def mismatch(teacher: Names, data: Names) -> str | None:
    """Where the data set's names are not the first of the teacher's, and what to write; None where they are."""
    differ = differing(teacher, data)
    if not differ:
        return None
    shown = "; ".join(
        f"{i}: {data[i]!r} in the data set, {repr(teacher[i]) if i < len(teacher) else 'none'} in the teacher's checkpoint"
        for i in differ[:3]
    )
    first = teacher[: len(data)]
    reordered = sorted(map(_plain, data)) == sorted(map(_plain, first))
    remedy = (
        f"write metainfo=dict(classes={first!r:.200}) in every data set (labels follow it)"
        if reordered
        else "use a teacher of the data set's classes in their order"
    )
    return (
        f"class names differ at {len(differ)} of {len(data)} positions, first {shown}. Objective 'cls' attacks the teacher's "
        f"classification of class id k, which must mean the same in both: {remedy}, or write attack=dict(type='OnlineDIFGSM', "
        "objective='feature'), which needs no classes. Other words for the same classes: save the teacher's state_dict alone, "
        "without names to compare"
    )


def check_training(model: nn.Module, dataset: Any) -> None:
    """:func:`check_names` of an :class:`~ikd_fast.mmdet.IKDDistiller` that is about to be trained on ``dataset``."""
    ikd: Any = model.ikd
    loaded = ikd.teacher.loaded
    check_names(None if loaded is None else loaded.classes, dataset, attacked=attacks_classes(ikd))


def attacks_classes(ikd: Any) -> bool:
    """Whether a step differentiates the teacher's classification loss."""
    return bool(ikd.adversarial and ikd.attack.objective_name == "cls" and ikd.attack.steps)


def differing(teacher: Sequence[str], data: Sequence[str]) -> list[int]:
    """The positions at which the data set's names are not the teacher's.

    >>> differing(["traffic_light", "car", "bus"], ["Traffic light", "bus"])
    [1]
    """
    return [i for i, name in enumerate(data) if i >= len(teacher) or _plain(name) != _plain(teacher[i])]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())
