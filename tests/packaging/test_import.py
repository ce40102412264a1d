"""`import ikd_fast` is light: torch and numpy only, and quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROBE = """
import json, sys, time
import numpy, torch
before = set(sys.modules)
start = time.perf_counter()
import ikd_fast
bare = set(sys.modules) - before
from ikd_fast import AdaptiveFreqAug, OnlineDIFGSM, FGDLoss
seconds = time.perf_counter() - start
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"seconds": seconds, "bare": sorted(bare), "new": new, "cuda": torch.cuda.is_initialized()}))
"""

# what torch itself imports late belongs to torch
_OF_TORCH = {
    "torch",
    "torchgen",
    "functorch",
    "numpy",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "fsspec",
    "filelock",
}


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> list[dict]:
    cwd = tmp_path_factory.mktemp("probe")
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=cwd, env=env
        )
        for _ in range(3)
    ]
    return [json.loads(done.stdout) for done in runs]


def test_import_needs_only_torch_and_numpy(probes) -> None:
    foreign = set(probes[0]["new"]) - _OF_TORCH - {"ikd_fast"} - set(sys.stdlib_module_names)
    # an editable install registers its finder under a private name
    assert {name for name in foreign if not name.startswith("__editable__")} == set()


def test_bare_import_loads_nothing_of_ours(probes) -> None:
    assert [name for name in probes[0]["bare"] if name.startswith("ikd_fast.")] == []


def test_import_takes_at_most_half_a_second_beyond_torch(probes) -> None:
    assert min(probe["seconds"] for probe in probes) <= 0.5


def test_import_does_not_initialise_cuda(probes) -> None:
    assert not probes[0]["cuda"]
