"""What every distillation loss shares: the context of a step, binding to channel counts, checked maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ikd_fast.kernels.ops.backend import check_backend
from ikd_fast.kernels.reference.precision import full

from .align import align_conv, apply_conv
from .checks import check_levels, check_maps


@dataclass
class DistillContext:
    """What a loss may know about the batch besides the feature maps.

    ``boxes`` are xyxy in pixels of the network input, one ``[n_i, 4]`` float tensor an image, on the
    features' device; ``labels`` go with them. ``image_sizes`` are the ``(height, width)`` before padding and
    ``input_size`` that of the padded batch, both host integers. ``image_ids`` are the 64-bit keys of the
    images: with ``seed`` and ``epoch`` they decide every random draw. ``valid`` (one bool ``[N, H, W]`` a
    level, true inside the image) is for losses that leave padding out; the published forms do not use it.

    >>> import torch
    >>> ctx = DistillContext(boxes=[torch.tensor([[4.0, 4.0, 20.0, 28.0]])], labels=None,
    ...                      image_sizes=[(30, 40)], input_size=(32, 64), image_ids=[7])
    >>> ctx.batch_size
    1
    """

    boxes: list[Tensor]
    labels: list[Tensor] | None
    image_sizes: list[tuple[int, int]]
    input_size: tuple[int, int]
    image_ids: list[int]
    epoch: int = 0
    step: int = 0
    seed: int = 0
    valid: list[Tensor] | None = None

    @property
    def batch_size(self) -> int:
        return len(self.image_sizes)


@dataclass(frozen=True)
class LevelSpec:
    """One pyramid level as a probe forward saw it; ``stride`` is input size over map size."""

    channels: int
    height: int
    width: int
    stride: int | None = None


class KDLoss(nn.Module):
    """Base of every distillation loss: one object for the whole pyramid, its weights inside.

    A subclass writes ``forward(student, teacher, ctx)`` and returns a scalar that is already weighted, or a
    dict of such scalars keyed by the level as a string (``"0"``, ``"1"``, ...), whose sum is the loss.
    ``self.pairs(student, teacher)`` checks the maps and gives the chosen levels in float32
    (``self.raw_pairs`` as they came, for operations that compute in float32 themselves). A loss with
    parameters also writes ``build(level, student, teacher)``, which ``bind`` calls once for every chosen
    level, and sets ``needs_bind = True``; ``align_channels = True`` adds a biased 1x1 convolution student ->
    teacher where channels differ.

    Args:
        levels: indices of the pyramid levels to use; None means all.
        source: where the maps come from, read by whoever captures them: ``"neck"``, ``"backbone"``, a module
            path such as ``"neck.fpn_convs.{i}.conv"``, or a list of paths. None: where IKD's ``features`` says.
        name: the prefix of this loss in logs; ``default_name`` where None.
        backend: of the operations, where the loss uses any: ``"auto"`` (Triton on CUDA, PyTorch elsewhere),
            ``"triton"`` or ``"reference"``.

    >>> import torch
    >>> class Cosine(KDLoss):
    ...     default_name = "cosine"
    ...     def forward(self, student, teacher, ctx):
    ...         pairs = self.pairs(student, teacher)
    ...         return {str(i): 1 - torch.cosine_similarity(s, t).mean() for i, s, t in pairs}
    >>> maps = [torch.rand(2, 8, 4, 4)]
    >>> ctx = DistillContext([], None, [(32, 32)] * 2, (32, 32), [0, 1])
    >>> abs(round(float(Cosine()(maps, maps, ctx)["0"]), 5))
    0.0
    """

    default_name: ClassVar[str] = "kd"
    align_channels: ClassVar[bool] = False
    needs_bind: ClassVar[bool] = False
    normaliser: str = "its own"
    """What the sums are divided by, in words, for reports."""
    reads_boxes: ClassVar[bool | None] = None
    """Whether the loss uses ``ctx.boxes``; None: not said."""

    def __init__(
        self,
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_backend(type(self).__name__, backend)
        self.backend = backend
        self.levels = None if levels is None else check_levels(levels)
        self.source = source
        self.name = self.default_name if name is None else name
        self.align = nn.ModuleDict()
        self._channels: dict[int, tuple[int, int]] | None = None

    @property
    def bound(self) -> bool:
        return self._channels is not None

    def selected(self, n_levels: int) -> list[int]:
        """The level indices used on a pyramid of ``n_levels`` maps."""
        if self.levels is None:
            return list(range(n_levels))
        wrong = [i for i in self.levels if i >= n_levels]
        if wrong:
            raise ValueError(
                f"{self._label}: levels={self.levels}, but the pyramid has {n_levels} levels: {wrong} do not "
                f"exist; valid indices are 0..{n_levels - 1}"
            )
        return list(self.levels)

    def bind(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        """Make the parameters for these channel counts, one entry a pyramid level, before the optimizer.

        A second call with the same counts does nothing; with other counts it raises.
        """
        if len(student) != len(teacher):
            raise ValueError(
                f"{self._label}.bind: expected as many student as teacher levels, got channels "
                f"{list(student)} and {list(teacher)}"
            )
        channels = {i: (int(student[i]), int(teacher[i])) for i in self.selected(len(student))}
        if not channels or any(n < 1 for pair in channels.values() for n in pair):
            raise ValueError(
                f"{self._label}.bind: expected channel counts >= 1, got {list(student)} and {list(teacher)}"
            )
        differ = [i for i, (s, t) in channels.items() if s != t]
        if differ and self.needs_bind and not self.align_channels:
            raise ValueError(
                f"{self._label}.bind: levels {differ} differ in channels, {list(student)} and "
                f"{list(teacher)}; set align_channels = True in {self._label} to add a 1x1 convolution"
            )
        self.check_bind(channels)
        if self._channels is not None:
            if channels != self._channels:
                raise ValueError(
                    f"{self._label} is bound to (student, teacher) channels {self._channels} and cannot be "
                    f"bound to {channels}; make a new loss object for other networks"
                )
            return
        for level, (s, t) in channels.items():
            if s != t and self.align_channels:
                self.align[str(level)] = align_conv(s, t)
            self.build(level, s, t)
        self._channels = channels

    def check_bind(self, channels: Mapping[int, tuple[int, int]]) -> None:
        """Refuse levels, or (student, teacher) channels of a level, that the loss cannot take; ``bind`` asks first."""

    def build(self, level: int, student: int, teacher: int) -> None:
        """Make the parameters of one level; a loss without parameters leaves this alone."""

    def pairs(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``(level, S, T)`` of the chosen levels: checked, S aligned to T, float32 (float64 stays)."""
        for level, s, t in self.raw_pairs(student, teacher):
            yield level, full(s), full(t)

    def raw_pairs(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As ``pairs`` in the maps' own dtype, or in float32 on a side whose levels have several dtypes and
        where S is aligned: one dtype a side, as the operations take them."""
        sides: tuple[tuple[str, Any], ...] = (("student", student), ("teacher", teacher))
        for side, maps in sides:
            if isinstance(maps, Tensor):
                raise TypeError(
                    f"{self._label}: expected a list of maps, one a level, got one {side} tensor {tuple(maps.shape)}; write [map]"
                )
        if len(student) != len(teacher) or not student:
            raise ValueError(
                f"{self._label}: expected pyramids of equal length >= 1, got {len(student)} student and "
                f"{len(teacher)} teacher levels; choose matching taps"
            )
        levels = self.selected(len(student))
        if self._channels is not None and levels != list(self._channels):
            raise ValueError(
                f"{self._label} is bound to levels {list(self._channels)}, got a pyramid of {len(student)} "
                "levels; bind it to this pyramid, or choose levels="
            )
        widen_s = bool(self.align) or len({student[i].dtype for i in levels}) > 1
        widen_t = len({teacher[i].dtype for i in levels}) > 1
        for level in levels:
            s, t = student[level], teacher[level]
            check_maps(f"{self._label}, level {level}", s, t)
            self._check_channels(level, s.shape[1], t.shape[1], student, teacher)
            s, t = full(s) if widen_s else s, full(t) if widen_t else t
            if str(level) in self.align:
                s = apply_conv(cast(nn.Conv2d, self.align[str(level)]), s)
            yield level, s, t

    def _check_channels(
        self, level: int, s: int, t: int, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        where = f"{self._label}, level {level}"
        if self._channels is not None:
            if (s, t) != self._channels[level]:
                raise ValueError(
                    f"{where}: bound to (student, teacher) channels {self._channels[level]}, got {(s, t)}"
                )
        elif self.needs_bind or (s != t and self.align_channels):
            raise RuntimeError(
                f"{where}: no parameters yet for {s} student and {t} teacher channels; call "
                f"bind({[m.shape[1] for m in student]}, {[m.shape[1] for m in teacher]}) before building the "
                "optimizer"
            )
        if s != t and not self.align_channels:
            raise ValueError(
                f"{where}: expected equal channels, got student {s} and teacher {t}; set align_channels = "
                f"True in {self._label} to add a 1x1 convolution"
            )

    @property
    def _label(self) -> str:
        return type(self).__name__

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError(f"{self._label} must define forward(student, teacher, ctx)")

    def extra_repr(self) -> str:
        return f"name={self.name!r}, source={self.source!r}, levels={self.levels}"
