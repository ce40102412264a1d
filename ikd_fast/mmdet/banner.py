"""What a run distils, in a dozen lines: logged once when training starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ikd_fast import __version__

from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop

from .classes import differing, names_of_data
from .facts import collect, run_facts


def log_banner(runner: Any, model: Any, epoch_iters: float) -> None:
    """Log :func:`render` of a distiller; ``IKDHook`` calls it once, with the iterations of one pass."""
    text = render(collect(model, run=facts_of_runner(runner, epoch_iters)))
    print_log(text, logger="current", level=logging.INFO)


def facts_of_runner(runner: Any, epoch_iters: float) -> dict[str, Any]:
    """:func:`~ikd_fast.mmdet.facts.run_facts` of a run that is about to start."""
    from mmengine.dist import get_world_size

    loader = runner.train_dataloader
    names = names_of_data(loader.dataset)
    by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
    return run_facts(
        batch_size=int(getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size or 1),
        ranks=get_world_size(),
        accumulate=int(getattr(runner.optim_wrapper, "_accumulative_counts", 1)),
        images=len(loader.dataset),
        epoch_iters=epoch_iters,
        max_epochs=runner.max_epochs if by_epoch else None,
        max_iters=runner.max_iters,
        class_names=names[0] if len(names) == 1 else None,
    )


def render(facts: Mapping[str, Any]) -> str:
    """The facts of :func:`~ikd_fast.mmdet.facts.collect` as text."""
    student, teacher = facts["student"], facts["teacher"]
    rows = [
        ("student", f"{net(student)}, {units(facts['pixels']['student'])}"),
        ("teacher", f"{net(teacher)}, {weights(teacher)}"),
        ("pixels", pixels(facts["pixels"])),
    ]
    if teacher["class_names"]:
        rows.insert(2, ("classes", classes(teacher["class_names"], facts["run"].get("class_names"))))
    rows += [(loss["name"], loss_line(loss)) for loss in facts["losses"]]
    adversarial = facts["adversarial"]
    if adversarial is None:
        rows.append(("kd/adv", "no adversarial branch (adv=None, or beta=0)"))
    else:
        rows.append(("kd/adv", f"beta {adversarial['beta']:g} x {loss_line(adversarial['loss'])}"))
        rows.append(("attack", attack(adversarial["attack"])))
    if facts["memory"] is not None:
        rows.append(("memory", memory(facts["memory"])))
    rows.append(("augment", augment(facts["augment"])))
    if facts["batch_augments"]:
        rows.append(("batch", f"augmented by {', '.join(facts['batch_augments'])} (batch_augments)"))
    rows.append(("stop", stop(facts)))
    if facts["run"]:
        rows.append(("run", batch(facts["run"])))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  " + text.replace("\n", "\n" + " " * (width + 4)) for name, text in rows]
    return "\n".join([f"ikd_fast {__version__} distils {teacher['type']} into {student['type']}", *lines])


def weights(teacher: Mapping[str, Any]) -> str:
    if teacher["checkpoint"] is None:
        return f"RANDOM weights: none of {teacher['keys']} keys loaded (allow_random_teacher)"
    return f"{teacher['keys_loaded']} of {teacher['keys']} keys loaded from {teacher['checkpoint']}"


def classes(teacher: Sequence[str], data: Sequence[str] | None) -> str:
    """The teacher's class names beside those of the training data."""
    text = f"the teacher's are {_some(teacher)}"
    if data is None:
        return text
    if not (differ := differing(teacher, data)):
        return f"{text}; the data set's are the same" + (
            f", the first {len(data)}" if len(data) < len(teacher) else ""
        )
    return f"{text}; the data set's {_some(data)} differ at {len(differ)} of {len(data)} positions"


def pixels(facts: Mapping[str, Any]) -> str:
    padded = f"padded to multiples of {facts['pad_divisor']}"
    if not facts["converted"]:
        return f"the same for both nets, {padded}"
    turned = ", channels turned round" if facts["channels_turned_for_teacher"] else ""
    return f"converted to {units(facts['teacher'])} for the teacher{turned}; {padded}"


def loss_line(loss: Mapping[str, Any]) -> str:
    levels = loss["levels"]
    settings = ", ".join(f"{key.rstrip('_')}={_number(value)}" for key, value in loss["settings"].items())
    source, theirs = loss["source"], loss["teacher_source"]
    taps = str(source) if source == theirs else f"{source} (teacher: {theirs})"
    channels = sorted({(row["student"][0], row["teacher"][0]) for row in levels})
    align = sum(row["align"] is not None for row in levels)
    return (
        f"{loss['type']}({settings}), {loss['normaliser']}; backend {loss['backend']}\n"
        f"at {taps}: levels {_list(row['level'] for row in levels)} of {loss['levels_of']}, strides "
        f"{_list(row['stride'] for row in levels)}, channels {', '.join(f'{s} -> {t}' for s, t in channels)}, "
        f"{f'{align} align layers' if align else 'no align layer'}"
    )


