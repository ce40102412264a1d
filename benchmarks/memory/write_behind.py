"""``python -m benchmarks.memory.write_behind DIR --out DIR [--rounds N]``: what keeping records in files adds to a training step.

The demo's step in mode ``carry``, with records in host memory, in a directory under DIR and in shared memory; and in host memory once
more, which shows what the machine's noise does to a ratio. A round gives every side a few steps on the same images, starting with
another side each time. A side's clock stops when its last record is written: the thread that writes costs its own side, nobody else's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.measure import quartiles

HOST, AGAIN, DIRECTORY, SHARED = "host memory", "host memory, again", "directory", "shared memory"
TARGET = 1.03
ROUNDS, STEPS = 25, 3
THREADS = min(2, int(os.environ.get("OMP_NUM_THREADS", 2)))


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Of every side to host memory, round by round.

    >>> ratios({"host memory": [2.0, 4.0], "directory": [2.5, 4.0]})
    {'directory': [1.25, 1.0]}
    """
    return {
        name: [one / base for one, base in zip(spent, seconds[HOST], strict=True)]
        for name, spent in seconds.items()
        if name != HOST
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and where it lies with 95 % (McGill's notch: 1.57 quartile ranges over the root of their number); low, median, high."""
    q1, median, q3 = quartiles(values)
    reach = 1.57 * (q3 - q1) / math.sqrt(len(values))
    return median - reach, median, median + reach


def verdict(found: Sequence[float], control: Sequence[float]) -> str:
    """Of a side's ratios, in words; ``control``: ratios of the same thing measured twice.

    >>> same = [0.99, 1.0, 1.01] * 8
    >>> verdict([1.0, 1.01, 1.02] * 8, same), verdict([1.04, 1.05, 1.07] * 8, same)
    ('within 3 %', 'more than 3 %')
    >>> verdict([0.9, 1.0, 1.2] * 8, same)
    'not decided: 0.90 to 1.10'
    >>> verdict(same, [0.8, 1.1, 1.2] * 8)
    'not decided: the same thing measured twice differs by 0.99 to 1.21'
    """
    low, _, high = interval(control)
    if high > TARGET or low < 2 - TARGET:
        return f"not decided: the same thing measured twice differs by {low:.2f} to {high:.2f}"
    low, _, high = interval(found)
    if low <= TARGET < high:
        return f"not decided: {low:.2f} to {high:.2f}"
    return f"{'within' if high <= TARGET else 'more than'} {(TARGET - 1) * 100:.0f} %"


def measure(
    sides: Mapping[str, Any], rounds: int, steps: int, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and seconds of processor time in all threads, of each side's steps in every round. The first round is not kept."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(-1, rounds):
        gc.collect()
        for name in names[i % len(names) :] + names[: i % len(names)]:
            side, epochs = sides[name], [(i + 1) * steps + k for k in range(steps)]
            batches = [side.load(epoch) for epoch in epochs]
            start, used = time.perf_counter(), time.process_time()
            for epoch, batch in zip(epochs, batches, strict=True):
                side.step(batch, epoch)
            flush = getattr(side.attack.memory.store, "flush", None)
            if flush is not None:
                flush()
            if i >= 0:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
        if i >= 0:
            say(f"round {i + 1} of {rounds}")
    return wall, cpu


def run(directory: Path, rounds: int, steps: int, images: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The result file's object."""
    from benchmarks.end_to_end.demo import DemoPair
    from benchmarks.end_to_end.modes import Mode
    from benchmarks.end_to_end.timeline import Timeline
    from benchmarks.machine import commit, machine, processor, versions

    load = round(os.getloadavg()[0], 2)  # before this run adds to it
    pair = DemoPair(images)
    memories = {HOST: {}, AGAIN: {}, DIRECTORY: dict(directory=str(directory)), SHARED: dict(shared=True)}
    sides = {}
    for name, memory in memories.items():
        mode = Mode(name, attack=dict(mode="carry", memory=memory), kind="carry")
        sides[name] = pair.side(mode, Timeline())
    try:
        wall, cpu = measure(sides, rounds, steps, say)
        stores = {name: side.attack.memory for name, side in sides.items()}
        kept = {name: memory.counters for name, memory in stores.items()}
        troubles = {name: dict(getattr(memory.store, "counts", {})) for name, memory in stores.items()}
    finally:
        for side in sides.values():
            side.attack.memory.close()
    if any(count for counts in troubles.values() for count in counts.values()):
        raise RuntimeError(
            f"records were not kept, so what it costs to keep them was not measured: {troubles}"
        )
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(processor(), load=load),
        "versions": versions(),
        "commit": commit(),
        "title": pair.title,
        "rounds": rounds,
        "steps": steps,
        "record": kept[DIRECTORY]["bytes"] // max(1, kept[DIRECTORY]["images"]),
        "kept": kept,
        "seconds": wall,
        "cpu_seconds": cpu,
    }


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    """Of the directory and of shared memory."""
    found = ratios(result["seconds"])
    return {name: verdict(found[name], found[AGAIN]) for name in (DIRECTORY, SHARED)}


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    facts, told = result["machine"], verdicts(result)
    lines = [
        f"{result['title']}; mode `carry`, {result['rounds']} rounds of {result['steps']} steps and their writes, slots of "
        f"{result['record']} B; {facts['cpu']}, {facts['threads']} of {facts['cores']} cores, load {facts['load']} before.",
        "",
        "| records in | seconds a step (quartiles) | to host memory, per round (quartiles) | processor time | verdict |",
        "|---|---|---|---|---|",
    ]
    wall, cpu = ratios(result["seconds"]), ratios(result["cpu_seconds"])
    for name, spent in result["seconds"].items():
        q1, median, q3 = (value / result["steps"] for value in quartiles(spent))
        row = [name, f"{median:.3f} ({q1:.3f}-{q3:.3f})", "1", "1", ""]
        if name != HOST:
            low, middle, high = quartiles(wall[name])
            row[2:] = [
                f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{quartiles(cpu[name])[1]:.3f}", told.get(name, "noise of the machine")
            ]  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.write_behind")
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="a new directory on the disk that is meant, removed afterwards",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the result")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each side in a round")
    parser.add_argument("--images", type=int, default=8, help="of a batch")
    arguments = parser.parse_args(argv)
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists already")
    for name, least in (("rounds", 2), ("steps", 1), ("images", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(arguments, name)}")
    os.environ.update(OMP_NUM_THREADS=str(THREADS), MKL_NUM_THREADS=str(THREADS))
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for newer versions
    import torch

    torch.set_num_threads(THREADS)
    try:
        result = run(
            arguments.directory, arguments.rounds, arguments.steps, arguments.images,
            lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
    finally:
        shutil.rmtree(arguments.directory, ignore_errors=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "write-behind.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (arguments.out / "write-behind.md").write_text(text)
    print(text)
    for name, words in verdicts(result).items():
        print(f"{name}: {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
