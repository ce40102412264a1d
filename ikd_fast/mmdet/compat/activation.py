"""The one call that must run before mmdet is imported."""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from . import checkpoints, distributed
from .environment import CompatError, check_environment, owners_in, package_folder, pkg_resources_problem
from .operators import EXTENSION, FULL_MMCV, build_extension


@dataclass(frozen=True)
class CompatReport:
    """What :func:`activate` found and did.

    Attributes:
        mode: ``"compiled"`` (mmcv's own operators), ``"substitutes"`` (ours) or ``"foreign"`` (another stand-in for
            ``mmcv._ext`` was there first and is left alone).
        versions: of mmdet, mmengine and mmcv.
        mmcv_distribution: name of the distribution mmcv comes from, ``"unknown"`` for a source tree.
        providers: for each name of ``mmcv._ext`` that is substituted: ``"torchvision"`` or ``"ikd_fast"``.
        reason: why the compiled operators are not used, None when they are.
        problems: what works only in part, with the line to run.
    """

    mode: str
    versions: dict[str, str]
    mmcv_distribution: str
    providers: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    problems: tuple[str, ...] = ()

    def provider(self, operator: str) -> str:
        """Who serves an operator of ``mmcv._ext``: ``compiled``, ``torchvision``, ``ikd_fast``, ``foreign``, ``none``."""
        if self.mode in ("compiled", "foreign"):
            return self.mode
        return self.providers.get(operator, "none")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_lock = threading.RLock()
_report: CompatReport | None = None


def _failed_imports() -> list[str]:
    """Modules left behind by a package whose import failed (Python drops the package, not its children)."""
    return sorted(
        name
        for name in list(sys.modules)
        if name.startswith(("mmdet.", "mmcv.")) and name.rpartition(".")[0] not in sys.modules
    )


def _check_order() -> None:
    left_behind = _failed_imports()
    if left_behind:
        raise CompatError(
            f"mmdet or mmcv was imported before ikd_fast.mmdet and failed half way (mmcv has no compiled operators; "
            f"left behind: {', '.join(left_behind[:3])}{', ...' if len(left_behind) > 3 else ''}). Start Python again "
            "and import ikd_fast.mmdet first, or run the script as\n  python -m ikd_fast.mmdet SCRIPT ARGS..."
        )


def _import_mmcv() -> Any:
    try:
        return importlib.import_module("mmcv")
    except Exception as error:
        hint = (
            '\n  pip uninstall -y opencv-python && pip install "opencv-python-headless"'
            if "libGL" in str(error) or "libgthread" in str(error)
            else "\n  pip install --force-reinstall --no-deps mmcv-lite==2.1.0"
        )
        raise CompatError(
            f"mmcv is installed but does not import: {type(error).__name__}: {error}. Run:{hint}"
        ) from error


def _compiled_operators() -> tuple[str, str | None]:
    """Mode and, for ``"substitutes"``, why the compiled operators are not used."""
    try:
        module = importlib.import_module(EXTENSION)
    except ModuleNotFoundError as error:
        if error.name == EXTENSION:
            return "substitutes", "this mmcv has no compiled operators"
        failure: Exception = error
    except (ImportError, OSError) as error:
        failure = error
    else:
        return ("compiled" if getattr(module, "__file__", None) else "foreign"), None
    return "substitutes", f"the compiled operators do not load: {type(failure).__name__}: {failure}"


def _activate() -> CompatReport:
    versions = check_environment()
    problems = []
    if (problem := pkg_resources_problem()) is not None:
        problems.append(problem)
    mmcv = _import_mmcv()
    mode, reason = _compiled_operators()
    providers: dict[str, str] = {}
    if mode == "substitutes":
        _check_order()
        if reason is not None and "do not load" in reason:
            problems.append(
                f"{reason}. mmcv was built for another torch; operators come from ikd_fast instead. To have the "
                f"compiled ones:\n  {FULL_MMCV}"
            )
        module, providers = build_extension()
        sys.modules[EXTENSION] = module
        mmcv._ext = module
    checkpoints.install()
    distributed.install()
    for problem in problems:
        warnings.warn(problem, RuntimeWarning, stacklevel=4)
    folder = package_folder("mmcv")
    owners = owners_in("mmcv", folder) if folder else {}
    return CompatReport(mode, versions, next(iter(owners), "unknown"), providers, reason, tuple(problems))


def activate() -> CompatReport:
    """Make mmdet importable and its checkpoints loadable. Idempotent; must run before mmdet is imported.

    Where mmcv has compiled operators they are used and nothing is replaced. Where it has none, a module with the
    operators of :data:`~ikd_fast.mmdet.compat.operators.PROVIDED` takes the place of ``mmcv._ext``; any other
    operator raises :class:`OperatorNotAvailable` when it is called. In both cases mmengine's checkpoints load on
    torch >= 2.6 (see :mod:`ikd_fast.mmdet.compat.checkpoints`).

    Raises:
        CompatError: (an ImportError) the stack is missing or mismatched, or mmdet was imported before and failed.
    """
    global _report
    with _lock:
        if _report is None:
            _report = _activate()
        return _report
