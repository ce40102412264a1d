"""The folder of a sweep: whose it is, and what each run finds there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ikd_fast.files import write_bytes, write_json
from ikd_fast.mmdet.errors import InputError

from .grid import Setting, apply
from .length import Length, set_length
from .worker import CONFIG, RESULT, SPEC

STATE = "sweep.json"
SHOWN = 8


def claim(out: Path, cfg: Any, length: Length) -> None:
    """Make ``out`` the folder of sweeps of this config at this length; a grid may grow there.

    Raises:
        InputError: it holds runs of another config or length (each difference named), or other files.
    """
    now = {"length": str(length), **flat({k: v for k, v in cfg.to_dict().items() if k != "work_dir"})}
    path = out / STATE
    if path.is_file():
        try:
            before = json.loads(path.read_text())["made_with"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is not a sweep's; write another --out FOLDER", usage=True) from None
        missing = "nothing"
        changed = [
            f"{key}: {before.get(key, missing)} there, {now.get(key, missing)} now"
            for key in dict.fromkeys([*before, *now])
            if before.get(key, missing) != now.get(key, missing)
        ]
        if changed:
            more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise InputError(
                f"{out} holds a sweep of another config or length ({'; '.join(changed[:SHOWN])}{more}). Write another --out FOLDER, or "
                "repeat the first command; only the grid and the number of seeds may change",
                usage=True,
            )
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no sweep; write another --out FOLDER", usage=True)
    write_json(path, {"made_with": now})


def flat(node: Any, prefix: str = "") -> dict[str, str]:
    """Leaves by dotted path.

    >>> flat(dict(a=[dict(b=1)], c={}))
    {'a.0.b': '1', 'c': '{}'}
    """
    if isinstance(node, Mapping) and node:
        items = [(str(k), v) for k, v in node.items()]
    elif isinstance(node, (list, tuple)) and node:
        items = [(str(i), v) for i, v in enumerate(node)]
    else:
        return {prefix: repr(node)}
    found: dict[str, str] = {}
    for key, value in items:
        found.update(flat(value, f"{prefix}.{key}" if prefix else key))
    return found


def run_folder(out: Path, setting: Setting, seed: int) -> Path:
    return out / "runs" / setting.name / f"seed{seed}"


def prepare(out: Path, cfg: Any, setting: Setting, repeat: int, seed: int, length: Length) -> Path:
    """Write what the worker reads; returns the run's folder."""
    folder = run_folder(out, setting, seed)
    own = apply(cfg, setting, repeat)
    original = dict(own.train_cfg)
    set_length(own, length)
    init = None if own.get("load_from") else str(out / "runs" / f"init_seed{seed}.pth")
    own.work_dir = str(folder)
    write_bytes(folder / CONFIG, own.pretty_text.encode())
    write_json(folder / SPEC, {"scale": original if length.given else None, "init": init})
    return folder


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a finished or failed run left; None for one that is to be run."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def earlier(out: Path) -> dict[Setting, dict[int, dict[str, Any]]]:
    """Results of every run below the folder, by setting and seed, whichever grid asked for them."""
    found: dict[Setting, dict[int, dict[str, Any]]] = {}
    for home in sorted((out / "runs").glob("*/seed*")):
        setting, result = Setting.named(home.parent.name), result_of(home)
        if setting is not None and result is not None:
            found.setdefault(setting, {})[int(home.name.removeprefix("seed"))] = result
    return found


def forget(folder: Path) -> None:
    """Delete a run, to start it again."""
    if (folder / RESULT).is_file():
        shutil.rmtree(folder)
