"""From a training checkpoint to a plain student: weights, class names, nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .compat import load_checkpoint

KD_PREFIX = "kd."


def student_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The student's weights of an IKD or plain checkpoint, or of a bare state dict: no loss modules, no ``module.``."""
    state = checkpoint.get("state_dict", checkpoint)
    weights = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    weights = {k: v.detach().cpu() for k, v in weights.items() if not k.startswith(KD_PREFIX)}
    if not weights:
        raise ValueError(
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
        ValueError: the target's suffix is neither, it is the source, or there are no weights.
    """
    source, target = Path(source), Path(target)
    if target.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"export writes .pth or .safetensors, got {target.name!r}")
    if target.resolve() == source.resolve():
        raise ValueError(f"the target is the checkpoint itself: {target}; give another name")
    checkpoint = load_checkpoint(source)
    weights = student_weights(checkpoint)
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
