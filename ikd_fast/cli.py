"""The command line. Heavy imports (torch, mmdet) happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

FAILED, INTERRUPTED = 1, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _config_file(text: str) -> Path:
    from ikd_fast.shipped import resolve_path

    try:
        path = Path(resolve_path(text, "configs"))
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    if not path.is_file():
        raise typer.BadParameter(f"file {text!r} {'is a directory' if path.is_dir() else 'does not exist'}.")
    return path


Config = Annotated[
    Path,
    typer.Argument(
        parser=_config_file, metavar="CONFIG", help="An mmdet config: a file, or `ikd_fast::demo/fgd_ikd.py`."
    ),
]
WorkDir = Annotated[Path | None, typer.Option(help="Where logs and checkpoints go. Default: work_dirs/NAME.")]
CfgOptions = Annotated[
    list[str] | None,
    typer.Option(help="Settings to override, key=value in mmdet's syntax; any number after it."),
]
Launcher = Annotated[
    str, typer.Option(help="How processes were started: none, pytorch (torchrun), slurm or mpi.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
EXTRA = {"allow_extra_args": True}


def _version(wanted: bool) -> None:
    if wanted:
        from ikd_fast import __version__

        print(f"ikd-fast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Inconsistent knowledge distillation for object detectors. Exit codes: 0 done, 1 failed, 2 wrong usage."""


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/demo, with --quick runs/demo-quick.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A COCO-format data set instead of the tree crowns: a folder with annotations/{train,val}.json beside train/ and "
            "val/, or annotations/instances_{train,val}2017.json beside train2017/ and val2017/. A teacher is trained on it first, "
            "for twice the steps of a student, unless --teacher is given."
        ),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint of configs/demo/teacher.py instead of the shipped one.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps a student. Default: 400.")] = None,
    seeds: Annotated[int, typer.Option(help="Repeat for this many seeds, and print mean and interval.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: does everything work here?")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete an earlier run in the folder instead of resuming it.")
    ] = False,
    train_teacher: Annotated[
        bool, typer.Option("--train-teacher", help="Train the shipped teacher again, and stop.")
    ] = False,
    wheel: Annotated[
        Path | None, typer.Option(help="The deepforest 2.1.0 wheel, where there is no network.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="A folder with deepforest's photographs, instead of the wheel.")
    ] = None,
    loader: Annotated[
        str,
        typer.Option(
            help="What training images come through: torch (its DataLoader) or dali (DALIDetLoader, on the GPU where there is one)."
        ),
    ] = "torch",
    as_json: Json = False,
) -> None:
    """Distil three students on real photographs: alone, with FGD, with FGD + IKD. Some minutes on two cores."""
    # The stream by name: the run sends everything else that is printed to a log file.
    console = Console(file=sys.stderr if as_json else sys.stdout)
    with _errors(console, "The same command goes on from the last epoch."):
        _calm_threads()
        from ikd_fast.demo.run import Options, run, train_demo_teacher

        folder = out or Path("runs") / ("teacher" if train_teacher else "demo-quick" if quick else "demo")
        options = Options(folder, data, teacher, steps, seeds, seed, quick, fresh, wheel, source, loader)
        found = (
            {"teacher": str(train_demo_teacher(options, console))} if train_teacher else run(options, console)
        )
        if as_json:
            print(json.dumps(found, indent=1))


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context,
    config: Config,
    work_dir: WorkDir = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the work directory's latest checkpoint.")
    ] = False,
    cfg_options: CfgOptions = None,
    launcher: Launcher = "none",
) -> None:
    """Train an mmdet CONFIG through mmdet's Runner, with or without compiled mmcv operators."""
    with _errors(Console(stderr=True), "The same command with --resume goes on from the last checkpoint."):
        from ikd_fast.mmdet import launch

        cfg = launch.load_config(
            config, work_dir=work_dir, options=_options(context, cfg_options), launcher=launcher
        )
        launch.train(cfg, resume=resume)
        _say_on_first_process(f"Checkpoints and logs: {cfg.work_dir}")


