"""Which kernels there are, so that none goes uncompiled, and which source lines of theirs stream the data."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from .. import triton_ops
from .ptx import Line, stream_lines


def modules() -> list[ModuleType]:
    """Every module of ``triton_ops``."""
    names = sorted(module.name for module in pkgutil.iter_modules(triton_ops.__path__))
    return [importlib.import_module(f"{triton_ops.__name__}.{name}") for name in names]


def _source(module: ModuleType) -> str:
    if module.__file__ is None:
        raise RuntimeError(f"{module.__name__} has no source file")
    return Path(module.__file__).read_text()


def launched_kernels(module: ModuleType) -> set[str]:
    """Names of the jitted functions that the module's plain functions mention: those that are launched.

    A jitted function that only other jitted functions mention is a helper, compiled as a part of them.
    """
    from triton.runtime import JITFunction

    tree = ast.parse(_source(module))
    jitted = {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return {
        node.id
        for part in tree.body
        if not (isinstance(part, ast.FunctionDef) and part.name in jitted)
        for node in ast.walk(part)
        if isinstance(node, ast.Name) and node.id in jitted
    }


def all_stream_lines(sources: list[ModuleType]) -> dict[Line, str]:
    """``(file name, line)`` of every marked load and store, and its text."""
    found = {}
    for module in sources:
        name = Path(str(module.__file__)).name
        found.update({(name, line): text for line, text in stream_lines(_source(module)).items()})
    return found
