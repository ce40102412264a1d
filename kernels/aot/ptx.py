"""What PTX says about a kernel: how wide the accesses of each source line are, and whether floats are added atomically."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"(?:\s+"([^"]+)")?', re.MULTILINE)
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s")
_ACCESS = re.compile(r"\b(?:ld|st)\.[\w.:]*global[\w.:]*")
_COPY = re.compile(
    r"\bcp\.async\.(?P<kind>bulk|c[ag])\S*global\S*(?:\s+\[[^]]*\],\s*\[[^]]*\],\s*(?P<bytes>\w+))?"
)
_FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.:]*global[\w.:]*\.(?:b?f16(?:x2)?|f32|f64)\b")
_MARK = re.compile(r"#\s*stream\b")

Line = tuple[str, int]


def _access_bytes(opcode: str) -> int:
    vector = re.search(r"\.v(\d+)", opcode)
    kind = re.search(r"\.[bsuf](\d+)$", opcode)
    if kind is None:
        raise ValueError(f"cannot read the width of the PTX access {opcode!r}")
    return int(kind[1]) // 8 * (int(vector[1]) if vector else 1)


def _copy_bytes(match: re.Match[str]) -> int:
    # Bulk copies move 16 bytes or a multiple; the others name their bytes.
    return 16 if match["kind"] == "bulk" else int(match["bytes"], 0)


def widest_accesses(ptx: str) -> dict[Line, int]:
    """Bytes of the widest global access of each source line, ``(file name, line)``.

    Inside inline assembly the assembler counts lines on from the statement's own, so the block's first line counts.
    """
    files = {number: name or path for number, path, name in _FILE.findall(ptx)}
    names = {number: path.rpartition("/")[2] for number, path in files.items()}
    widest: dict[Line, int] = defaultdict(int)
    here: Line | None = None
    inline, located = False, False
    for text in ptx.splitlines():
        if "// begin inline asm" in text:
            inline, located = True, False
        elif "// end inline asm" in text:
            inline = False
        if loc := _LOC.match(text):
            if not (inline and located):
                here = (names.get(loc[1], "?"), int(loc[2]))
            located = True
            continue
        if access := _ACCESS.search(text):
            width = _access_bytes(access[0])
        elif copy := _COPY.search(text):
            width = _copy_bytes(copy)
        else:
            continue
        if here is None:
            raise ValueError("PTX without line information: unset TRITON_DISABLE_LINE_INFO")
        widest[here] = max(widest[here], width)
    return dict(widest)


def float_atomics(ptx: str) -> list[str]:
    """The opcodes that add floats atomically, whose result depends on the order of arrival."""
    return sorted({match[0] for match in _FLOAT_ATOMIC.finditer(ptx)})


def stream_lines(source: str) -> dict[int, str]:
    """Line of every ``tl.load`` or ``tl.store`` in a statement marked ``# stream``, and that line's text."""
    marks = [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and _MARK.match(token.string)
    ]
    lines = source.splitlines()
    simple = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr))
    ]
    found: dict[int, str] = {}
    for mark in marks:
        calls = [
            node.lineno
            for statement in simple
            if statement.lineno <= mark <= (statement.end_lineno or statement.lineno)
            for node in ast.walk(statement)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("load", "store")
        ]
        if not calls:
            raise ValueError(
                f"line {mark} is marked '# stream' but loads and stores nothing: {lines[mark - 1].strip()}"
            )
        found.update({line: lines[line - 1].strip() for line in calls})
    return found
