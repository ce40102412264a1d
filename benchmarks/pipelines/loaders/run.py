"""``python -m benchmarks.pipelines.loaders.run --out DIR``: images a second through DALI and through mmdet's loader, and CPU time.

Both read the same dict of a loader with as many workers, round after round in turn; nothing is done with the batches.
Writes ``loaders.json`` and ``loaders.md``. Needs mmdet and DALI; without one of them it says which, and stops.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

NEEDED = {"mmdet": 'pip install "ikd_fast[mmdet]"', "nvidia.dali": 'pip install "ikd_fast[dali]"'}
WORKERS = (1, 2)
STAGE_FILES, STAGE_SIZE, STAGE_BATCH = 64, (800, 1067), 8


def missing(device: str) -> list[str]:
    """What this needs and is not here, packages with the line that installs them."""
    import torch

    found = ["a CUDA device that torch sees"] if device == "gpu" and not torch.cuda.is_available() else []
    for name, line in NEEDED.items():
        try:
            importlib.import_module(name)
        except ImportError:
            found.append(f"{name}: {line}")
    return found


def settings(device: str) -> dict[str, dict[str, Any] | None]:
    """Of each side's ``DALIDetLoader``; None for mmdet's loader."""
    if device == "gpu":
        return {"mmdet": None, "DALI": {"device": "gpu"}}
    by = {name: {"device": "cpu", "resizer": name} for name in ("cv2", "dali")}
    return {"mmdet": None, "DALI and cv2": by["cv2"], "DALI alone": by["dali"]}


def compare(
    root: Path, pipeline: list[dict], *, batch: int, rounds: int, device: str, say: Any
) -> list[dict]:
    """A row for each side: ``name, workers, passes``; one warm-up pass, then ``rounds`` in turn."""
    from .sides import Side, config

    loader = config(root, pipeline, batch)
    rows = []
    for workers in WORKERS:
        sides = {name: Side(loader, workers, dali) for name, dali in settings(device).items()}
        passes: dict[str, list[dict]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            say(f"{workers} workers, round {turn} of {rounds}")
            names = list(sides) if turn % 2 else list(reversed(sides))
            for name in names:
                done = asdict(sides[name].read())
                if turn:
                    passes[name].append(done)
        rows += [{"name": name, "workers": workers, "passes": passes[name]} for name in sides]
        del sides
    return rows


def stages(root: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds an image of each stage and side, a value a round."""
    from .stages import STAGES, cv2_stage, dali_stage, encoded, seconds

    files = encoded(root, STAGE_FILES)
    found: dict[str, dict[str, list[float]]] = {}
    for stage in STAGES:
        runs = {
            "cv2": cv2_stage(stage, files, STAGE_SIZE),
            "DALI": dali_stage(stage, files, STAGE_SIZE, STAGE_BATCH),
        }
        found[stage] = {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name, run in runs.items():
                took = seconds(run) / len(files)
                if turn:
                    found[stage][name].append(took)
    return found


def measure(*, images: int, rounds: int, device: str, demo: Path | None, say: Any) -> dict[str, Any]:
    from benchmarks.machine import commit, machine, processor, versions

    from .sets import jpeg_set
    from .sides import COCO, DEMO

    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        root = jpeg_set(Path(folder), images)
        say("stages")
        staged = stages(root, rounds)
        work = {
            f"{images} JPEGs of 640 x 480": compare(
                root, COCO, batch=8, rounds=rounds, device=device, say=say
            )
        }
        if demo is not None:
            work["the demo's PNG tiles"] = compare(demo, DEMO, batch=8, rounds=rounds, device=device, say=say)
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(processor(), load=load),
        "versions": versions(),
        "commit": commit(),
        "device": device,
        "rounds": rounds,
        "stages": staged,
        "work": work,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipelines.loaders.run",
        description="Throughput of DALI's loader and mmdet's.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the result")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="of DALI")
    parser.add_argument(
        "--demo", type=Path, metavar="DIR", help="the demo's data, runs/demo/data, to read as well"
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be 2 or more, for quartiles, got {arguments.rounds}")
    if lacking := missing(arguments.device):
        print("this comparison needs " + "; ".join(lacking), file=sys.stderr)
        return 1
    from .table import markdown

    result = measure(
        images=arguments.images, rounds=arguments.rounds, device=arguments.device, demo=arguments.demo,
        say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "loaders.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (arguments.out / "loaders.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
