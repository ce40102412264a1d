"""``ikd-fast sweep CONFIG``: one process a run, one after the other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ikd_fast.files import write_bytes, write_json
from ikd_fast.mmdet import launch
from ikd_fast.mmdet.errors import InputError

Advance = Callable[[int, int], None]
TABLE, JSON, PICTURE = "sweep.md", "results.json", "sweep.png"
GRACE = 60.0
"""Seconds an interrupted run gets to close its files."""


@dataclass(frozen=True)
class Options:
    """The command line. Empty lists stand for the config's own value."""

    config: str
    out: Path | None = None
    betas: list[float] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    seeds: int = 1
    iters: int | None = None
    epochs: int | None = None
    baseline: bool = True
    retry: bool = False
    data: Path | None = None
    cfg_options: list[str] = field(default_factory=list)


def numbers(name: str, text: str | None) -> list[float]:
    """``"1e-6,1e-5"`` as floats.

    >>> numbers("--beta", "1e-6, 1e-5")
    [1e-06, 1e-05]
    """
    try:
        return [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise InputError(f"{name} takes numbers separated by commas, got {text!r}", usage=True) from None


def names(option: str, text: str | None) -> list[str]:
    """``"single,carry"`` as a list."""
    found = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(found):
        raise InputError(f"{option} takes names separated by commas, got {text!r}", usage=True)
    return found


def run(options: Options, console: Console, *, as_json: bool = False) -> bool:
    """Run what is left of the sweep, write table, JSON and picture, print the table; False if a run failed.

    Raises:
        InputError: a wrong option, config or folder.
    """
    with redirect_stdout(sys.stderr):
        summary, out = sweep(options, console)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        print((out / TABLE).read_text(), end="")
        print(f"\ntable, JSON, picture: {out / TABLE}, {JSON}, {PICTURE}")
    return not summary["failed"]


def sweep(
    options: Options, console: Console, train: Callable[[Path, Advance], None] | None = None
) -> tuple[dict[str, Any], Path]:
    """As :func:`run`, without printing the result: the summary and the folder.

    ``train(folder, advance)`` makes one run, whose folder then has a result; default: :func:`in_own_process`.
    """
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {options.seeds}", usage=True)
    launch.activate()
    from ikd_fast.mmdet.sweep import folder, grid, length, setup, summary

    cut = length.Length(options.iters, options.epochs)
    cfg = setup.load(options.config, options.cfg_options, options.data)
    settings = grid.grid(
        cfg.model, modes=options.modes, eps=options.eps, betas=options.betas, baseline=options.baseline
    )
    out = options.out or Path("runs") / "sweep" / Path(options.config).stem
    setup.check(cfg, options.config, cut)
    folder.claim(out, cfg, cut)
    repeats = range(options.seeds)
    seeds = [grid.seed_of(cfg, repeat) for repeat in repeats]
    report = _Report(console, len(settings) * len(seeds))
    report.say(
        f"{len(settings)} settings x {len(seeds)} seeds, {cut}; each run in a process of its own, what it prints in its "
        f"console.log below {out}/runs"
    )
    results: dict[grid.Setting, dict[int, dict[str, Any]]] = {setting: {} for setting in settings}
    # Seed by seed: an interrupted sweep has every setting at the same number of seeds.
    for repeat, seed in zip(repeats, seeds, strict=True):
        for setting in settings:
            home = folder.run_folder(out, setting, seed)
            before = folder.result_of(home)
            if before is not None and before["status"] == "failed" and options.retry:
                folder.forget(home)
                before = None
            title = f"{setting.title}, seed {seed}"
            if before is None:
                folder.prepare(out, cfg, setting, repeat, seed, cut)
                (train or in_own_process)(home, report.start(title))
            found = folder.result_of(home)
            assert found is not None
            results[setting][seed] = found
            report.end(title, found, skipped=before is not None)
    for setting, by_seed in folder.earlier(out).items():
        results[setting] = by_seed | results.get(setting, {})
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    facts = {"config": options.config, "length": str(cut)}
    found = summary.summarise(results, seeds, facts)
    _write(out, found, summary.render(found))
    return found, out


def _write(out: Path, summary: dict[str, Any], table: str) -> None:
    from ikd_fast.pictures.sweep import draw_sweep

    write_json(out / JSON, summary)
    title = f"# Sweep of {summary['config']}, {summary['length']}\n\n"
    write_bytes(out / TABLE, f"{title}{table}\n".encode())
    draw_sweep(out / PICTURE, summary)


def in_own_process(home: Path, advance: Advance) -> None:
    """One worker from start to end; afterwards ``home`` has a result. An interrupt is passed on and waited for."""
    from ikd_fast.mmdet.sweep.worker import RESULT

    command = [sys.executable, "-m", "ikd_fast.mmdet.sweep.worker", str(home)]
    with (home / "console.log").open("ab") as log:
        # In a session of its own: Ctrl-C reaches this process only, which then stops the worker once and in order.
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                row = json.loads(line)
                advance(row["done"], row["total"])
            code = worker.wait()
        except BaseException:
            _stop(worker)
            raise
    if code == 130:
        raise KeyboardInterrupt
    if not (home / RESULT).is_file():
        signal_name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        message = f"the process ended with {signal_name} and without a result; see {home / 'console.log'}"
        write_json(home / RESULT, {"status": "failed", "message": message})


def _stop(worker: subprocess.Popen) -> None:
    if worker.poll() is None:
        worker.send_signal(signal.SIGINT)
        try:
            worker.wait(GRACE)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


class _Report:
    """A line where a run starts and ends and at its quarters, with the time left of the whole sweep."""

    def __init__(self, console: Console, runs: int) -> None:
        self.console, self.runs = console, runs
        self.ended, self.steps, self.spent = 0, 0, 0.0

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, title: str) -> Advance:
        """The worker's ``advance``."""
        began, first, quarter = time.monotonic(), -1, 0
        spent, steps = self.spent, self.steps
        self.say(f"[{self.ended + 1}/{self.runs}] {title}")

        def advance(done: int, total: int) -> None:
            nonlocal first, quarter
            if first < 0:
                first, quarter = done, 4 * done // total
                if done:
                    self.say(f"  resumed at step {done} of {total}")
            self.spent, self.steps = spent + time.monotonic() - began, steps + done - first
            if 4 * done // total > quarter:
                quarter = 4 * done // total
                left = total - done + total * (self.runs - self.ended - 1)
                self.say(
                    f"  step {done} of {total}, {_duration(left * self.spent / max(self.steps, 1))} left at most"
                )

        return advance

    def end(self, title: str, found: dict[str, Any], *, skipped: bool) -> None:
        self.ended += 1
        what = "finished before" if skipped else "done"
        if found["status"] == "failed":
            what = f"failed{' before (--retry starts it again)' if skipped else ''}: {found['message']}"
        else:
            shown = [f"{k.rpartition('/')[2]} {v:.3f}" for k, v in found["metrics"].items()][:2]
            what += f": {', '.join(shown) or 'nothing found'}, {found['seconds_per_step']:.3g} s a step"
        self.say(f"[{self.ended}/{self.runs}] {title}: {what}" if skipped else f"  {what}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
