"""Files that come with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

PACKAGE = "ikd_fast::"


def resolve_path(path: str, folder: str) -> str:
    """``ikd_fast::name`` is a file this package ships (``folder``: ``configs`` or ``assets``); other paths stay."""
    if not path.startswith(PACKAGE):
        return path
    if folder == "configs":
        import ikd_fast.configs as home

        root = Path(next(iter(home.__path__)))
    else:
        root = Path(__file__).parent / folder
    found = root / path.removeprefix(PACKAGE)
    if not found.exists():
        have = sorted(
            str(p.relative_to(root))
            for p in root.rglob("*")
            if p.is_file() and p.suffix in (".py", ".safetensors", ".json")
        )
        near = difflib.get_close_matches(path.removeprefix(PACKAGE), have, n=1)
        hint = f"did you mean {PACKAGE}{near[0]}?" if near else f"it ships {', '.join(have)}"
        raise FileNotFoundError(f"{path}: ikd_fast ships no such file; {hint}")
    return str(found)
