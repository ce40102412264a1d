"""``python -m ikd_fast.kernels.aot [--json] [--target sm_90 ...] [--op pyramid_l2 ...]``; needs no GPU.

Ends with 0 when every kernel passes; 1 on a spill, local memory, a float atomic, a ``# stream`` line without a
16-byte access, or a kernel or marked line that nothing compiles; 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from ..ops.backend import interpreted, triton_problem
from .report import document, table, uncovered

TARGETS = ("sm_80", "sm_90", "sm_100")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ikd_fast.kernels.aot",
        description="Compile every kernel without a GPU: registers, spills, shared memory, access widths.",
        epilog="Exit codes: 0 passed, 1 a kernel failed the gate, 2 it could not run.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs; all by default"
    )
    parser.add_argument(
        "--op", nargs="+", metavar="OP", help="operations; all by default, and only then is coverage checked"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if interpreted():
        print("aot: TRITON_INTERPRET is set, which replaces the compiler: unset it", file=sys.stderr)
        return 2
    if problem := triton_problem():
        print(f"aot: {problem}", file=sys.stderr)
        return 2

    import torch
    import triton

    from .cases import CASES
    from .coverage import all_stream_lines, launched_kernels, modules
    from .gate import rows_of

    if unknown := set(arguments.op or ()) - set(CASES):
        print(
            f"aot: expected --op from {', '.join(CASES)}, got {', '.join(sorted(unknown))}", file=sys.stderr
        )
        return 2
    start = time.perf_counter()
    targets = list(dict.fromkeys(arguments.target))
    sources = modules()
    marked = all_stream_lines(sources)
    compiled = functools.partial(rows_of, ops=arguments.op or list(CASES), marked=marked)
    workers = min(len(targets), len(os.sched_getaffinity(0)))
    if workers == 1:
        rows = [row for target in targets for row in compiled(target)]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = [row for part in pool.map(compiled, targets) for row in part]
    missing: list[str] = []
    if not arguments.op:
        missing = uncovered(rows, {name for module in sources for name in launched_kernels(module)}, marked)
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "targets": targets,
        "seconds": round(time.perf_counter() - start, 1),
    }
    result = document(rows, missing, about)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(table(rows))
        for row in rows:
            for problem in row.problems:
                print(f"FAIL {row.kernel} {row.target} ({row.cases[0]}): {problem}")
        for text in missing:
            print(f"FAIL {text}")
        passed = sum(row.ok for row in rows)
        print(
            f"\n{passed} of {len(rows)} builds pass; triton {about['triton']}, {', '.join(targets)}, "
            f"{about['seconds']} s"
        )
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
