"""How a frozen teacher is run: the options, and what ``"auto"`` means on which device."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

AUTO = "auto"
# By measurement on a CPU (benchmarks/end_to_end/bench_teacher.py). On CUDA only folding, which takes work away and adds none.
DEFAULTS: dict[str, dict[str, bool]] = {
    "cpu": {"fold_bn": True, "channels_last": True},
    "cuda": {"fold_bn": True, "channels_last": False},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = (torch.bfloat16, torch.float16)
# ||F' - F|| / ||F|| of a feature map. Folding moves roundings, a few 1e-7 a layer. ResNet-18 and -50 with FPN show 2e-3 to 1e-2 in
# bfloat16 and up to 1e-3 in float16; a wrong fold or an overflow is near 1.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# cuDNN's float32 convolutions on TensorFloat-32, with float16's mantissa.
TF32_BOUND = 1e-2


@dataclass(frozen=True)
class TeacherEngine:
    """Options of :class:`~ikd_fast.FrozenTeacher`; none of them changes the net that was given.

    The engine runs a copy that shares every tensor it leaves as it is. Memory beyond the net: float32, the folded convolutions
    once more; bfloat16 and float16, half of all convolutions and linear layers. ``cuda_graphs`` adds the activations of one
    forward, shared by the shapes, and the input and maps of each.

    Args:
        fold_bn: batch norms become part of the convolutions before them, where nothing else reads those. A folded norm is an
            ``nn.Identity`` in the copy, so paths stay; a pair whose convolution is tapped stays unfolded.
        channels_last: maps lie in memory as [N, H, W, C] inside; they come back as [N, C, H, W].
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or the torch dtype: convolutions and linear layers have weights of it
            and run in it, the rest as autocast has it. None: as the net and the surroundings have it. bfloat16 rounds
            normalised pixels to half a grey level (float16: 1/16), which small perturbations feel.
        compile: ``torch.compile`` for each padded shape from the second time it comes; or a backend of it, by name or itself.
        cuda_graphs: one CUDA graph for each padded shape, for features without gradient, from the second time it comes.
        max_shapes: how many shapes are compiled or captured; further ones run without, and that is said once.
        outputs: ``"float32"``: maps of a half-precision teacher come back as float32; ``"native"``: as they are.
        tolerance: bound of the self-check, ||F' - F|| / ||F|| at every level against the net as given. Default by dtype: 1e-10
            (float64), 1e-4 (float32; 1e-2 where CUDA convolves in TF32), 1e-2 (float16), 5e-2 (bfloat16).
        report: takes the lines of the self-check; None: nobody does.

    >>> TeacherEngine.of(dict(dtype="bfloat16")).torch_dtype
    torch.bfloat16
    >>> TeacherEngine().on("cpu").fold_bn
    True
    """

    fold_bn: bool | str = AUTO
    channels_last: bool | str = AUTO
    dtype: torch.dtype | str | None = None
    compile: bool | str | Callable[..., Any] = False
    cuda_graphs: bool = False
    max_shapes: int = 8
    outputs: str = "float32"
    tolerance: float | None = None
    report: Callable[[str], None] | None = print

    def __post_init__(self) -> None:
        for name in ("fold_bn", "channels_last"):
            if getattr(self, name) not in (True, False, AUTO):
                raise ValueError(
                    f"teacher engine: {name} must be True, False or 'auto', got {getattr(self, name)!r}"
                )
        known = [*DTYPES, *DTYPES.values(), None]
        if self.dtype not in known:
            raise ValueError(
                f"teacher engine: dtype must be one of {list(DTYPES)} or None, got {self.dtype!r}"
            )
        if not (isinstance(self.compile, (bool, str)) or callable(self.compile)):
            raise ValueError(f"teacher engine: compile must be a bool or a backend, got {self.compile!r}")
        if isinstance(self.max_shapes, bool) or not isinstance(self.max_shapes, int) or self.max_shapes < 1:
            raise ValueError(f"teacher engine: max_shapes must be an integer >= 1, got {self.max_shapes!r}")
        if self.outputs not in ("float32", "native"):
            raise ValueError(f"teacher engine: outputs must be 'float32' or 'native', got {self.outputs!r}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(
                f"teacher engine: tolerance must be above 0, or None for that of the dtype, got {self.tolerance!r}"
            )
        if self.cuda_graphs and not torch.cuda.is_available():
            raise ValueError(
                "teacher engine: cuda_graphs=True needs a CUDA device, and there is none; write cuda_graphs=False"
            )

    @classmethod
    def of(cls, value: TeacherEngine | Mapping[str, Any] | None) -> TeacherEngine | None:
        """From what a user writes; None is no engine."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"engine must be TeacherEngine(...), dict(fold_bn=True, ...) or None, got {value!r:.200}"
            )
        valid = [field.name for field in fields(cls)]
        for name in value:
            if name not in valid:
                near = difflib.get_close_matches(str(name), valid, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise TypeError(f"teacher engine has no option {name!r}; {hint}It has {', '.join(valid)}")
        return cls(**value)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype

    @property
    def half(self) -> bool:
        return self.torch_dtype in HALF

    def on(self, device: torch.device | str) -> TeacherEngine:
        """With every ``"auto"`` decided for a device."""
        chosen = DEFAULTS.get(torch.device(device).type, DEFAULTS["cuda"])
        decided: dict[str, Any] = {name: v for name, v in chosen.items() if getattr(self, name) == AUTO}
        return replace(self, **decided)

    def bound(self, net_dtype: torch.dtype, device: torch.device) -> float:
        """Of the self-check."""
        if self.tolerance is not None:
            return self.tolerance
        dtype = self.torch_dtype or net_dtype
        if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            return TF32_BOUND
        return BOUNDS.get(dtype, BOUNDS[torch.bfloat16])

    def __str__(self) -> str:
        """Those that are on.

        >>> str(TeacherEngine(fold_bn=True, channels_last=False, dtype="bfloat16"))
        'fold_bn, bfloat16'
        """
        names = [name for name in ("fold_bn", "channels_last") if getattr(self, name) is True]
        names += [str(self.torch_dtype).removeprefix("torch.")] if self.torch_dtype else []
        if self.compile:
            names.append(f"compile={self.compile}" if isinstance(self.compile, str) else "compile")
        names += ["cuda_graphs"] if self.cuda_graphs else []
        return ", ".join(names) or "nothing changed"
