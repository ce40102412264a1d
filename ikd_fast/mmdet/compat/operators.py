"""A stand-in for ``mmcv._ext``: the operators of mmdet's common detectors, and errors by name for the rest."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from .deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from .focal import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward
from .nms import nms
from .roi_align import roi_align_backward, roi_align_forward
from .soft_nms import softnms

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
    "softnms": softnms,
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
    "deform_conv_forward": deform_conv_forward,
    "deform_conv_backward_input": deform_conv_backward_input,
    "deform_conv_backward_parameters": deform_conv_backward_parameters,
    "modulated_deform_conv_forward": modulated_deform_conv_forward,
    "modulated_deform_conv_backward": modulated_deform_conv_backward,
}


# What torchvision.ops serves, as the argument each of ours takes it by. Soft-nms and focal loss have no like there.
THROUGH_TORCHVISION: dict[str, Callable[[Any], dict[str, Any]]] = {
    "nms": lambda ops: {"torchvision_nms": ops.nms},
    **dict.fromkeys(
        [
            name
            for name in PROVIDED
            if name.startswith(("roi_align_", "deform_conv_", "modulated_deform_conv_"))
        ],
        lambda ops: {"torchvision_ops": ops},
    ),
}


def find_torchvision() -> tuple[Any, str | None]:
    """``torchvision.ops`` and why it is not used, one of the two being None.

    It is used whole or not at all: each of nms, roi_align and deform_conv2d is tried on one pixel.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None, "torchvision is not installed"
    # A torchvision built for another torch fails in many ways: RuntimeError, OSError, AttributeError...
    try:
        import torch
        import torchvision.ops as ops

        one = torch.ones(1, 1, 1, 1)
        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        ops.nms(box, box.new_ones(1), 0.5)
        ops.roi_align(one, torch.cat([box.new_zeros(1, 1), box], dim=1), (1, 1), 1.0, 0, True)
        ops.deform_conv2d(one, torch.zeros(1, 2, 1, 1), one, None, (1, 1), (0, 0), (1, 1), one)
    except Exception as error:
        return None, f"torchvision does not work with this torch: {type(error).__name__}: {error}"
    return ops, None


def build_extension() -> tuple[OperatorModule, dict[str, str]]:
    """The module to put at ``sys.modules["mmcv._ext"]``, and who provides each of its operators."""
    module = OperatorModule(EXTENSION, "Operators served by ikd_fast.mmdet.compat.")
    module.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None, origin="ikd_fast.mmdet.compat")
    providers = dict.fromkeys(PROVIDED, "ikd_fast")
    ops, _ = find_torchvision()
    for name, function in PROVIDED.items():
        if ops is not None and name in THROUGH_TORCHVISION:
            function = functools.partial(function, **THROUGH_TORCHVISION[name](ops))
            providers[name] = "torchvision"
        setattr(module, name, function)
    # mmengine and mmcv print these two in their environment reports.
    module.get_compiler_version = _not_compiled  # type: ignore[attr-defined]
    module.get_compiling_cuda_version = _not_compiled  # type: ignore[attr-defined]
    return module, providers
