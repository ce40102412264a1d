"""mmengine checkpoints on torch >= 2.6, where ``torch.load`` refuses all but plain tensors.

A training checkpoint of mmengine 0.10 holds numpy scalars and arrays (in the message hub) and ``HistoryBuffer``
objects, whose state names the class's own methods through ``builtins.getattr``. Those are put on torch's allow-list,
``getattr`` as a stand-in that only looks up the registered statistics of ``HistoryBuffer``: the real one would let a
file reach, and change, any attribute of any allowed object.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

UNSAFE_VARIABLE = "IKD_FAST_ALLOW_UNSAFE_PICKLE"


class UnsafeCheckpointError(pickle.UnpicklingError):
    """A checkpoint holds objects that are not on the allow-list."""


def _history_method(owner: Any, name: str) -> Any:
    """What ``builtins.getattr`` means inside a checkpoint: a registered statistic of ``HistoryBuffer``."""
    from mmengine.logging import HistoryBuffer

    HistoryBuffer()  # the class registers its default statistics when it is first made
    if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f"Unsupported global: GLOBAL getattr({owner!r}, {name!r}) is not a HistoryBuffer method"
    )


def _named(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """``function`` under the name a file calls it by; torch 2.6 takes the name from the callable alone."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    stand_in.__module__, stand_in.__qualname__, stand_in.__name__ = module, name, name
    return stand_in


@functools.cache
def allowed_globals() -> tuple[Any, ...]:
    """The entries for ``torch.serialization.add_safe_globals``."""
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    numpy_core = getattr(np, "_core", None) or np.core
    entries: list[Any] = [HistoryBuffer, ConfigDict, np.ndarray, np.dtype]
    entries.append(_named(_history_method, "builtins", "getattr"))
    # numpy 1 and numpy 2 name the same functions differently in the file.
    for package in ("numpy.core", "numpy._core"):
        for name in ("_reconstruct", "scalar"):
            entries.append(_named(getattr(numpy_core.multiarray, name), f"{package}.multiarray", name))
    entries += [type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"]
    return tuple(dict.fromkeys(entries))


def unsafe_pickle_allowed() -> bool:
    """True when the user set IKD_FAST_ALLOW_UNSAFE_PICKLE=1."""
    value = os.environ.get(UNSAFE_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{UNSAFE_VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def _refusal(error: BaseException, source: str) -> UnsafeCheckpointError:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"GLOBAL (getattr\(.*?\)|\S+)", text)
    if found:
        named = found.group(1)
        what = f"it holds {named}, which is not on the allow-list"
        remedy = (
            ""
            if named.startswith("getattr(")
            else f"allow that class with torch.serialization.add_safe_globals([{named}]) before loading, or "
        )
    else:
        what, remedy = f"torch says: {text.splitlines()[-1] if text else error!r}", ""
    return UnsafeCheckpointError(
        f"{source} was not loaded: {what}. Unpickling such objects can run code from the file. If you trust the file: "
        f"{remedy}set {UNSAFE_VARIABLE}=1 in the environment to unpickle anything it holds."
    )


def _guarded(load: Callable[[bool], Any], source: str, allow_unsafe_pickle: bool) -> Any:
    """Call ``load(weights_only)``; unsafe only when told, and then said aloud."""
    if allow_unsafe_pickle or unsafe_pickle_allowed():
        warnings.warn(
            f"{source} is unpickled without restriction: it can run code", RuntimeWarning, stacklevel=3
        )
        return load(False)
    try:
        return load(True)
    except pickle.UnpicklingError as error:
        raise _refusal(error, source) from error


def load_checkpoint(path: str | Path, map_location: Any = "cpu", *, allow_unsafe_pickle: bool = False) -> Any:
    """``torch.load`` of a file saved by mmengine, restricted to tensors, numpy values and mmengine's log buffers.

    Args:
        path: the ``.pth`` file.
        map_location: as for ``torch.load``.
        allow_unsafe_pickle: unpickle anything, which can run code from the file. The environment variable
            IKD_FAST_ALLOW_UNSAFE_PICKLE=1 does the same for every file.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeCheckpointError: the file holds something else; the message names it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint not found: {file}")
    _allow()
    return _guarded(
        lambda safe: torch.load(file, map_location=map_location, weights_only=safe),
        str(file),
        allow_unsafe_pickle,
    )


def _allow() -> None:
    torch.serialization.add_safe_globals(list(allowed_globals()))


def install() -> None:
    """Allow-list the globals for the whole process and let mmengine load files and URLs through the same gate."""
    _allow()
    from mmengine.runner import checkpoint as mmengine_checkpoint

    def load_from_local(filename: str, map_location: Any) -> Any:
        return load_checkpoint(filename, map_location)

    original = mmengine_checkpoint.load_url
    if getattr(original, "ikd_fast_guarded", False):
        return

    @functools.wraps(original)
    def load_url(url: str, *args: Any, **kwargs: Any) -> Any:
        # torch.hub unpickles downloads without restriction unless told otherwise.
        kwargs.pop("weights_only", None)
        return _guarded(lambda safe: original(url, *args, weights_only=safe, **kwargs), url, False)

    load_url.ikd_fast_guarded = True  # type: ignore[attr-defined]
    mmengine_checkpoint.load_url = load_url
    mmengine_checkpoint.CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
