"""Python source of a config: values in the configs' style, paths that hold from another folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .build import PACKAGE, resolve_path


def relative(path: str) -> str:
    """A path as a config beside it writes it, for ``_base_``; schemes stay, files of this package become paths."""
    if path.startswith(PACKAGE):
        path = resolve_path(path, "configs")
    if "::" in path or "://" in path:
        return path
    path = Path(os.path.relpath(path)).as_posix()
    return path if path.startswith("../") else f"./{path}"


def beside(path: str) -> str:
    """A path that mmengine resolves from the config's own folder, wherever training starts."""
    if "::" in path or "://" in path:
        return path
    return f"{{{{ fileDirname }}}}/{relative(path).removeprefix('./')}"


def code(value: Any) -> str:
    """Python source in the configs' style.

    >>> code([dict(type="FGDLoss", levels=[0, 1])])
    '[dict(type="FGDLoss", levels=[0, 1])]'
    """
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{k}={code(v)}' for k, v in value.items())})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(code, value))}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