@app.command(context_settings=EXTRA)
def test(
    context: typer.Context,
    config: Config,
    checkpoint: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A .pth checkpoint, plain or distilled.")
    ],
    work_dir: WorkDir = None,
    cfg_options: CfgOptions = None,
    launcher: Launcher = "none",
    as_json: Json = False,
) -> None:
    """Evaluate CHECKPOINT on the test set of an mmdet CONFIG."""
    with _errors(Console(stderr=True)):
        from ikd_fast.mmdet import launch

        stdout = sys.stdout
        if as_json:
            sys.stdout = sys.stderr
        try:
            cfg = launch.load_config(
                config, work_dir=work_dir, options=_options(context, cfg_options), launcher=launcher
            )
            metrics = launch.test(cfg, checkpoint)
        finally:
            sys.stdout = stdout
        if as_json:
            print(json.dumps({key: float(value) for key, value in metrics.items()}, indent=1))


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A training checkpoint (epoch_N.pth).")
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="The plain student: .pth (for `test`), or .safetensors (a teacher_ckpt, other frameworks)."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write the student of CHECKPOINT without loss modules, optimizer and logs."""
    with _errors(Console(stderr=True)):
        from ikd_fast.mmdet.export import export as write

        weights = write(checkpoint, out)
        facts = {"out": str(out), "tensors": len(weights), "bytes": out.stat().st_size}
        print(
            json.dumps(facts)
            if as_json
            else f"{out}: {facts['tensors']} tensors, {out.stat().st_size / 1e6:.1f} MB"
        )


@app.command()
def init(
    student: Annotated[
        str, typer.Argument(help="The student's mmdet config: a file, or mmdet::folder/name.py.")
    ],
    teacher: Annotated[str, typer.Argument(help="The teacher's, in the same way.")],
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="The teacher's weights: a file or a URL.")
    ],
) -> None:
    """Print the config that distils TEACHER into STUDENT: `ikd-fast init student.py teacher.py teacher.pth > ikd.py`."""
    with _errors(Console(stderr=True)):
        from ikd_fast.commands.init import run

        run(student, teacher, checkpoint)


@app.command(context_settings=EXTRA)
def explain(
    context: typer.Context,
    config: Config,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="H W", help="Image size after the loader. Default: what the pipeline says."),
    ] = None,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave the teacher's checkpoint unread, and say so.")
    ] = False,
    ranks: Annotated[int, typer.Option(help="Processes that the run will have.")] = 1,
    cfg_options: CfgOptions = None,
    as_json: Json = False,
) -> None:
    """Print the distillation step of CONFIG as it resolves: who sees what, levels, shapes, weights, stop point."""
    with _errors(Console(stderr=True)):
        options = _options(context, cfg_options)
        from ikd_fast.commands.explain import run

        run(config, options=options, size=size, weights=not no_weights, ranks=ranks, as_json=as_json)


@app.command(context_settings=EXTRA)
def preview(
    context: typer.Context,
    config: Config,
    out: Annotated[Path, typer.Option(help="The picture to write: .png or .jpg.")] = Path("preview.png"),
    images: Annotated[int, typer.Option(help="Training images to draw.")] = 4,
    sample: Annotated[int, typer.Option(help="Images whose annotations are counted.")] = 200,
    seed: Annotated[int, typer.Option(help="Which images.")] = 0,
    cfg_options: CfgOptions = None,
    as_json: Json = False,
) -> None:
    """Draw training images of CONFIG as each branch sees them, and count branches, lost boxes and sizes."""
    with _errors(Console(stderr=True)):
        _calm_threads()
        options = _options(context, cfg_options)
        from ikd_fast.commands.preview import run

        run(config, options=options, out=out, images=images, sample=sample, seed=seed, as_json=as_json)


@app.command(context_settings=EXTRA)
def sweep(
    context: typer.Context,
    config: Annotated[
        str,
        typer.Argument(help="An mmdet config with IKDDistiller: a file, or `ikd_fast::demo/fgd_ikd.py`."),
    ],
    beta: Annotated[
        str | None, typer.Option(help="Weights of the adversarial branch, e.g. 1e-6,1e-5.")
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Radii in grey levels, e.g. 2,4,8.")] = None,
    mode: Annotated[str | None, typer.Option(help="Attacks, e.g. single,carry.")] = None,
    seeds: Annotated[
        int, typer.Option(help="Repeats: k adds k to every seed of the config, 0 is the config as written.")
    ] = 1,
    iters: Annotated[
        int | None, typer.Option(help="Train so many iterations; the schedule keeps its shape.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Or so many epochs.")] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Also a run without the adversarial branch.")
    ] = True,
    retry: Annotated[bool, typer.Option("--retry", help="Start failed runs again.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Train and evaluate on the COCO-format set in this folder, e.g. runs/demo/data."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: runs/sweep/NAME.")] = None,
    cfg_options: CfgOptions = None,
    as_json: Json = False,
) -> None:
    """Train CONFIG once for each beta, eps, mode and seed; a table with intervals and a picture.

    The same command goes on where it was stopped: finished runs are kept, an interrupted one resumes from its last checkpoint.
    Betas, radii, modes and seeds may be added to a folder later. Exit code 1 if a run failed; the others are run all the same.
    """
    # The stream by name: what libraries print goes elsewhere.
    console = Console(file=sys.stderr)
    with _errors(console, "The same command goes on from the last checkpoint."):
        _calm_threads()
        from ikd_fast.commands.sweep import Options, names, numbers, run

        options = Options(
            config, out, numbers("--beta", beta), numbers("--eps", eps), names("--mode", mode), seeds, iters, epochs,
            baseline, retry, data, _options(context, cfg_options),
        )  # fmt: skip
        if not run(options, console, as_json=as_json):
            raise typer.Exit(FAILED)


@app.command(context_settings=EXTRA)
def strength(
    context: typer.Context,
    config: Annotated[
        str,
        typer.Argument(help="A teacher's mmdet config, or an IKD config: then its teacher and its attack."),
    ],
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT", help="The teacher's weights; the demo's: ikd_fast::demo_teacher.safetensors."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: runs/strength/NAME.")
    ] = None,
    images: Annotated[int, typer.Option(help="Test images, evenly spaced over the set.")] = 100,
    eps: Annotated[str, typer.Option(help="Radii in grey levels.")] = "1,2,4,8",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 3,
    batch: Annotated[int, typer.Option(help="Images a batch.")] = 4,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")
    ] = None,
    cfg_options: CfgOptions = None,
    as_json: Json = False,
) -> None:
    """Measure what each attack does to a teacher and what it costs: JSON, Markdown and a picture. Resumes."""
    with _errors(Console(stderr=True), "The same command goes on from the last finished eps and seed."):
        _calm_threads()
        options = _options(context, cfg_options)
        from ikd_fast.commands.strength import run

        run(
            config, checkpoint, options=options, out=out, images=images, eps=eps, seeds=seeds, batch=batch, device=device,
            as_json=as_json,
        )  # fmt: skip


@app.command(context_settings=EXTRA)
def attack(
    context: typer.Context,
    config: Annotated[
        str,
        typer.Argument(
            help="An mmdet config whose training images are attacked: the teacher's own, or an IKD config (then its teacher is)."
        ),
    ],
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="The teacher's weights.")],
    out: Annotated[Path, typer.Option(help="Folder of the adversarial images.")],
    mode: Annotated[
        str, typer.Option(help="iterative (the paper's DI-FGSM), single, or random_sign (a control).")
    ] = "iterative",
    eps: Annotated[float, typer.Option(help="Radius in grey levels.")] = 8.0,
    steps: Annotated[
        int | None, typer.Option(help="Gradients an image. Default: 5, the paper's; single has 1.")
    ] = None,
    step_size: Annotated[
        float | None, typer.Option(help="Grey levels a step. Default: 2; of single, 2 eps.")
    ] = None,
    diversity_prob: Annotated[
        float | None,
        typer.Option(help="Probability of input diversity in each step. Default: 0.5; of single, 0."),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="cls (the teacher's class loss) or feature (change of its maps).")
    ] = "cls",
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    jpeg: Annotated[
        int | None, typer.Option(metavar="Q", help="Write JPEG of this quality; the published code's is 95.")
    ] = None,
    original_size: Annotated[
        bool,
        typer.Option("--original-size", help="Shrink to the size of the image's own file, as published."),
    ] = False,
    save_scale: Annotated[
        float | None, typer.Option(help="Shrink to this share of the attacked size.")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Write perturbations alone, --bits a value. Default: PNG images.")
    ] = False,
    bits: Annotated[int | None, typer.Option(help="Of --packed: 2, 4 or 8. Default: 4.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Of --packed: one value for 1 x 1 or 2 x 2 pixels. Default: 1.")
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="WIDTHxHEIGHT that images are resized to before, aspect kept; none: not at all. Default: the train pipeline's Resize."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Only so many images, small ones first; the rest may be made later.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images attacked together.")] = 4,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")
    ] = None,
    cfg_options: CfgOptions = None,
    as_json: Json = False,
) -> None:
    """Make the adversarial images of a training set beforehand, as the paper does: one file an image. Resumes.

    Several processes: torchrun --nproc-per-node 8 -m ikd_fast attack CONFIG CKPT --out DIR. Training reads the folder by
    LoadAdversarialImage.
    """
    with _errors(Console(stderr=True), "The same command makes the missing files."):
        _calm_threads()
        stray = _options(context, cfg_options)
        from ikd_fast.commands.attack import Options, run

        run(
            Options(
                config, checkpoint, out, mode, eps, steps, step_size, diversity_prob, objective, seed, jpeg, original_size, save_scale,
                packed, bits, stride, resize, images, batch, workers, device, tuple(stray),
            ),
            as_json=as_json,
        )  # fmt: skip


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what serves the mmcv operators, and what is missing and how to get it."""
    with _errors(Console(stderr=True)):
        from ikd_fast.doctor import collect, render

        report = collect()
        print(json.dumps(report, indent=1) if as_json else render(report))


