"""The teacher: shipped with the package, or trained and packed here. Imports mmdet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from ikd_fast.demo.configs import ASSETS
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.files import write_bytes, write_json
from ikd_fast.distill.teacher import read_weights

SHIPPED = ASSETS / "demo_teacher.safetensors"


def read_teacher(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a ``.pth`` or ``.safetensors`` checkpoint; half-precision ones as float32."""
    if not path.is_file():
        raise DemoError(f"--teacher {path}: no such file", usage=True)
    return read_weights(path)


def write_pth(path: Path, weights: dict[str, torch.Tensor], classes: tuple[str, ...]) -> None:
    """A plain mmdet checkpoint: ``state_dict`` and the class names."""
    import io

    buffer = io.BytesIO()
    torch.save({"meta": {"dataset_meta": {"classes": classes}}, "state_dict": weights}, buffer)
    write_bytes(path, buffer.getvalue())


def pack(path: Path, weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write ``weights`` as float16 safetensors and the facts, with the file's SHA-256, as JSON beside it."""
    from safetensors.torch import save

    half = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in weights.items()}
    data = save(half)
    write_bytes(path, data)
    write_json(path.with_suffix(".json"), {**facts, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})


def fingerprint(path: Path) -> str:
    """What identifies a teacher checkpoint in a run's settings: its SHA-256."""
    if not path.is_file():
        raise DemoError(f"--teacher {path}: no such file", usage=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def shipped_facts() -> dict[str, Any]:
    """How the shipped teacher was made and what it reaches."""
    return json.loads(SHIPPED.with_suffix(".json").read_text())
