"""``python -m tests.attack.shard_writer DIR SEED SECONDS VISITS``: writes and reads at random for so long, and so many visits
at least, and says what it has read.

Every record is a function of (image, visits), so that a torn or foreign one shows.
"""

from __future__ import annotations

import json
import random
import sys
import time

import numpy as np
import torch

from ikd_fast.attack.memory import Record
from ikd_fast.attack.memory.shards import DirectoryStore

IMAGES = 40
CPU = torch.device("cpu")


def record(id: int, visits: int) -> Record:
    """Of one of five lengths, so that slots are cut and joined."""
    values = np.arange(9000 + id % 5 * 2500) * (id + 1) + visits * 17
    return Record((4, 5), visits, visits, torch.from_numpy((values % 251).astype(np.uint8)))


def whole(id: int, found: Record) -> bool:
    return torch.equal(found.delta, record(id, found.visits).delta)


def main(directory: str, seed: int, seconds: float, at_least: int) -> dict[str, int]:
    store = DirectoryStore(directory, shards=2, capacity=256, run="a run")
    store.open()
    rng, end, visits = random.Random(seed), time.monotonic() + seconds, seed << 20
    read = torn = written = 0
    met: set[int] = set()
    print("begun", flush=True)
    while time.monotonic() < end or written < at_least:
        id = rng.randrange(IMAGES)
        found = store.get(id, CPU)
        if found is not None:
            read += 1
            torn += not whole(id, found)
        visits += 1
        store.put(id, record(id, visits))
        written += 1
        if id not in met:
            met.add(id)
            if len(met) == IMAGES:
                store.flush()
                print("each was met", flush=True)
    store.close()
    return {"read": read, "torn": torn, "written": written, **store.counts}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))))
