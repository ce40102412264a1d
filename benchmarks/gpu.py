"""``python -m benchmarks.gpu --out DIR``: tests, then times the kernels and a training step on this machine's GPU.

Needs torch, triton, numpy and pytest, no network, and under 8 minutes. Run it from the root of a checkout, installed or not.
Writes ``gpu.json`` (the format of ``benchmarks/schema.py``; notes hold what only a GPU has), ``gpu.md`` and ``tests.log``.

The kernel tests run first: an operation whose tests do not pass gets no figure. What is skipped, for that or for lack of
time or memory, is listed with its reason. Ends with 0, with 1 where there is no GPU, a test failed or a side disagreed.

``--device cpu --smoke`` goes through all of it at tiny shapes, kernels interpreted: no measurement, and marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

SECONDS = 465.0
TEST_SECONDS, STEP_SECONDS = 170.0, 120.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Test and time the kernels on a GPU."
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for gpu.json, gpu.md and tests.log"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: a dry run, not a measurement")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="limit of the whole run (default %(default).0f)"
    )
    parser.add_argument("--commit", help="commit to record where the checkout has no .git")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.smoke:
        parser.error("--device cpu is for the dry run alone: add --smoke")
    if not arguments.seconds > 0:
        parser.error(f"--seconds must be above 0, got {arguments.seconds:g}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.device == "cpu":
        # Before Triton is imported; the kernels then run on the CPU.
        os.environ["TRITON_INTERPRET"] = "1"

    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: expected a CUDA device, found none; --device cpu --smoke is a dry run without one",
            file=sys.stderr,
        )
        return 1
    import benchmarks.device.uninstalled  # noqa: F401
    from ikd_fast.kernels.ops.backend import triton_problem

    if problem := triton_problem():
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 1

    from benchmarks.device.output import markdown, smoke_marked
    from benchmarks.device.run import Limits, run_all
    from benchmarks.machine import commit, machine, processor, versions
    from benchmarks.schema import VERSION, validate

    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # One choice of convolution algorithms for all sides.
    torch.backends.cudnn.benchmark = True
    limits = Limits(arguments.seconds, TEST_SECONDS, STEP_SECONDS)
    found = run_all(torch.device(arguments.device), arguments.smoke, limits, arguments.out / "tests.log")
    result = {
        "schema": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(processor()),
        "versions": {"ikd_fast": "unknown", **versions(), "cuda": str(torch.version.cuda)},
        "commit": commit(arguments.commit),
        "benchmarks": found.rows,
        "skipped": found.skipped,
    }
    if arguments.smoke:
        result = smoke_marked(result)
    text = markdown(result, found, arguments.smoke)
    (arguments.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "gpu.md").write_text(text)
    print(text)
    if found.rows:
        validate(result)
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