def _options(context: typer.Context, options: list[str] | None) -> list[str]:
    """mmdet takes many key=value after one --cfg-options; those after the first arrive as extra arguments."""
    stray = [extra for extra in context.args if not options or "=" not in extra]
    if stray:
        raise typer.BadParameter(
            f"unexpected {' '.join(stray)}; settings are written --cfg-options key=value"
        )
    return [*(options or []), *context.args]


def _calm_threads() -> None:
    """On a machine that is busy with other work, threads that spin while they wait cost several times what they save."""
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _say_on_first_process(text: str) -> None:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(text)


@app.command()
def memory(
    directory: Annotated[Path, typer.Argument(help="Of `memory=dict(directory=...)`.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every record; exit code 1 if one is damaged.")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Give back room that no record uses, and drop damaged records.")
    ] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the memory's files, and nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a DIRECTORY of kept perturbations holds; with an option, look after it. Refused while a run uses it."""
    from ikd_fast.attack.memory.shards import upkeep

    if verify + compact + delete > 1:
        raise typer.BadParameter("give one of --verify, --compact and --delete")
    console = Console(stderr=True)
    with _errors(console):
        if delete:
            found: dict = {"directory": str(directory), "freed": upkeep.delete(directory)}
        else:
            found = (upkeep.verify if verify else upkeep.compact if compact else upkeep.summary)(directory)
    if as_json:
        print(json.dumps(found))
    else:
        print(upkeep.told(found))
    if verify and found["count"]:
        raise typer.Exit(FAILED)


@contextmanager
def _errors(console: Console, resume_hint: str = "") -> Iterator[None]:
    """Turn what a user can put right into one message and an exit code; anything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. {resume_hint}".rstrip(), highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        ImportError,
        RuntimeError,
        MemoryError,
        pickle.UnpicklingError,
    ) as error:
        usage = getattr(error, "usage", None)
        if usage is None and os.environ.get("IKD_FAST_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        console.print("[bold red]error:[/] ", end="")
        console.print(str(text), markup=False, highlight=False, soft_wrap=True)
        if usage is None:
            console.print("(IKD_FAST_TRACEBACK=1 shows where it happened)", style="dim", highlight=False)
        raise typer.Exit(2 if usage else FAILED) from None


def main() -> None:
    """Entry point of ``ikd-fast``."""
    # mmengine and imagecorruptions import it; nothing a user can do about it.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)
    app()


if __name__ == "__main__":
    main()
