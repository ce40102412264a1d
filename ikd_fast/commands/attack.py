"""``ikd-fast attack CONFIG CKPT --out DIR``."""

from __future__ import annotations

import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ikd_fast.attack.memory.forecast import human
from ikd_fast.mmdet import launch
from ikd_fast.mmdet.build import resolve_path
from ikd_fast.mmdet.errors import InputError

MODES = ("iterative", "single", "random_sign")


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    config: str
    checkpoint: str
    out: Path
    mode: str = "iterative"
    eps: float = 8.0
    steps: int | None = None
    step_size: float | None = None
    diversity_prob: float | None = None
    objective: str = "cls"
    seed: int = 0
    jpeg: int | None = None
    original_size: bool = False
    save_scale: float | None = None
    packed: bool = False
    bits: int | None = None
    stride: int | None = None
    resize: str | None = None
    images: int | None = None
    batch: int = 4
    workers: int = 2
    device: str | None = None
    cfg_options: tuple[str, ...] = ()


def run(options: Options, *, as_json: bool) -> None:
    """Make the set, and print what it is; of several processes the last one prints."""
    with redirect_stdout(sys.stderr):
        found = generate(options)
    if found is not None:
        print(json.dumps(found, indent=1) if as_json else told(found))


def generate(options: Options) -> dict[str, Any] | None:
    """As :meth:`~ikd_fast.mmdet.offline.generate.Generator.run`, from what the command line says."""
    for name, value in (("--images", options.images), ("--batch", options.batch)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}", usage=True)
    if options.workers < 0:
        raise InputError(f"--workers must be at least 0, got {options.workers}", usage=True)
    if options.mode not in MODES:
        raise InputError(
            f"--mode must be one of {', '.join(MODES)}, got {options.mode!r}: an image is attacked once here",
            usage=True,
        )
    resize = parse_resize(options.resize)
    path = Path(resolve_path(options.config, "configs"))
    if not path.is_file():
        raise InputError(f"no config {path} (relative to {Path.cwd()})", usage=True)
    attack_options = attack_arguments(options)
    kept = format_arguments(options, attack_options)

    import torch

    from ikd_fast.attack import OnlineDIFGSM
    from ikd_fast.attack.offline import Format
    from ikd_fast.distill import Renormalize
    from ikd_fast.mmdet.build import build_teacher, preprocessor_facts
    from ikd_fast.mmdet.offline.generate import Generator, Processes
    from ikd_fast.mmdet.offline.images import TrainingImages
    from ikd_fast.mmdet.strength import DetectorSubject, check_classes, checkpoint_path, teacher_model
    from ikd_fast.mmdet.victim import check_class_loss

    from mmengine.registry import init_default_scope

    try:
        attack, fmt = OnlineDIFGSM(**attack_options), Format(**kept)
        if fmt.kind == "packed":
            fmt.codes(attack.eps)
    except (ValueError, TypeError) as error:
        raise InputError(str(error), usage=True) from None
    processes = Processes.of_environment()
    device = _device(options.device, torch)
    launcher = "pytorch" if processes.count > 1 else "none"
    cfg = launch.load_config(path, work_dir=None, options=list(options.cfg_options), launcher=launcher)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    model = teacher_model(cfg)
    units, _, _ = preprocessor_facts(model)
    images = TrainingImages(cfg, path.name, resize=resize)
    teacher = build_teacher(model, checkpoint_path(options.checkpoint), Renormalize(units, units), None)
    check_classes(teacher, images.dataset, path.name, "train")
    subject = DetectorSubject(
        teacher, model, images.dataset, {}, [], device=device, include_rpn=bool(cfg.model.get("include_rpn", False))
    )  # fmt: skip
    if not model.get("train_cfg"):
        check_class_loss(subject.victim.loss)
    generator = Generator(
        images, subject, attack, fmt, options.out, batch=options.batch, workers=options.workers, limit=options.images,
        processes=processes,
    )  # fmt: skip
    with _progress(processes.rank) as progress:
        share = generator.share
        task = progress.add_task(f"attacking {options.out.name}", total=share)

        def advance(count: int) -> None:
            before = int(progress.tasks[task].percentage / 10)
            progress.advance(task, count)
            after = progress.tasks[task]
            if (
                not progress.console.is_terminal
                and processes.rank == 0
                and int(after.percentage / 10) > before
            ):
                text = f"{after.percentage:3.0f} %  {after.completed:.0f} of {share} images, {after.elapsed or 0:.0f} s"
                progress.console.print(text, highlight=False)

        return generator.run(advance)


