"""From a training checkpoint to a plain student: weights, class names, nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .compat import UnsafeCheckpointError, load_checkpoint
from .errors import InputError

KD_PREFIX = "kd."
DETECTOR_PARTS = (
    "backbone",
    "neck",
    "bbox_head",
    "roi_head",
    "rpn_head",
    "mask_head",
    "encoder",
    "decoder",
    "detector",
)
"""What mmdet's detectors name their parts; a checkpoint of one has weights below at least one of these."""
_EXPECTED = "expected a .pth file that torch.save wrote: a dict with weights under 'state_dict' (epoch_N.pth), or a dict of weights"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's dict, known to hold weights; loaded as safely as :func:`ikd_fast.mmdet.compat.load_checkpoint` does.

    Raises:
        InputError: the file is no checkpoint, is damaged, or holds something else.
        UnsafeCheckpointError: it holds objects that are not on the allow-list.
    """
    with open(path, "rb") as file:
        head = file.read(2)
    # torch.save writes a zip archive, and wrote a bare pickle before torch 1.6.
    if head != b"PK" and head[:1] != b"\x80":
        found = "an empty file" if not head else "neither a torch archive nor a pickle"
        if Path(path).suffix == ".safetensors":
            found = "a .safetensors file; give the .pth checkpoint it was exported from"
        raise InputError(f"{path} is not a checkpoint: {_EXPECTED}; found {found}")
    try:
        checkpoint = load_checkpoint(path)
    except UnsafeCheckpointError as error:
        if "not on the allow-list" in str(error):
            raise
        raise InputError(_damaged(path, error)) from error
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise InputError(_damaged(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} is not a checkpoint: {_EXPECTED}; found a {type(checkpoint).__name__}")
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        found = f"keys {[str(key) for key in checkpoint][:8]}"
        raise InputError(f"{path} holds no weights: {_EXPECTED}; found {found}")
    return checkpoint


def _damaged(path: str | Path, error: BaseException) -> str:
    # load_checkpoint's own text advises to unpickle anything: no help with a file that is cut off.
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return f"{path} is not a whole checkpoint: {_EXPECTED}; reading it failed: {reason[0][:200]}"


def student_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The student's weights of an IKD or plain checkpoint, or of a bare state dict: no loss modules, no ``module.``."""
    state = checkpoint.get("state_dict", checkpoint)
    weights = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    weights = {k: v.detach().cpu() for k, v in weights.items() if not k.startswith(KD_PREFIX)}
    if not weights:
        raise InputError(
            f"the checkpoint holds no weights: expected tensors under 'state_dict', found keys {sorted(checkpoint)[:8]}"
        )
    return weights


def export(source: str | Path, target: str | Path) -> dict[str, Tensor]:
    """Write the student of ``source`` as ``target``, a plain mmdet checkpoint (``.pth``) or ``.safetensors``.

    Optimizer, schedulers, message hub, config and distillation weights stay behind; of ``meta``, the data set's class names and
    palette stay. The file appears whole or not at all.

    Returns:
        The weights written.

    Raises:
        InputError: the target's suffix is neither, it is the source, or the source holds no weights of a detector.
        UnsafeCheckpointError: the source holds objects that are not on the allow-list.
    """
    source, target = Path(source), Path(target)
    if target.suffix not in (".pth", ".safetensors"):
        raise InputError(f"export writes .pth or .safetensors, got {target.name!r}", usage=True)
    if target.resolve() == source.resolve():
        raise InputError(f"the target is the checkpoint itself: {target}; give another name", usage=True)
    checkpoint = read_checkpoint(source)
    weights = student_weights(checkpoint)
    if not any(key.split(".")[0] in DETECTOR_PARTS for key in weights):
        raise InputError(
            f"{source} holds no detector: expected weights below one of {', '.join(f'{part}.' for part in DETECTOR_PARTS)}; "
            f"found {len(weights)} keys, the first {', '.join(list(weights)[:6])}"
        )
    dataset_meta = checkpoint.get("meta", {}).get("dataset_meta", {}) if "state_dict" in checkpoint else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            classes = json.dumps(list(dataset_meta.get("classes", ())))
            save_file({k: v.contiguous() for k, v in weights.items()}, partial, metadata={"classes": classes})
        else:
            torch.save({"meta": {"dataset_meta": dataset_meta}, "state_dict": weights}, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return weights
