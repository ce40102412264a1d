"""``python -m benchmarks.memory.fill DIR --out FILE.json``: a memory of files filled to COCO's size, in random order.

Every image is written once, then visited in another order: read, and written anew. In windows of images: throughput, resident memory
of the process, and what a visit takes, so that a slow-down with fill shows. One process: figures are per core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import commit, machine, processor, versions
from ikd_fast.attack.memory import DirectoryStore, Record, record_bytes

COCO_TRAIN = 118_287
SIZE, BITS, STRIDE = (480, 640), 4, 2
RANKS = 8
WINDOWS = 20
CPU = torch.device("cpu")


def resident() -> int:
    """Bytes of this process's memory that are not files' pages."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) * 1024


def visit_all(
    store: DirectoryStore, order: np.ndarray, payloads: list[torch.Tensor], *, read: bool, say: Any
) -> list[dict]:
    """A row for each window: images, seconds, CPU seconds, resident bytes. What is read is checked."""
    rows = []
    for part in np.array_split(order, WINDOWS):
        start, cpu, wrong = time.perf_counter(), time.process_time(), 0
        for id in part.tolist():
            visits = 1
            if read:
                found = store.get(id, CPU)
                wrong += found is None or not torch.equal(found.delta, payloads[id % len(payloads)])
                visits = 1 + (0 if found is None else found.visits)
            store.put(id, Record(SIZE, visits, visits, payloads[id % len(payloads)]))
        store.flush()
        if wrong:
            raise RuntimeError(f"{wrong} records were not what was written")
        rows.append(
            dict(
                images=len(part),
                seconds=time.perf_counter() - start,
                cpu_seconds=time.process_time() - cpu,
                resident=resident(),
            )
        )
        say(
            f"{'visit' if read else 'fill'} {len(rows)} of {WINDOWS}: {rows[-1]['images'] / rows[-1]['seconds']:.0f} images/s"
        )
    return rows


def measure(directory: Path, images: int, say: Any) -> dict[str, Any]:
    nbytes = record_bytes(SIZE, bits=BITS, stride=STRIDE)
    rng = np.random.default_rng(0)
    payloads = [torch.from_numpy(rng.integers(0, 256, nbytes, dtype=np.uint8)) for _ in range(64)]
    store = DirectoryStore(directory, capacity=1 << max(8, int(np.ceil(np.log2(2 * images / 64)))))
    before = resident()
    fill = visit_all(store, rng.permutation(images), payloads, read=False, say=say)
    visits = visit_all(store, rng.permutation(images), payloads, read=True, say=say)
    sizes = [path.stat() for path in directory.glob("*.ikdmem")]
    result = dict(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"), machine=machine(processor()), versions=versions(),
        commit=commit(), images=images, record=nbytes, size=SIZE, bits=BITS, stride=STRIDE, resident_before=before,
        fill=fill, visits=visits, counts=dict(store.counts), held=store.nbytes,
        file_bytes=sum(s.st_size for s in sizes), disk_bytes=sum(s.st_blocks for s in sizes) * 512,
    )  # fmt: skip
    store.close()
    seconds = sum(row["seconds"] for row in visits) / images
    result["hours_per_epoch_at_8_ranks"] = seconds * COCO_TRAIN / RANKS / 3600
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.fill")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a new directory, removed afterwards")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--images", type=int, default=COCO_TRAIN)
    arguments = parser.parse_args(argv)
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists already")
    needed = int(arguments.images * record_bytes(SIZE, bits=BITS, stride=STRIDE) * 1.02)
    arguments.directory.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(arguments.directory).free) < needed:
            print(
                f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; try --images",
                file=sys.stderr,
            )
            return 1
        result = measure(arguments.directory, arguments.images, lambda line: print(line, file=sys.stderr))
    finally:
        shutil.rmtree(arguments.directory)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("held", "file_bytes", "hours_per_epoch_at_8_ranks", "counts")}))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