def attack_arguments(options: Options) -> dict[str, Any]:
    """Of :class:`~ikd_fast.OnlineDIFGSM`; what was not said is the mode's own default."""
    given = {name: getattr(options, name) for name in ("steps", "step_size", "diversity_prob")}
    return {name: getattr(options, name) for name in ("mode", "eps", "objective", "seed")} | {
        name: value for name, value in given.items() if value is not None
    }


def format_arguments(options: Options, attack: dict[str, Any]) -> dict[str, Any]:
    """Of :class:`~ikd_fast.attack.offline.Format`.

    Raises:
        InputError: options that contradict each other.
    """
    scaled = options.save_scale is not None
    if options.packed and (options.jpeg is not None or options.original_size or scaled):
        raise InputError(
            "--packed keeps the perturbation at the size that was attacked: leave out --jpeg, --original-size and --save-scale",
            usage=True,
        )
    if options.original_size and scaled:
        raise InputError("give one of --original-size and --save-scale", usage=True)
    if not options.packed and (options.bits is not None or options.stride is not None):
        raise InputError("--bits and --stride are of --packed, which was not given", usage=True)
    if options.packed:
        step = attack.get("step_size", 2.0) if options.mode == "iterative" else options.eps / 4
        return dict(kind="packed", bits=options.bits or 4, stride=options.stride or 1, step=step)
    scale: Any = "original" if options.original_size else options.save_scale if scaled else 1.0
    quality = {} if options.jpeg is None else {"quality": options.jpeg}
    return dict(kind="png" if options.jpeg is None else "jpeg", scale=scale, **quality)


def parse_resize(text: str | None) -> Any:
    """``"1333x800"`` to (1333, 800).

    >>> parse_resize("1333x800"), parse_resize("none"), parse_resize(None)
    ((1333, 800), 'none', None)
    """
    if text is None or text == "none":
        return text
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or not (int(found[1]) and int(found[2])):
        raise InputError(f"--resize takes WIDTHxHEIGHT, e.g. 1333x800, or none; got {text!r}", usage=True)
    return int(found[1]), int(found[2])


def told(found: dict[str, Any]) -> str:
    """What a set is, in some lines."""
    s, of = found["summary"], "" if found["images"] == found["of_images"] else f" of {found['of_images']}"
    lines = [
        f"{found['out']}: {found['images']}{of} adversarial images, {human(found['bytes'])}; {found['made']} made now, "
        f"{found['there']} were there"
    ]
    if s["measured"]:
        lost = (
            ""
            if s["measured"] == found["images"]
            else f" ({s['measured']} of them; lines of the others are lost)"
        )
        lines.append(
            f"As read back{lost}: teacher's class loss {s['class_loss']:.3f} -> {s['adversarial_class_loss']:.3f}, feature maps changed by "
            f"{100 * s['feature_change']:.1f} %, mean |delta| {s['mean_abs']:.2f}, largest {s['linf']:.0f} of 255 grey levels, "
            f"{100 * s['outside']:.1f} % of the values beyond eps"
        )
    lines.append(
        f"Train from it: dict(type='LoadAdversarialImage', directory={found['out']!r}) behind the pipeline's Resize, and "
        "adv=dict(attack=dict(type='OfflineImages'))"
    )
    return "\n".join(lines)


def _device(name: str | None, torch: Any) -> str:
    import os

    there = torch.cuda.is_available()
    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if there else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not there):
        have = "cpu, cuda, cuda:1, ..." if there else "cpu: there is no CUDA here"
        raise InputError(f"--device must be one of {have}; got {name!r}", usage=True)
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def _progress(rank: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or rank > 0)
