"""The resolved distillation step of a config: who sees what, in which units, with which weights."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any

from ikd_fast.attack.offline.adversarial_set import NoSet

from mmdet.registry import DATASETS, MODELS
from mmengine.registry import init_default_scope

from . import banner
from .classes import names_of_config
from .errors import InputError
from .facts import collect, run_facts
from .memory import memory_facts
from .offline.told import sets_of
from .pipeline_checks import pipeline_of

DEFAULT_SIZE = (800, 1333)
BOXES = {True: "boxes", False: None, None: "boxes, where the loss reads them"}


def explain(
    cfg: Any, *, name: str, size: tuple[int, int] | None = None, weights: bool = True, ranks: int = 1
) -> dict[str, Any]:
    """Everything about the step of ``cfg``, ready for ``json.dumps``; :func:`render` makes text of it.

    Args:
        cfg: a loaded config whose model is an IKDDistiller.
        name: its file, for messages.
        size: (h, w) of an image after the loader; default: what the pipeline says, else 800 x 1333.
        weights: load the teacher's checkpoint; without, its place is taken by random weights, and the result says so.
        ranks: processes the run will have.

    Raises:
        InputError: the model is not an IKDDistiller.
        ValueError, FileNotFoundError: what building the model finds wrong.
    """
    wanted = teacher_file(cfg, name)
    model = build_distiller(cfg, name, weights=weights)
    divisor = model.data_preprocessor.pad_size_divisor
    given, why = (size, "--size") if size is not None else pipeline_size(cfg)
    height, width = (math.ceil(side / divisor) * divisor for side in given)
    dataset = data_at_hand(cfg)
    run = run_of(cfg, ranks=ranks, dataset=dataset)
    if run["max_iters"] is not None:
        model.set_total_steps(run["max_iters"])
    facts = collect(model, size=(height, width), run=run)
    if facts["memory"] is not None and dataset is not None:
        facts["memory"].update(memory_facts(model.ikd.attack.memory, dataset))
    facts["config"] = name
    facts["teacher"].update(
        config=wanted["config"], checkpoint_of_config=wanted["checkpoint"], weights_read=weights
    )
    facts["input"] = {"image": list(given), "from": why, "padded": [height, width]}
    facts["pipeline"] = [str(step.get("type")) for step in _pipeline(_dataset(cfg))]
    facts["sets"] = "; ".join(sets_of(dataset)) if dataset is not None else ""
    facts["images_seen"] = images_seen(facts)
    return facts


def build_distiller(cfg: Any, name: str, *, weights: bool = True) -> Any:
    """The config's IKDDistiller; ``weights=False`` leaves the teacher's checkpoint unread."""
    init_default_scope(cfg.get("default_scope") or "mmdet")
    teacher_file(cfg, name)
    model = dict(cfg.model)
    if not weights:
        model.update(teacher_ckpt=None, allow_random_teacher=True)
    try:
        return MODELS.build(model)
    except (OSError, ConnectionError) as error:
        if not weights or not cfg.model.get("teacher_ckpt"):
            raise
        raise InputError(
            f"{name}: {error}; where the teacher's checkpoint is not at hand, explain --no-weights leaves it unread"
        ) from error


def teacher_file(cfg: Any, name: str) -> dict[str, Any]:
    """Config and checkpoint of the teacher as the config names them.

    Raises:
        InputError: the config distils nothing.
    """
    model = cfg.get("model")
    if not isinstance(model, Mapping) or "type" not in model:
        raise InputError(
            f"{name} has no model: expected a config of mmdet with model=dict(type='IKDDistiller', ...)"
        )
    kind = str(model["type"]).rpartition(".")[2]
    if kind != "IKDDistiller":
        raise InputError(
            f"{name}: the model is a plain {kind}; expected one that is distilled, model=dict(type='IKDDistiller', ...). Write one "
            f"from this student: ikd-fast init {name} TEACHER.py CKPT > ikd.py"
        )
    config = model.get("teacher_config")
    return {
        "config": str(config) if isinstance(config, str) else "a model dict",
        "checkpoint": model.get("teacher_ckpt"),
    }


def pipeline_size(cfg: Any) -> tuple[tuple[int, int], str]:
    """(h, w) that the train pipeline resizes or crops to, landscape, and where it says so."""
    found: tuple[tuple[int, int], str] | None = None
    for step in _pipeline(_dataset(cfg)):
        for key in ("scale", "scales", "crop_size", "size"):
            value = step.get(key)
            if isinstance(value, int):
                value = (value, value)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
                value = max(
                    value, key=lambda pair: pair[0] * pair[1]
                )  # RandomResize, multi-scale: the largest
            if (
                isinstance(value, (list, tuple))
                and len(value) == 2
                and all(isinstance(v, int) and v > 0 for v in value)
            ):
                found = (min(value), max(value)), f"{step['type']} of the train pipeline"
    return found or (DEFAULT_SIZE, "mmdet's usual scale: the pipeline names none")


def run_of(cfg: Any, *, ranks: int = 1, dataset: Any = None) -> dict[str, Any]:
    """:func:`~ikd_fast.mmdet.facts.run_facts` of a config; images are counted where the data set is present (``dataset``)."""
    loader, loop = cfg.get("train_dataloader") or {}, cfg.get("train_cfg") or {}
    batch = int(loader.get("batch_size", 1))
    by_iter = loop.get("type") == "IterBasedTrainLoop" or loop.get("by_epoch") is False
    dataset = data_at_hand(cfg) if dataset is None else dataset
    # After the data set's own filters.
    images = None if dataset is None else len(dataset)
    epoch_iters: float | None = None
    if images is not None and by_iter:
        epoch_iters = images / (batch * ranks)
    elif images is not None:
        share = math.ceil(images / ranks)
        epoch_iters = share // batch if loader.get("drop_last") else math.ceil(share / batch)
    max_epochs = None if by_iter else loop.get("max_epochs")
    total = loop.get("max_iters") if by_iter else None
    if max_epochs and epoch_iters is not None:
        total = int(max_epochs * epoch_iters)
    return run_facts(
        batch_size=batch,
        ranks=ranks,
        accumulate=int((cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)),
        images=images,
        epoch_iters=epoch_iters,
        max_epochs=max_epochs,
        max_iters=total,
        class_names=names_of_config(_dataset(cfg)),
    )


def data_at_hand(cfg: Any) -> Any:
    """The training data set; None where its files are not there."""
    try:
        return build_dataset(cfg, "") if _dataset(cfg) else None
    except NoSet:
        raise
    except FileNotFoundError:
        return None


def build_dataset(cfg: Any, name: str) -> Any:
    """The training data set, ready to be read at epoch 0.

    Raises:
        FileNotFoundError: its files are not there.
    """
    config = _dataset(cfg)
    if not config:
        raise InputError(f"{name} has no train_dataloader.dataset")
    init_default_scope(cfg.get("default_scope") or "mmdet")
    try:
        with redirect_stdout(io.StringIO()):  # pycocotools reports that it reads
            dataset = DATASETS.build(config)
    except NoSet:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the training data is not there: {error}; point train_dataloader.dataset at it, e.g. "
            "--cfg-options train_dataloader.dataset.data_root=FOLDER/"
        ) from error
    for _, transform in pipeline_of(dataset, ""):
        if hasattr(transform, "set_epoch"):
            transform.set_epoch(0)
    return dataset


def images_seen(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The addends of the loss and the attack: which net sees which images, with or without ground truth."""
    augment, adversarial = facts["augment"], facts["adversarial"]
    data = "x_data" if augment else "x"
    geo = "x_geo" if augment else "x"
    rows = [
        {
            "term": "task losses",
            "student": data,
            "teacher": None,
            "ground_truth": "the data set's",
            "weight": 1.0,
        }
    ]
    rows += [
        {
            "term": loss["name"],
            "student": data,
            "teacher": data,
            "ground_truth": BOXES[loss["reads_boxes"]],
            "weight": 1.0,
        }
        for loss in facts["losses"]
    ]
    if adversarial:
        objective = adversarial["attack"]["objective"]
        truth = "boxes and labels" if objective == "cls" else None
        if adversarial["attack"]["mode"] != "offline":
            rows.append(
                {"term": "the attack", "student": None, "teacher": geo, "ground_truth": truth, "weight": None}
            )
        rows.append(
            {
                "term": "kd/adv",
                "student": "x_adv",
                "teacher": "x_adv",
                "ground_truth": None,
                "weight": adversarial["beta"],
            }
        )
    return rows


