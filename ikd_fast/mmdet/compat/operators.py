"""A stand-in for ``mmcv._ext``: the operators RetinaNet needs, and errors by name for the rest."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from .focal import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward
from .nms import nms

EXTENSION = "mmcv._ext"

FULL_MMCV = (
    'pip uninstall -y mmcv-lite && pip install --no-build-isolation "mmcv==2.1.0"'
    "  (compiles for about 15 min where no wheel for this torch exists)"
)


class OperatorNotAvailable(NotImplementedError):
    """A compiled mmcv operator was called that neither mmcv nor ikd_fast provides here."""


class OperatorModule(ModuleType):
    """Module whose unknown attributes are callables that raise :class:`OperatorNotAvailable`."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return functools.partial(_missing, name)


def _missing(operator: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise OperatorNotAvailable(
        f"mmcv operator {operator!r} is not available: this mmcv has no compiled operators, and ikd_fast provides "
        f"only {', '.join(sorted(PROVIDED))}. To get it install full mmcv:\n  {FULL_MMCV}"
    )


def _not_compiled() -> str:
    return "not compiled (operators by ikd_fast.mmdet.compat)"


PROVIDED: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
}


def find_torchvision_nms() -> tuple[Callable[..., Any] | None, str | None]:
    """``torchvision.ops.nms`` and why it is not used, one of the two being None."""
    if importlib.util.find_spec("torchvision") is None:
        return None, "torchvision is not installed"
    # A torchvision built for another torch fails in many ways: RuntimeError, OSError, AttributeError...
    try:
        import torch
        import torchvision.ops

        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(box, box.new_ones(1), 0.5)
    except Exception as error:
        return None, f"torchvision does not work with this torch: {type(error).__name__}: {error}"
    return torchvision.ops.nms, None


def build_extension() -> tuple[OperatorModule, dict[str, str]]:
    """The module to put at ``sys.modules["mmcv._ext"]``, and who provides each of its operators."""
    module = OperatorModule(EXTENSION, "Operators served by ikd_fast.mmdet.compat.")
    module.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None, origin="ikd_fast.mmdet.compat")
    providers = dict.fromkeys(PROVIDED, "ikd_fast")
    for name, function in PROVIDED.items():
        setattr(module, name, function)
    torchvision_nms, _ = find_torchvision_nms()
    if torchvision_nms is not None:
        module.nms = functools.partial(nms, torchvision_nms=torchvision_nms)  # type: ignore[attr-defined]
        providers["nms"] = "torchvision"
    # mmengine and mmcv print these two in their environment reports.
    module.get_compiler_version = _not_compiled  # type: ignore[attr-defined]
    module.get_compiling_cuda_version = _not_compiled  # type: ignore[attr-defined]
    return module, providers
