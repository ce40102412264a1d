"""``python -m benchmarks.end_to_end.cost --out DIR [--model demo|small] [--rounds N]``: what a training step costs in each mode.

Writes ``cost-MODEL.json``, ``.md`` and ``.png``. Every round makes one step of every side, so ratios are taken between steps of
one round; run it on an idle machine all the same. ``--model demo`` is the demo's pair at its size and needs mmdet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .modes import MODES, PLAIN

ROUNDS = {"demo": 15, "small": 25}
THREADS = min(2, int(os.environ.get("OMP_NUM_THREADS", 2)))
SCHEMA = 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end.cost",
        description="Cost of a training step in each mode, measured and predicted.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the result")
    parser.add_argument("--model", choices=sorted(ROUNDS), default="demo")
    parser.add_argument(
        "--rounds", type=int, help=f"default: {', '.join(f'{n} ({m})' for m, n in ROUNDS.items())}"
    )
    parser.add_argument("--images", type=int, help="of a batch; default: 8 (demo), 2 (small)")
    parser.add_argument(
        "--only", nargs="+", choices=list(MODES), metavar="MODE", help="some of the modes, beside plain FGD"
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error(f"--rounds must be 2 or more, for quartiles, got {arguments.rounds}")
    if arguments.images is not None and arguments.images < 1:
        parser.error(f"--images must be 1 or more, got {arguments.images}")
    return arguments


def run(
    model: str, rounds: int, *, images: int | None = None, only: Sequence[str] | None = None, say: Any = None
) -> dict[str, Any]:
    """The result file's object."""
    from benchmarks.machine import commit, machine, processor, versions

    from .measure import measure
    from .schedule import Schedule
    from .sides import Pair

    load = round(os.getloadavg()[0], 2)  # before this run adds to it
    say = say or (lambda _: None)
    chosen = {} if images is None else {"images": images}
    pair: Pair
    generation: list[float] | None = None
    if model == "demo":
        from .demo import DemoPair

        pair = demo = DemoPair(**chosen)
    else:
        from .small import SmallPair

        pair, demo = SmallPair(**chosen), None
    modes = [mode for name, mode in MODES.items() if only is None or name in only or name == PLAIN]
    pieces, found = measure(pair, modes, rounds, say=say)
    whole = only is None and demo is not None
    if whole:
        say("the offline pass")
        generation = demo.generation_seconds(min(rounds, 3))
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(processor(), load=load),
        "versions": versions(),
        "commit": commit(),
        "model": model,
        "title": pair.title,
        "rounds": rounds,
        "pieces": pieces.asdict(),
        "modes": {name: asdict(figures) for name, figures in found.items()},
        "generation": generation,
        "schedule": asdict(Schedule(batch=pair.images)) if whole else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    os.environ.update(OMP_NUM_THREADS=str(THREADS), MKL_NUM_THREADS=str(THREADS))
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for newer versions
    import torch

    torch.set_num_threads(THREADS)
    from .cost_picture import draw
    from .cost_table import markdown

    result = run(
        arguments.model, arguments.rounds or ROUNDS[arguments.model], images=arguments.images, only=arguments.only,
        say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"cost-{arguments.model}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    stem.with_suffix(".md").write_text(text)
    draw(result, stem.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
