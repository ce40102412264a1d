"""The student's clean and adversarial images in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from .taps import run_tapped

Pyramid = list[Tensor]


@runtime_checkable
class FeatureTask(Protocol):
    """A task loss that can start from features: what ``joint_student`` needs of ``task_loss``."""

    def __call__(self, student: nn.Module, images: Tensor, targets: Any) -> Any:
        """The loss with a forward of its own."""

    def from_features(self, student: nn.Module, features: Any, targets: Any) -> Any:
        """The same loss of what ``features`` gave for these images where that is a callable, else of ``call(student, images)``."""


@dataclass(frozen=True)
class JointForward:
    """One forward of the student on clean and adversarial images.

    Attributes:
        features: what the callable among the sources gave, or ``call`` where there is none: its clean part.
        clean, adversarial: a pyramid per source of either.
    """

    features: Any
    clean: list[Pyramid]
    adversarial: list[Pyramid]


def joint_forward(
    student: nn.Module,
    clean: Tensor,
    adversarial: Tensor,
    clean_sources: Sequence[Any],
    adversarial_sources: Sequence[Any],
    *,
    call: Callable[[nn.Module, Tensor], Any],
    grid: tuple[int, int] | None = None,
) -> JointForward:
    """``call(student, [clean, adversarial])`` once, and both parts of everything it gave.

    The same as two forwards where no image's features depend on another's, which :func:`require_frozen_norms` sees to; dropout
    draws other masks. Equal sources are one; a callable one makes a forward of its own, as ever.

    Args:
        clean: ``[N, C, H, W]``; ``adversarial``: ``[M, C, H, W]`` of the same padded size, M <= N.

    Raises:
        ValueError: a live norm, or images of two sizes.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    >>> out = joint_forward(net, torch.rand(2, 3, 5, 5), torch.rand(1, 3, 5, 5), ["0"], ["1"], call=lambda n, x: n(x))
    >>> out.clean[0][0].shape[0], out.adversarial[0][0].shape[0], out.features.shape[0]
    (2, 1, 2)
    """
    require_frozen_norms(student)
    if clean.shape[1:] != adversarial.shape[1:]:
        raise ValueError(
            f"joint_student needs clean and adversarial images of one padded size, got {tuple(clean.shape[1:])} and "
            f"{tuple(adversarial.shape[1:])}"
        )
    images = torch.cat([clean, adversarial.to(clean.dtype)])
    n, total = len(clean), len(images)
    sources = [*clean_sources, *adversarial_sources]
    unique = {_key(source): source for source in sources}
    computed: dict[Any, Any] = {}  # by callables
    called: list[Any] = []

    def kept(source: Any) -> Any:
        def run(net: nn.Module, x: Tensor) -> Any:
            computed[source] = source(net, x)
            return computed[source]

        return run if callable(source) else source

    watched = [kept(source) for source in unique.values()]
    pyramids = run_tapped(student, watched, lambda: called.append(call(student, images)), images, grid)
    found = dict(zip(unique, pyramids, strict=True))
    for source in sources:
        _require_batch(found[_key(source)], total, source)
    # What the task's loss goes on with: never the adversarial loss's own.
    own = [computed[source] for source in clean_sources if callable(source)]
    features = [*own, *called] or [call(student, images)]
    return JointForward(
        tree_map(lambda v: v[:n] if _batched(v, total) else v, features[0]),
        [[m[:n] for m in found[_key(source)]] for source in clean_sources],
        [[m[n:] for m in found[_key(source)]] for source in adversarial_sources],
    )


def _key(source: Any) -> Any:
    return source if callable(source) or isinstance(source, str) else tuple(source)


def require_frozen_norms(student: nn.Module) -> None:
    """Raise where a norm in training mode mixes the images of a batch or keeps statistics of them."""
    for name, module in live_norms(student):
        raise ValueError(
            f"joint_student puts clean and adversarial images into one batch, which needs frozen norms; {name} "
            f"({type(module).__name__}) takes its statistics from the batch. Freeze the student's norms (norm_eval=True and "
            "norm_cfg=dict(type='BN', requires_grad=False) in mmdet, or .eval() on them), or write joint_student=False"
        )


def live_norms(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Norms whose statistics come from, or go on with, the batch they see."""
    for name, module in net.named_modules():
        if not isinstance(module, _NormBase):
            continue
        per_image = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        if per_image and not (module.training and module.track_running_stats):
            continue
        if module.training or (not per_image and module.running_mean is None):
            yield name, module


def _batched(value: Any, total: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == total


def _require_batch(pyramid: Pyramid, total: int, source: Any) -> None:
    for m in pyramid:
        if len(m) != total:
            raise ValueError(
                f"joint_student: a map at {source!r} has {len(m)} entries for {total} images, so it cannot be parted; write "
                "joint_student=False"
            )