def attack(facts: Mapping[str, Any]) -> str:
    if facts["mode"] == "offline":
        return "none in the step: adversarial images come with the data (LoadAdversarialImage)"
    settings = f"eps {facts['eps']:g}, step {facts['step_size']:g} of 255 grey levels"
    start = "random start" if facts["random_start"] else "from the image"
    gradients = facts["teacher_gradients"]
    return (
        f"OnlineDIFGSM {facts['mode']}, objective {facts['objective']}, {settings}, {start}, {gradients} teacher "
        f"gradient{'' if gradients == 1 else 's'} a step, seed {facts['seed']}"
    )


def memory(facts: Mapping[str, Any]) -> str:
    cells = "each pixel" if facts["stride"] == 1 else f"{facts['stride']} x {facts['stride']} pixels"
    text = (
        f"perturbations kept in {facts['bits']} bits ({facts['levels']} levels, {facts['spacing']:g} grey levels apart) for {cells} of "
        f"the canonical image ({facts['canonical']})"
    )
    return f"{text}: {facts['forecast']}" if facts["forecast"] else text


def augment(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "none in the model (augment=None)"
    tau = f"{facts['area_threshold']:g}"
    crop = f"crop by up to {facts['crop_ratio']:.0%} a side (probability {facts['crop_prob']:g})"
    noise = f"noise of sigma {facts['noise_std']:g} grey levels (probability {facts['noise_prob']:g})"
    where = {"any_large": f"where a box has {tau} px or more", "no_small": f"where no box is below {tau} px"}
    return f"{facts['type']}: {crop} {where.get(facts['rule'], 'by ' + facts['rule'])}, else {noise}; seed {facts['seed']}"


def stop(facts: Mapping[str, Any]) -> str:
    found, run = facts["stop"], facts["run"]
    if facts["augment"] is None and facts["adversarial"] is None:
        return "nothing to stop: neither augmentation nor adversarial branch"
    if found["rule"] is None:
        return "never: augmentation and adversarial branch are on to the end"
    epoch = "?" if found["epoch"] is None else f"{found['epoch']:g}"
    iteration = "?" if found["iter"] is None else str(found["iter"])
    epochs = f" of {run['max_epochs']}" if run.get("max_epochs") else ""
    iters = f" of {run['max_iters']}" if run.get("max_iters") else ""
    text = f"augmentation and adversarial branch off from epoch {epoch}{epochs}, iteration {iteration}{iters} (stop_at={found['rule']})"
    return f"{text}: NEVER REACHED in this run, they stay on to its end" if never_stops(found, run) else text


def never_stops(found: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether a stop point lies at or beyond the end of the run.

    >>> never_stops(dict(epoch=16, iter=None), dict(max_epochs=12)), never_stops(dict(epoch=8, iter=None), dict(max_epochs=12))
    (True, False)
    """
    pairs = ((found.get("epoch"), run.get("max_epochs")), (found.get("iter"), run.get("max_iters")))
    return any(at is not None and end and at >= end for at, end in pairs)


def batch(run: Mapping[str, Any]) -> str:
    ranks = f"{run['ranks']} rank{'' if run['ranks'] == 1 else 's'}"
    accumulate = f" x {run['accumulate']} accumulated" if run["accumulate"] > 1 else ""
    images = "" if run["images"] is None else f", {run['images']} images"
    passes = "" if run["epoch_iters"] is None else f", {run['epoch_iters']:g} iterations a pass"
    return f"{run['batch_size']} x {ranks}{accumulate} = {run['images_per_update']} images an update{images}{passes}"


def net(net: Mapping[str, Any]) -> str:
    classes = (
        "" if net["classes"] is None else f", {net['classes']} class{'' if net['classes'] == 1 else 'es'}"
    )
    return f"{net['type']}, {net['parameters'] / 1e6:.1f} M parameters{classes}"


def units(units: Mapping[str, Any]) -> str:
    if "mean" in units:
        return (
            f"mean {_list(map(_number, units['mean']), ', ')} std {_list(map(_number, units['std']), ', ')}"
        )
    low, high = units["value_range"]
    return f"values {low:g} to {high:g}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ... ({len(names)})"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list(values: Any, between: str = " ") -> str:
    return between.join(str(v) for v in values)
