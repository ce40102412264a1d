"""``ikd-fast strength CONFIG CKPT``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ikd_fast.analysis.strength import StrengthSettings, measure_strength, report_markdown, total_work
from ikd_fast.files import write_bytes, write_json
from ikd_fast.mmdet import launch
from ikd_fast.mmdet.build import resolve_path
from ikd_fast.mmdet.errors import InputError


def run(
    config: str,
    checkpoint: str,
    *,
    options: list[str],
    out: Path | None,
    images: int,
    eps: str,
    seeds: int,
    batch: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure, write ``strength.json``, ``.md`` and ``.png`` in ``out``, and print the tables (or the JSON)."""
    for name, value in (("--images", images), ("--seeds", seeds), ("--batch", batch)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}", usage=True)
    radii = parse_eps(eps)
    with redirect_stdout(sys.stderr):
        path = Path(resolve_path(config, "configs"))
        if not path.is_file():
            raise InputError(f"no config {path} (relative to {Path.cwd()})", usage=True)
        cfg = launch.load_config(path, work_dir=None, options=options, launcher="none")
        out = out or Path("runs") / "strength" / path.stem
        report = strength_of(
            cfg,
            path.name,
            checkpoint,
            out,
            images=images,
            eps=radii,
            seeds=tuple(range(seeds)),
            batch=batch,
            device=device,
        )
    print(
        json.dumps(report, indent=1)
        if as_json
        else f"{report_markdown(report)}\nwritten: {out}/strength.json, .md and .png"
    )


def strength_of(
    cfg: Any,
    name: str,
    checkpoint: str,
    out: Path,
    *,
    images: int,
    eps: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0),
    seeds: tuple[int, ...] = (0, 1, 2),
    batch: int = 4,
    device: str | None = None,
) -> dict[str, Any]:
    """The report of a loaded config, written to ``out``; finished (eps, seed) pairs below ``out/parts`` are not measured again."""
    import torch

    from ikd_fast import __version__
    from ikd_fast.analysis.strength.picture import draw_strength
    from ikd_fast.mmdet.strength import build_subject, checkpoint_path, configured_attack, fingerprint

    own = configured_attack(cfg)
    settings = StrengthSettings(eps=eps, seeds=seeds, **_from_attack(own))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    subject = build_subject(cfg, name, checkpoint_path(checkpoint), images=images, batch=batch, device=device)
    parts = (
        out / "parts" / fingerprint(subject, cfg, checkpoint, {**settings.to_dict(), "eps": [], "seeds": []})
    )
    with _progress() as progress:
        task = progress.add_task("starting", total=total_work(settings, subject.batches_count))

        def note(text: str) -> None:
            progress.update(task, description=text)
            if not progress.console.is_terminal:
                progress.console.print(f"{progress.tasks[task].percentage:3.0f} %  {text}", highlight=False)

        report = measure_strength(
            subject,
            settings,
            parts=parts,
            advance=lambda done: progress.advance(task, done),
            note=note,
        )
    report = {
        "teacher": f"{type(subject.net).__name__} of {name} ({Path(checkpoint.rpartition('::')[2]).name})",
        "images": len(subject.indices),
        "batch": batch,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "versions": {"ikd_fast": __version__, "torch": torch.__version__},
        **report,
    }
    write_json(out / "strength.json", report)
    write_bytes(out / "strength.md", report_markdown(report).encode())
    draw_strength(out / "strength.png", report)
    return report


def _from_attack(own: dict[str, Any] | None) -> dict[str, Any]:
    """What a config's attack settles for the standard rows: its memory, and the range of its input diversity."""
    if own is None:
        return {}
    found: dict[str, Any] = {
        "own": own,
        "options": {k: own[k] for k in ("diversity_rate", "diversity_per_batch") if k in own},
    }
    memory = {"bits": 4, "stride": 1} | dict(own.get("memory") or {})
    return found | {"memory": {k: memory[k] for k in ("bits", "stride")}}


def parse_eps(text: str) -> tuple[float, ...]:
    """``"1,2,4,8"`` to numbers.

    >>> parse_eps("1, 2.5")
    (1.0, 2.5)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--eps takes numbers with commas between them, e.g. 1,2,4,8; got {text!r}", usage=True
        ) from None


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
