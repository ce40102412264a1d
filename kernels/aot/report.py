"""The gate, and what is printed: one row for each kernel, specialisation and target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .compiling import Build
from .ptx import Line

WIDE = 16


@dataclass(frozen=True)
class Row:
    """A compiled kernel: ``stream`` holds the bytes of the widest access of each of its marked lines."""

    kernel: str
    op: str
    cases: tuple[str, ...]
    target: str
    registers: int
    stack: int
    local: int
    shared: int
    stream: dict[str, int]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def row_of(build: Build, marked: Mapping[Line, str]) -> Row:
    """The row of a build, with what the gate has against it."""
    problems = []
    if build.stack or build.local:
        problems.append(
            f"registers spill: {build.stack} bytes of stack, {build.local} of local memory; expected none"
        )
    if build.atomics:
        problems.append(f"floats are added atomically ({', '.join(build.atomics)}): a repeat may differ")
    stream = {line: width for line, width in build.widths.items() if line in marked}
    if build.aligned:
        problems += [
            f"{file}:{number} moves {width} bytes at a time, expected {WIDE}: {marked[file, number]}"
            for (file, number), width in sorted(stream.items())
            if width < WIDE
        ]
    return Row(
        build.kernel,
        build.op,
        tuple(build.cases),
        build.target,
        build.registers,
        build.stack,
        build.local,
        build.shared,
        {f"{file}:{number}": width for (file, number), width in sorted(stream.items())},
        tuple(problems),
    )


def uncovered(rows: Iterable[Row], kernels: Iterable[str], marked: Mapping[Line, str]) -> list[str]:
    """Kernels that no case launches and marked lines that no case compiles."""
    rows = list(rows)
    compiled = {row.kernel for row in rows}
    reached = {line for row in rows for line in row.stream}
    return [f"kernel {name} is launched by no case" for name in sorted(set(kernels) - compiled)] + [
        f"{file}:{number} is marked as streaming but compiled by no case: {text}"
        for (file, number), text in sorted(marked.items())
        if f"{file}:{number}" not in reached
    ]


def _cells(row: Row) -> list[str]:
    more = f" (+{len(row.cases) - 1})" if len(row.cases) > 1 else ""
    stream = " ".join(f"{line.rpartition(':')[2]}:{width}" for line, width in row.stream.items())
    return [
        row.kernel,
        row.cases[0] + more,
        row.target,
        str(row.registers),
        str(row.stack + row.local),
        str(row.shared),
        stream or "-",
        "ok" if row.ok else "FAIL",
    ]


HEADER = ["kernel", "case", "target", "regs", "spill B", "shared B", "stream line:bytes", "gate"]


def table(rows: Iterable[Row]) -> str:
    """Plain text, columns aligned."""
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def document(rows: Iterable[Row], missing: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """What ``--json`` prints."""
    rows = list(rows)
    return {
        **about,
        "ok": not missing and all(row.ok for row in rows),
        "uncovered": missing,
        "rows": [{**asdict(row), "ok": row.ok} for row in rows],
    }
