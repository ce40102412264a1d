"""``python -m tests.mmdet.killed_training DIR [--kills N] [--shared]``: a training that is killed at random moments and goes on.

Each child trains with a memory of files, resumes from the last checkpoint, and says each iteration; after a random time it gets
SIGKILL. Between two children every record is read.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child(directory: Path, shared: bool, iterations: int) -> None:
    import torch

    import ikd_fast.mmdet  # noqa: F401
    from tests.mmdet.conftest import stock_config, with_ikd, write_coco

    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    class Say(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            loss = float(torch.as_tensor(outputs["loss"]))
            print("iteration", runner.iter, loss, flush=True)

    torch.manual_seed(0)
    if not (directory / "data" / "ann.json").is_file():
        write_coco(directory / "data")
    config = with_ikd(stock_config(directory / "data", batch_size=3), augment=None, stop_at=None)
    config["train_dataloader"]["sampler"] = dict(type="KeyedSampler", infinite=True)
    kept = dict(shared=True) if shared else dict(directory=str(directory / "memory"))
    config["model"]["adv"] = dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="carry", memory=kept))
    config["train_cfg"] = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=10 * iterations)
    config["default_hooks"] = config["default_hooks"] | dict(
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5, max_keep_ckpts=2)
    )
    config |= dict(
        val_dataloader=None,
        val_evaluator=None,
        val_cfg=None,
        work_dir=str(directory / "work"),
        resume=True,
        log_level="INFO",
    )
    runner = Runner.from_cfg(Config(config))
    runner.register_hook(Say())
    runner.train()


def look(path: Path) -> dict[str, int]:
    from ikd_fast.attack.memory.shards import upkeep

    if not (path / "memory.json").is_file():
        raise SystemExit(f"{path}: no memory is there after a kill")
    return upkeep.verify(path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.directory, arguments.shared, 100_000)
        return 0
    rng, rows = random.Random(0), []
    command = [sys.executable, "-m", "tests.mmdet.killed_training", str(arguments.directory), "--child"]
    command += ["--shared"] if arguments.shared else []
    for kill in range(arguments.kills):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        seen, text = [], []
        for line in process.stdout:
            text.append(line)
            if line.startswith("iteration"):
                seen.append(int(line.split()[1]))
                if len(seen) == 1:
                    end = time.monotonic() + rng.uniform(0.2, 2.5)
                if time.monotonic() > end:
                    break
        if not seen:
            print("".join(text[-30:]))
            raise SystemExit(f"run {kill} did not train")
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        where = next(
            (
                re.search(r"perturbation memory: .*, in (/[^,\n]+)", line)[1]
                for line in text
                if ", in /" in line
            ),
            "",
        )
        found = look(Path(where))
        ahead = next(
            (line.strip() for line in text if " records" in line and "perturbation memory: /" in line), ""
        )
        rows.append(
            dict(
                first=seen[0],
                last=seen[-1],
                whole=found["whole"],
                damaged=found["count"],
                said=ahead.partition("perturbation memory: ")[2],
            )
        )
        print(json.dumps(rows[-1]), flush=True)
    went_on = all(b["first"] <= a["last"] + 1 for a, b in pairwise(rows))
    print(
        json.dumps(
            dict(
                kills=len(rows),
                damaged=sum(r["damaged"] for r in rows),
                went_on=went_on,
                whole=rows[-1]["whole"],
            )
        )
    )
    return int(any(r["damaged"] for r in rows) or not went_on)


if __name__ == "__main__":
    sys.exit(main())