def render(facts: Mapping[str, Any]) -> str:
    """:func:`explain`'s facts as text."""
    teacher, augment, adversarial = facts["teacher"], facts["augment"], facts["adversarial"]
    h, w = facts["input"]["padded"]
    lines = [
        f"{facts['config']}: {teacher['type']} ({teacher['config']}) distilled into {facts['student']['type']}",
        "",
    ]
    lines += ["Images", f"  x       from the loader: {' -> '.join(facts['pipeline']) or 'no pipeline'}"]
    batch = f"batch_augments {', '.join(facts['batch_augments'])}" if facts["batch_augments"] else ""
    if augment:
        lines.append(f"  x_geo   x after the adaptive crop (and flip){f', then {batch}' if batch else ''}")
        lines.append("  x_data  x_geo + noise")
        lines.append(f"          {banner.augment(augment)}")
    elif batch:
        lines.append(f"          then {batch}")
    if adversarial:
        attack = adversarial["attack"]
        lines.append(
            f"  x_adv   {'x_geo' if augment else 'x'} + delta, |delta| <= {attack['eps']:g} of 255 grey levels; never noise"
            if "eps" in attack
            else f"  x_adv   made before ({facts['sets'] or 'ikd-fast attack'}), loaded with x, cropped and flipped as x_geo; no noise"
        )
        lines.append(f"          {banner.attack(attack)}")
        if facts["memory"]:
            lines.append(f"          {banner.memory(facts['memory'])}")
    lines.append(
        f"  {facts['input']['image'][0]} x {facts['input']['image'][1]} ({facts['input']['from']}), padded to {h} x {w}"
    )
    lines += ["", "Who sees what"]
    table: list[tuple[str, ...]] = [("", "student", "teacher", "ground truth", "weight")]
    for row in facts["images_seen"]:
        weight = "" if row["weight"] is None else f"{row['weight']:g}"
        table.append(
            (row["term"], row["student"] or "-", row["teacher"] or "-", row["ground_truth"] or "none", weight)
        )
    lines += _columns(table)
    for loss in [*facts["losses"], *([adversarial["loss"]] if adversarial else [])]:
        first, where = banner.loss_line(loss).split("\n")
        lines += ["", f"{loss['name']}: {first}", f"  {where.rpartition(': levels')[0]}"]
        table = [("level", "stride", "student", "teacher", "align layer")]
        for row in loss["levels"]:
            maps = [" x ".join(map(str, row[net])) for net in ("student", "teacher")]
            table.append((str(row["level"]), str(row["stride"]), *maps, row["align"] or "none"))
        lines += _columns(table)
    lines += ["", "Nets"]
    lines.append(f"  student  {banner.net(facts['student'])}, {banner.units(facts['pixels']['student'])}")
    lines.append(f"  teacher  {banner.net(teacher)}, {_weights(teacher)}")
    if teacher["class_names"]:
        lines.append(f"  classes  {banner.classes(teacher['class_names'], facts['run'].get('class_names'))}")
    lines.append(f"  pixels   {banner.pixels(facts['pixels'])}")
    if facts["init_student"]:
        lines.append("  start    the student's neck and head begin with the teacher's weights (init_student)")
    lines += ["", "Run"]
    lines.append(f"  stop     {banner.stop(facts)}")
    lines.append(f"  batch    {banner.batch(facts['run'])}")
    if facts["run"]["images"] is None:
        lines.append("           the training images are not here: what depends on their number is not known")
    return "\n".join(lines)


def _weights(teacher: Mapping[str, Any]) -> str:
    if teacher["weights_read"]:
        return banner.weights(teacher)
    return f"weights not read (--no-weights); the config names {teacher['checkpoint_of_config'] or 'no checkpoint'}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _dataset(cfg: Any) -> Mapping[str, Any]:
    return (cfg.get("train_dataloader") or {}).get("dataset") or {}


def _pipeline(dataset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The transforms of a data set's config, of the data sets it wraps first."""
    inner = dataset.get("dataset")
    if isinstance(inner, Mapping):
        yield from _pipeline(inner)
    for child in dataset.get("datasets") or []:
        yield from _pipeline(child)
        break  # concatenated sets: the first stands for all
    yield from (step for step in dataset.get("pipeline") or [] if isinstance(step, Mapping))
