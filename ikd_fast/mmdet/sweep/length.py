"""A run cut short with the shape of its schedule kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ikd_fast.distill.schedule import StopAt
from ikd_fast.mmdet.errors import InputError

SCALED = ("begin", "end", "T_max", "step_size", "total_steps")
RAMPS = ("Linear", "Constant", "QuadraticWarmup")
"""Change the rate over [begin, end) and leave it; they need two steps for that."""
KNOWN = (*RAMPS, "Step", "MultiStep", "Exponential", "CosineAnnealing", "Poly", "OneCycle", "CosineRestart")
CHECKPOINTS = 10
FOREVER = 10**9


@dataclass(frozen=True)
class Length:
    """``iters`` or ``epochs`` of training, or neither: the config's own."""

    iters: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.iters is not None and self.epochs is not None:
            raise InputError("write --iters or --epochs, not both", usage=True)
        for name, value in (("--iters", self.iters), ("--epochs", self.epochs)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}", usage=True)

    @property
    def given(self) -> bool:
        return self.iters is not None or self.epochs is not None

    def __str__(self) -> str:
        if self.iters is not None:
            return f"{self.iters} iterations"
        return f"{self.epochs} epochs" if self.epochs is not None else "the config's length"


def set_length(cfg: Any, length: Length) -> None:
    """The train loop, evaluation at its end only, and about ten checkpoints, of which two are kept.

    Raises:
        InputError: epochs for a loop that counts iterations.
    """
    loop = dict(cfg.train_cfg)
    by_epoch = by_epochs(loop)
    if length.epochs is not None and not by_epoch:
        raise InputError("--epochs: the config's train loop counts iterations; write --iters", usage=True)
    if length.iters is not None:
        by_epoch = False
        loop = dict(type="IterBasedTrainLoop", max_iters=length.iters)
        cfg.log_processor = {**(cfg.get("log_processor") or {}), "by_epoch": False}
    elif length.epochs is not None:
        loop["max_epochs"] = length.epochs
    count = loop["max_epochs" if by_epoch else "max_iters"]
    loop.pop("dynamic_intervals", None)
    loop["val_begin"] = loop["val_interval"] = count
    cfg.train_cfg = loop
    checkpoint = dict(
        type="CheckpointHook",
        by_epoch=by_epoch,
        interval=max(1, count // CHECKPOINTS),
        max_keep_ckpts=2,
        save_last=True,
    )
    cfg.default_hooks = {**(cfg.get("default_hooks") or {}), "checkpoint": checkpoint}


def by_epochs(loop: Mapping[str, Any]) -> bool:
    """Whether a ``train_cfg`` counts epochs; mmengine also takes one without a type."""
    if "type" in loop:
        return "IterBased" not in str(loop["type"])
    return bool(loop.get("by_epoch", "max_epochs" in loop))


def scale_schedule(runner: Any, original: Mapping[str, Any]) -> None:
    """Scale the parameter schedulers and ``stop_at`` of a Runner that has not started by its length over ``original``'s.

    ``original``: the config's own ``train_cfg``. Everything is then counted in iterations; schedulers that stepped once an epoch
    step every iteration. Other hooks that count epochs or iterations are left as they are.
    """
    steps = len(runner.train_dataloader)
    total = original["max_epochs"] * steps if by_epochs(original) else original["max_iters"]
    factor = runner.max_iters / total
    if runner.param_schedulers is not None:
        if isinstance(runner.param_schedulers, Mapping) and "type" not in runner.param_schedulers:
            raise InputError(
                "a schedule of several optimizers cannot be scaled: sweep at the config's own length"
            )
        listed = runner.param_schedulers
        listed = [listed] if isinstance(listed, Mapping) else list(listed)
        scaled = [scale_scheduler(s, steps, factor, total) for s in listed]
        runner.param_schedulers = [s for s in scaled if s is not None]
    model = getattr(runner.model, "module", runner.model)
    rule = model.ikd.stop_at.rule
    if isinstance(rule, Mapping):
        ((unit, count),) = rule.items()
        ends = count * (steps if unit == "epoch" else 1)
        model.ikd.stop_at = StopAt(dict(iter=round(ends * factor)))


def scale_scheduler(
    scheduler: Mapping[str, Any], steps: int, factor: float, total: int
) -> dict[str, Any] | None:
    """A scheduler's config in iterations, ``factor`` times as long; None for a ramp of less than two steps.

    Args:
        steps: iterations of an epoch.
        total: iterations of the original run, the default of ``end``.

    >>> scale_scheduler(dict(type="MultiStepLR", milestones=[16, 22], gamma=0.1), steps=100, factor=0.05, total=2400)
    {'type': 'MultiStepLR', 'milestones': [80, 110], 'gamma': 0.1, 'end': 120, 'by_epoch': False}
    """
    found = dict(scheduler)
    kind = str(found["type"]).rpartition(".")[2]
    stem = next((k for k in KNOWN if kind in (f"{k}LR", f"{k}Momentum", f"{k}ParamScheduler")), None)
    if stem is None:
        raise InputError(
            f"param_scheduler {kind} cannot be scaled to another length; known are {', '.join(KNOWN)}. Sweep at the config's own "
            "length, or give a schedule by --cfg-options"
        )
    by_epoch = found.pop("by_epoch", True)
    found.pop("convert_to_iter_based", None)
    unit = steps if by_epoch else 1
    found.setdefault("end", total // unit)

    def scaled(value: float) -> int:
        return FOREVER if value >= FOREVER else round(value * unit * factor)

    for key in SCALED:
        if found.get(key) is not None:
            found[key] = scaled(found[key]) if key in ("begin", "end") else max(1, scaled(found[key]))
    for key in ("milestones", "periods"):
        if key in found:
            found[key] = [max(1, scaled(v)) for v in found[key]]
    if stem == "Exponential":
        found["gamma"] = found["gamma"] ** (1 / (unit * factor))
    found["by_epoch"] = False
    if found["end"] - found.get("begin", 0) < (2 if stem in RAMPS else 1):
        return None
    return found
