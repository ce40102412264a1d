"""DI-FGSM of a frozen teacher, crafted inside the training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels import DeltaCodes
from ikd_fast.kernels.reference.philox import Stream, draw, stable_id
from ikd_fast.pixels import PixelUnits

from .batch import AttackOutput
from .carry import carry
from .craft import craft
from .memory import MemorySettings, PerturbationMemory, View, build_memory
from .objectives import feature_objective, maps_of, resolve_objective
from .rows import select
from .visit import Visit

_DEFAULT_STEPS = {"carry": 1, "iterative": 5, "single": 1, "random_sign": 0}
MODES = tuple(_DEFAULT_STEPS)


class OnlineDIFGSM:
    r"""Adversarial examples of a victim within an L-infinity ball, as IKD's adversarial branch needs them.

    One step, from x_0 = x (or a random start), T re-drawn per image and step:

    .. math:: g \leftarrow \mu g + \nabla / \mathrm{mean}|\nabla|, \quad
              x \leftarrow \mathrm{clip}_{[lo, hi]}\,\mathrm{clip}_{x_0 \pm \epsilon}(x + \alpha\,\mathrm{sign}(g)),
              \quad \nabla = \nabla_x L(T(x), y)

    Source: DI2-FGSM and M-DI2-FGSM (Xie et al., CVPR 2019; ``momentum`` 0 and 1), with the settings of IKD (Liang et al.,
    ACM MM 2023: eps 8, step 2, 5 steps). Differences from IKD's published code: eps and the valid range are those of the
    pixels, not of each image's own contrast; T keeps the aspect and moves the boxes; every image has its own draws; a
    zero gradient leaves an image as it is.

    Args:
        mode: ``"iterative"``: ``steps`` gradients from the clean image. ``"single"``: one gradient from a random start
            uniform in the ball (FGSM with random start). ``"carry"``: each image keeps its perturbation from visit to visit
            (:class:`~ikd_fast.attack.memory.PerturbationMemory`), and the forward that gives the distillation its features also
            gives the gradient for the next visit; the first visit is like ``single``. ``"random_sign"``: the control, delta =
            +-eps at random, no gradient.
        eps: radius in 0..255 grey levels.
        step_size: grey levels a step. Default 2 (``iterative``); 2 eps (``single``), which ends in a corner of the ball wherever it
            started; ``carry``: eps / 2, eps where the memory has 2 bits, 2 eps with ``fresh``.
        steps: gradients of ``iterative``, default 5; ``single`` and ``carry`` have one a call, ``random_sign`` none.
        fresh: ``carry`` takes its gradient before the distillation's forward, at the view that is then applied: one more forward a
            step, as ``single`` has, and stronger where crops move (:func:`~ikd_fast.attack.carry.carry`).
        refresh: ``carry`` takes a gradient on an image's first so many visits and reuses what came of them on all later ones (5:
            the paper's number of steps); None: on every visit.
        fraction: share of the images that are attacked, drawn by key in each epoch, 0..1; the others have no adversarial branch.
        memory: of ``carry``: a :class:`~ikd_fast.attack.memory.PerturbationMemory`, its arguments, or None for the defaults.
        momentum: mu above. In ``carry`` a velocity is kept with each perturbation, 2 bytes a cell.
        diversity_prob: probability of T per image and step. Default 0.5 (``iterative``, as the paper) or 0 (``single``: T
            buys transfer to other nets, and costs strength on the victim itself).
        diversity_rate: smallest shrink factor of T.
        diversity_per_batch: one draw for the whole batch, as published.
        objective: ``"cls"`` (classification loss of the victim on moved ground truth), ``"feature"`` (relative distance of
            the feature maps), or a callable ``(features, batch) -> [N] or scalar``.
        random_start: start uniform in the ball. Default: only where it is needed (``single``, ``feature``).
        targeted: descend the objective instead (targets then say what the victim shall see).
        value_range, mean, std: what float images are (:class:`~ikd_fast.pixels.PixelUnits`).
        seed: key of every draw; ``None`` draws one from torch's generator at each call.

    Call:
        ``attack(victim, images, targets, image_ids=ids, epoch=e, sizes=None) -> AttackOutput``. ``images``: float
        ``[N, C, H, W]``; ``sizes``: (h, w) before padding (default: each target's ``"size"``, else all of it); padding is
        never perturbed. ``victim``: an object with ``features(images)`` and ``cls_loss(images, targets)``, or a callable
        that is the one the objective needs. The same image in the same epoch gets the same draws in any batch.

    Under float16 autocast the objective is scaled for the gradient, so that small gradients do not become zeros; an image whose
    gradient overflows by that gets further passes with less, which ``gradient_evals`` counts.

    Raises:
        ValueError, TypeError: unknown mode or objective (valid ones listed), sizes out of range, undeclared or wrong pixel
            units, missing ids, an objective that does not depend on the images.

    >>> import torch, torch.nn.functional as F
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).requires_grad_(False)
    >>> attack = OnlineDIFGSM(mode="single", eps=8, value_range=(0, 1))
    >>> victim = lambda x, y: F.cross_entropy(net(x), y, reduction="none")
    >>> out = attack(victim, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), image_ids=[10, 11], epoch=0)
    >>> bool(out.delta.abs().max() <= 8 / 255 + 1e-6), out.gradient_evals
    (True, 1)
    """

    def __init__(
        self,
        mode: str = "single",
        *,
        eps: float = 8.0,
        step_size: float | None = None,
        steps: int | None = None,
        refresh: int | None = None,
        fresh: bool = False,
        fraction: float = 1.0,
        memory: PerturbationMemory | Mapping[str, Any] | None = None,
        momentum: float = 0.0,
        diversity_prob: float | None = None,
        diversity_rate: float = 0.9,
        diversity_per_batch: bool = False,
        objective: str | Callable = "cls",
        random_start: bool | None = None,
        targeted: bool = False,
        value_range: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int | None = 0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        self.mode = mode
        self.eps = _in_range("eps", eps, 0, 255)
        if 0 < self.eps < 0.5:
            warnings.warn(
                f"eps is in 0..255 grey levels, got {eps:g}; 8/255 of a 0..1 image is written eps=8",
                stacklevel=2,
            )
        self.memory = _memory(mode, memory)
        if step_size is None:
            step_size = 2.0 if mode == "iterative" else 2 * self.eps
            if self.memory is not None:
                # A step that the stored levels cannot hold would be rounded away.
                step_size = self.eps if self.memory.bits == 2 else self.eps / 2
                step_size = 2 * self.eps if fresh else step_size
        self.step_size = _in_range("step_size", step_size, 0, 510)
        steps = _DEFAULT_STEPS[mode] if steps is None else steps
        if not (isinstance(steps, int) and steps >= min(1, _DEFAULT_STEPS[mode])):
            raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
        if mode != "iterative" and steps != _DEFAULT_STEPS[mode]:
            raise ValueError(
                f"mode {mode!r} spends {_DEFAULT_STEPS[mode]} gradients, got steps={steps}; write mode='iterative'"
            )
        self.steps = steps
        if refresh is not None and (
            mode != "carry" or isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1
        ):
            raise ValueError(
                f"refresh is a number of visits >= 1, or None, in mode 'carry'; got {refresh!r} in {mode!r}"
            )
        if fresh and mode != "carry":
            raise ValueError(f"fresh is for mode 'carry', got it with mode {mode!r}; leave it out")
        self.refresh, self.fresh = refresh, fresh
        self.fraction = _in_range("fraction", fraction, 0, 1)
        self.momentum = _in_range("momentum", momentum, 0, float("inf"))
        default_prob = 0.5 if mode == "iterative" else 0.0
        self.diversity_prob = _in_range(
            "diversity_prob", default_prob if diversity_prob is None else diversity_prob, 0, 1
        )
        if mode == "carry" and self.diversity_prob:
            raise ValueError(
                f"mode 'carry' takes its gradient from the forward that distils, which input diversity would change: expected "
                f"diversity_prob=0, got {diversity_prob}; write mode='iterative' or 'single' for it"
            )
        self.diversity_rate = _in_range("diversity_rate", diversity_rate, 0, 1)
        if self.diversity_rate == 0:
            raise ValueError("diversity_rate must be above 0: it is the smallest shrink factor, got 0")
        self.diversity_per_batch = diversity_per_batch
        self.objective_name = (
            objective if isinstance(objective, str) else getattr(objective, "__name__", "custom")
        )
        self.objective = resolve_objective(objective)
        self.random_start = (
            (mode in ("single", "carry") or objective == "feature") if random_start is None else random_start
        )
        if objective == "feature" and not self.random_start:
            raise ValueError(
                "objective='feature' has an exactly zero gradient at the clean image, so it needs random_start=True (the "
                "default), got random_start=False"
            )
        if mode == "carry" and not self.random_start:
            raise ValueError(
                "mode='carry' starts an image at random on its first visit: expected random_start=True, got False"
            )
        if self.memory is not None:
            DeltaCodes.of(self.eps, self.step_size, self.memory.bits)  # says which steps the bits can hold
        self.targeted = targeted
        self.units = PixelUnits(value_range=value_range, mean=mean, std=std)
        self._codes: tuple[int, DeltaCodes] | None = None
        self.seed = seed

    def __repr__(self) -> str:
        kept = (
            f"refresh={self.refresh}, fresh={self.fresh}, memory={self.memory!r}, "
            if self.memory is not None
            else ""
        )
        return (
            f"OnlineDIFGSM(mode={self.mode!r}, eps={self.eps:g}, step_size={self.step_size:g}, steps={self.steps}, "
            f"fraction={self.fraction:g}, {kept}momentum={self.momentum:g}, diversity_prob={self.diversity_prob:g}, "
            f"objective={self.objective_name!r}, seed={self.seed})"
        )

    def __call__(
        self,
        victim: Any,
        images: Tensor,
        targets: Any = None,
        *,
        image_ids: Sequence[int | str] | Tensor | None = None,
        epoch: int | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        units: PixelUnits | None = None,
        views: Sequence[View] | None = None,
        clean_maps: Sequence[Tensor] | None = None,
        with_maps: bool = False,
        step: int = 0,
    ) -> AttackOutput:
        seed, ids, epoch = self._keys(images, image_ids, epoch)
        units = self.units if units is None else units
        sizes = _sizes(images, targets, sizes)
        units.check(images)
        views = [View.identity(size) for size in sizes] if views is None else list(views)
        _check_views(views, sizes)
        visit = Visit(images, targets, sizes, views, ids, epoch, seed, clean_maps, step)
        rows = self._drawn(ids, epoch, seed)
        if rows is not None:
            visit, victim = visit.rows(rows), select(victim, rows)
        if not visit.ids:
            return AttackOutput(visit.images, visit.images, rows=rows, maps=None)
        if self.memory is not None:
            codes = self.bind_memory(images.shape[1])
            out = carry(self, self.memory, codes, victim, visit, units, with_maps=with_maps)
        else:
            out = craft(self, victim, visit, units)
            if with_maps:
                with torch.no_grad():
                    out = replace(out, maps=[m.detach() for m in maps_of(victim, out.images)])
        return replace(out, rows=rows)

    @property
    def needs_stable_ids(self) -> bool:
        """Whether an image must be the same one in every epoch."""
        return self.memory is not None

    @property
    def needs_views(self) -> bool:
        """Whether calls want to know where in its canonical image each image lies."""
        return self.memory is not None

    @property
    def reads_clean_maps(self) -> bool:
        """Whether the maps of the clean images, where somebody has them, save a forward."""
        return self.objective is feature_objective and not self.diversity_prob and self.steps > 0

    def bind_memory(self, channels: int, data: str | None = None) -> DeltaCodes:
        """The codes of what this attack keeps; its memory is then for these settings, and for ``data``, alone."""
        if self.memory is None:
            raise ValueError(f"mode {self.mode!r} has no memory; only 'carry' keeps perturbations")
        settings = MemorySettings(
            eps=self.eps, step=self.step_size, momentum=self.momentum, channels=channels, data=data or "",
            objective=self.objective_name,
        )  # fmt: skip
        if self._codes is None or data is not None:
            self._codes = channels, self.memory.bind(settings)
        if self._codes[0] != channels:
            raise ValueError(
                f"the memory of mode 'carry' is for images of {self._codes[0]} channels, got {channels}"
            )
        return self._codes[1]

    def _drawn(self, ids: Sequence[int], epoch: int, seed: int) -> list[int] | None:
        """The images that ``fraction`` takes; None: all."""
        if self.fraction == 1:
            return None
        return [i for i, key in enumerate(ids) if draw(seed, key, epoch, Stream.FRACTION)[0] < self.fraction]

    def _keys(
        self, images: Tensor, image_ids: Sequence[int | str] | Tensor | None, epoch: int | None
    ) -> tuple[int, list[int], int]:
        if not isinstance(images, Tensor) or images.dim() != 4:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be one stacked float tensor [N, C, H, W], got {got}")
        if not images.dtype.is_floating_point:
            raise TypeError(
                f"images must be floating to hold a perturbation, got {images.dtype}; write images.float() and value_range=(0, 255)"
            )
        if self.needs_stable_ids and image_ids is None:
            raise ValueError("mode='carry' keeps a perturbation for each image: expected image_ids, got None")
        if self.seed is None:
            # Nobody can name an image again without a seed, so position in the batch will do.
            ids = list(range(len(images))) if image_ids is None else [stable_id(_host(i)) for i in image_ids]
            return int(torch.randint(2**62, ())), ids, int(epoch or 0)
        if image_ids is None or epoch is None:
            raise ValueError(
                f"image_ids and epoch key the draws and are required with seed={self.seed}, got image_ids={image_ids}, epoch={epoch}; "
                "give both, or seed=None for fresh draws"
            )
        ids = [stable_id(_host(i)) for i in image_ids]
        if len(ids) != len(images):
            raise ValueError(
                f"image_ids must have one entry per image: expected {len(images)}, got {len(ids)}"
            )
        return self.seed, ids, int(epoch)


def _host(value: Any) -> int | str:
    return value if isinstance(value, str) else int(value)


def _memory(mode: str, memory: PerturbationMemory | Mapping[str, Any] | None) -> PerturbationMemory | None:
    if mode != "carry":
        if memory is not None:
            raise ValueError(f"memory is for mode 'carry', got it with mode {mode!r}; leave it out")
        return None
    return build_memory(memory)


def _check_views(views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> None:
    for i, view in enumerate(views):
        if not isinstance(view, View):
            raise TypeError(
                f"views[{i}] must be an ikd_fast.attack.View, got {view!r:.100}; write View.identity((h, w)).flip() and so on"
            )
    if len(views) != len(sizes):
        raise ValueError(f"views must have one entry per image: expected {len(sizes)}, got {len(views)}")
    for i, (view, size) in enumerate(zip(views, sizes, strict=True)):
        if tuple(view.size) != tuple(size):
            raise ValueError(
                f"views[{i}] is of an image of {tuple(view.size)} (h, w), the image has {tuple(size)}"
            )


def _in_range(name: str, value: float, low: float, high: float) -> float:
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise ValueError(f"{name} must be in {low:g}..{high:g}, got {value!r}")
    return float(value)


def _sizes(images: Tensor, targets: Any, sizes: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    height, width = images.shape[-2:]
    if sizes is None:
        dicts = targets if isinstance(targets, (list, tuple)) else [None] * len(images)
        sizes = [t["size"] if isinstance(t, dict) and "size" in t else (height, width) for t in dicts]
    sizes = [(int(h), int(w)) for h, w in sizes]
    if len(sizes) != len(images):
        raise ValueError(
            f"expected one (h, w) and one target per image: {len(images)} images, got {len(sizes)}"
        )
    for i, (h, w) in enumerate(sizes):
        if not (1 <= h <= height and 1 <= w <= width):
            raise ValueError(f"sizes[{i}] must lie within the batch's {height}x{width}, got {h}x{w}")
    return sizes
