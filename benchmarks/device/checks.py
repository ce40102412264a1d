"""The kernel tests on this device: a figure of an operation is printed only if its tests passed in the same run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .uninstalled import ROOT

KERNEL_TESTS = ROOT / "tests" / "kernels" / "triton_ops"
GPU_TESTS = ROOT / "tests" / "gpu"


@dataclass(frozen=True)
class Outcome:
    """One test file: ``problem`` is empty where everything in it passed and something ran."""

    name: str
    passed: int
    skipped: int
    problem: str
    seconds: float


def read_report(name: str, text: str, seconds: float) -> Outcome:
    """From pytest's JUnit XML."""
    suites = list(ElementTree.fromstring(text).iter("testsuite"))

    def total(key: str) -> int:
        return sum(int(suite.get(key, 0)) for suite in suites)

    bad, skipped = total("failures") + total("errors"), total("skipped")
    passed = total("tests") - bad - skipped
    problem = f"{bad} of {passed + bad} tests failed" if bad else "" if passed else "no test ran"
    return Outcome(name, passed, skipped, problem, seconds)


def test_files(folders: Sequence[Path]) -> list[Path]:
    return sorted(path for folder in folders for path in folder.glob("test_*.py"))


def run_tests(files: Sequence[Path], seconds: float, workers: int, log: Path) -> list[Outcome]:
    """Each file in a pytest process of its own, ``workers`` at a time; their output is added to ``log``."""
    end = time.monotonic() + seconds
    waiting, running, done = list(files), [], []
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as output:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < end:
                running.append(_Process(waiting.pop(0), Path(scratch)))
            for process in [p for p in running if p.ended(end)]:
                running.remove(process)
                output.write(process.output())
                done.append(process.outcome())
            if waiting and not running and time.monotonic() >= end:
                done += [Outcome(path.stem, 0, 0, "not started: no time left", 0.0) for path in waiting]
                break
            time.sleep(0.05)
    return sorted(done, key=lambda outcome: outcome.name)


class _Process:
    def __init__(self, path: Path, scratch: Path) -> None:
        self.path, self.report, self.text = path, scratch / f"{path.stem}.xml", scratch / f"{path.stem}.txt"
        self.start = time.monotonic()
        self.killed = False
        # The checkout may be read-only, and must not fill with caches.
        options = ["-q", "-rfE", "-p", "no:cacheprovider", "-p", "benchmarks.device.uninstalled"]
        with self.text.open("w") as text:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, f"--junitxml={self.report}", str(path)],
                cwd=ROOT,
                stdout=text,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            )

    def ended(self, end: float) -> bool:
        if self.process.poll() is not None:
            return True
        if time.monotonic() < end:
            return False
        self.killed = True
        self.process.kill()
        self.process.wait()
        return True

    def output(self) -> str:
        return f"=== {self.path.stem}\n{self.text.read_text(errors='replace')}\n"

    def outcome(self) -> Outcome:
        name, seconds = self.path.stem, round(time.monotonic() - self.start, 1)
        if self.killed:
            return Outcome(name, 0, 0, f"stopped after {seconds:.0f} s: no time left", seconds)
        if not self.report.is_file():
            return Outcome(name, 0, 0, f"pytest ended in {self.process.returncode} without a report", seconds)
        return read_report(name, self.report.read_text(), seconds)


def problem_of(stem: str, outcomes: Sequence[Outcome]) -> str:
    """Why the figures of operation ``stem`` must not be printed; empty where its tests passed.

    ``stem="*"``: what uses every operation, which needs every test.
    """
    own = [
        o
        for o in outcomes
        if stem == "*" or o.name in ("test_launch", f"test_{stem}") or o.name.startswith(f"test_{stem}_")
    ]
    if stem != "*" and not any(o.name != "test_launch" for o in own):
        return f"no test file of {stem} ran"
    return "; ".join(f"{o.name}: {o.problem}" for o in own if o.problem)
