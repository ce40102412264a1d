"""What a run will do: the settings that must not change between a start and its resume, and steps cut into epochs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ikd_fast.demo.errors import DemoError
from ikd_fast.files import write_json

DEFAULT_STEPS, QUICK_STEPS = 400, 8
STUDENTS = {"alone": "student.py", "fgd": "fgd.py", "fgd_ikd": "fgd_ikd.py"}
"""The students by name, each with its config in ``configs/demo``."""

TITLES = {
    "teacher": "teacher",
    "alone": "student alone",
    "fgd": "student + FGD",
    "fgd_ikd": "student + FGD + IKD",
}
_MADE = ("state.json", "summary.json", "summary.md", "teacher", "teacher.pth", "pictures", "work")


@dataclass(frozen=True)
class Settings:
    """What decides the result. A run directory belongs to one such set, except that seeds may be added."""

    steps: int
    seed: int
    data: str
    teacher: str
    quick: bool
    loader: str = "torch"


@dataclass(frozen=True)
class Epochs:
    """``count`` epochs of ``length`` steps; a run can be resumed at the end of each."""

    count: int
    length: int

    @property
    def steps(self) -> int:
        return self.count * self.length

    @classmethod
    def of(cls, steps: int, images: int, batch: int) -> Epochs:
        """Cut ``steps`` into at least two epochs, none longer than a pass over the images; a few steps more where it must be.

        >>> Epochs.of(300, images=86, batch=8), Epochs.of(12, images=86, batch=8)
        (Epochs(count=30, length=10), Epochs(count=2, length=6))
        """
        full = max(1, min(images // batch, max(10, steps // 20)))
        count = max(min(steps, 2), math.ceil(steps / full))
        return cls(count, math.ceil(steps / count))


def claim(out: Path, settings: Settings, *, fresh: bool) -> bool:
    """Make ``out`` the directory of a run with ``settings``; True if one is there to resume.

    Raises:
        DemoError: it holds a run with other settings, and ``fresh`` is not given; or files under a run's names and no run.
            The message names each.
    """
    refuse_foreign(out)
    state = out / "state.json"
    if fresh:
        clear(out)
    if not state.is_file():
        write_json(state, asdict(settings))
        return False
    before, now = _read_state(out) or {}, asdict(settings)
    changed = [
        f"{key}: {before.get(key)!r} there, {now[key]!r} now" for key in now if before.get(key) != now[key]
    ]
    if changed:
        raise DemoError(
            f"{out} holds a run with other settings ({'; '.join(changed)}).\n"
            "Repeat that command to resume it, write --out FOLDER for another one, or --fresh to start over here.",
            usage=True,
        )
    return True


def refuse_foreign(out: Path) -> None:
    """Raise if ``out`` holds files under the names that a run writes, but no ``state.json`` of a run."""
    found = [] if _read_state(out) is not None else _made(out)
    if found:
        raise DemoError(
            f"{out} holds no run of ikd-fast demo (no state.json of one), but a run would write or delete "
            f"{', '.join(path.name + ('/' if path.is_dir() else '') for path in found)} there.\n"
            "Nothing was changed. Write another --out FOLDER, or move those away.",
            usage=True,
        )


def clear(out: Path) -> None:
    """Delete what a run writes below ``out``, and nothing else; the data set stays. Only where a run's ``state.json`` is.

    Raises:
        DemoError: there is none, but files under a run's names are.
    """
    refuse_foreign(out)
    # The state goes last: an interrupted clear is then still known as a run's folder.
    for path in sorted(_made(out), key=lambda path: path.name == "state.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _made(out: Path) -> list[Path]:
    paths = [out / name for name in _MADE]
    for name in STUDENTS:
        paths += [out / f"student_{name}.pth", *sorted(out.glob(f"student_{name}_seed*.pth"))]
    return [path for path in paths if path.exists() or path.is_symlink()]


def _read_state(out: Path) -> dict[str, Any] | None:
    """The settings in ``out``'s ``state.json``; None where that is missing or not a run's.

    Those with a default are newer than some runs, which had that default.
    """
    try:
        state = json.loads((out / "state.json").read_text())
    except (OSError, ValueError):
        return None
    defaults = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
    needed = {field.name for field in fields(Settings)} - set(defaults)
    return {**defaults, **state} if isinstance(state, dict) and needed <= set(state) else None
