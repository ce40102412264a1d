"""Names in checkpoints: the student's own, unprefixed; the losses' under ``kd.``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

KD_PREFIX = "kd."
_HOME, _STUDENT = "ikd.", "ikd.student."


def export_keys(module: nn.Module, state: Any, prefix: str, metadata: Any) -> Any:
    """State-dict hook, in place: ``ikd.student.x`` to ``x``, any other ``ikd.x`` to ``kd.x``, order kept."""
    for key in [k for k in state if k.startswith(prefix)]:
        value = state.pop(key)
        name = key[len(prefix) :]
        if name.startswith(_STUDENT):
            name = name.removeprefix(_STUDENT)
        elif name.startswith(_HOME):
            name = KD_PREFIX + name.removeprefix(_HOME)
        state[prefix + name] = value
    return state


def import_keys(state: Any, prefix: str, ikd: nn.Module) -> None:
    """In place, the way back. A plain student's weights are welcome; a student key left without a weight is an error.

    Where the checkpoint has no weights for the losses, theirs stay as they are.
    """
    names = [k[len(prefix) :] for k in state if k.startswith(prefix)]
    if any(name.startswith(_HOME) for name in names):
        return
    own = ikd.state_dict()
    student = [k.removeprefix("student.") for k in own if k.startswith("student.")]
    losses = {k: v for k, v in own.items() if not k.startswith("student.")}
    missing = sorted(k for k in student if k not in names and not k.endswith("num_batches_tracked"))
    if len(missing) == len([k for k in student if not k.endswith("num_batches_tracked")]):
        raise ValueError(_nothing_fits(names, student, "the student"))
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the student's {len(student)} weights: {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}; it must be of this student, plain or distilled. "
            f"It has {len(names)} keys, e.g. {names[:3]}"
        )
    wrong = [
        f"{k} (checkpoint {list(state[prefix + k].shape)}, model {list(own['student.' + k].shape)})"
        for k in student
        if k in names and state[prefix + k].shape != own["student." + k].shape
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the checkpoint's weights have another shape than the student's: {', '.join(wrong[:8])}"
        )
    absent = [k for k in losses if KD_PREFIX + k not in names]
    for name in names:
        value = state.pop(prefix + name)
        home = _HOME + name.removeprefix(KD_PREFIX) if name.startswith(KD_PREFIX) else _STUDENT + name
        state[prefix + home] = value
    for name in absent:
        state[f"{prefix}{_HOME}{name}"] = losses[name]


def check_any_fits(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if not one weight of a checkpoint fits a model: mmengine would log that and train from scratch.

    A model whose own loading renames keys (mmdet's semi-supervised detectors) is asked by loading.
    """
    own = model.state_dict()
    weights = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    known = [name for name in weights if name in own]
    fits = any(own[name].shape == weights[name].shape for name in known)
    if not known and own and weights:
        missing = set(model.load_state_dict(dict(weights), strict=False).missing_keys)
        fits = any(key not in missing and not key.endswith("num_batches_tracked") for key in own)
    if own and not fits:
        raise ValueError(_nothing_fits(list(weights), list(own), f"the model, a {type(model).__name__}"))


def _nothing_fits(names: list[str], own: list[str], what: str) -> str:
    return (
        f"load_from: nothing in the checkpoint fits {what}: it has {len(names)} keys, e.g. {', '.join(names[:3]) or 'none'}; expected "
        f"{len(own)}, e.g. {', '.join(own[:3])}. Give a checkpoint of this detector, plain or distilled; the weights of a backbone "
        "alone are named in the config, backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='...'))"
    )
