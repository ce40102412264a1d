"""All operations compiled for one target, and judged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from .cases import CASES
from .compiling import build
from .ptx import Line
from .report import Row, row_of


def rows_of(target: str, ops: Sequence[str], marked: Mapping[Line, str]) -> list[Row]:
    """``marked``: the lines that stream. Runs in a process of its own where there are several targets."""
    # What the compiler will fuse by default one day is no matter of ours here.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    cases = [(case, case.launches()) for op in ops for case in CASES[op]()]
    return [row_of(found, marked) for found in build(cases, target)]
