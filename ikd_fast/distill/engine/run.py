"""The net as an engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..taps import resolve_modules, run_tapped
from .check import EngineCheck, Pyramids, compare, require
from .copies import cast_layers, fold, lay_out, shared_copy
from .options import TeacherEngine
from .pairs import Pair, consecutive_pairs
from .shapes import Shapes

Call = Callable[[nn.Module, Tensor], Any]
PROBE = 128  # pixels a side of the images that pairs are looked for with


class EngineRun:
    """A net under :class:`TeacherEngine`; made again when the net has moved or its weights have changed.

    Args:
        net: as given; it is read and never changed.
        call: a forward for features.
        trace: the forward that pairs are looked for in: it should run every part that features and losses run.
    """

    def __init__(
        self, net: nn.Module, options: TeacherEngine, call: Call, trace: Call, grid: tuple[int, int] | None
    ) -> None:
        self.original, self.asked, self.call, self.trace, self.grid = net, options, call, trace, grid
        self.checks: list[EngineCheck] = []
        self.unfolded: set[str] = set()  # convolutions that are tapped
        self.eager = False  # no programs for now
        self._net: nn.Module | None = None
        self._made_of: Any = None
        self._tensors: list[Tensor] = []

    @property
    def options(self) -> TeacherEngine:
        """As they are on the net's device."""
        return self.asked.on(next(self.original.parameters()).device)

    def net(self) -> nn.Module:
        """The copy that runs, in eval."""
        stamp = self._stamp()
        if self._net is None or stamp != self._made_of:
            self._tensors = []  # buffers are other tensors after a move
            self._made_of = self._stamp()
            self.pairs = self._pairs() if self.options.fold_bn else []
            self._make()
        assert self._net is not None
        return self._net.eval()

    def _stamp(self) -> tuple[Any, ...]:
        """Changes when weights are written, replaced, moved or cast; reading it costs a tenth of a millisecond."""
        first = next(self.original.parameters())
        if not self._tensors or self._tensors[0] is not first:
            self._tensors = [*self.original.parameters(), *self.original.buffers()]
        return id(first), first.device, first.dtype, sum(t._version for t in self._tensors)

    def _pairs(self) -> list[Pair]:
        net = shared_copy(self.original).eval()
        first = next((p for p in net.parameters() if p.dim() == 4), None)
        if first is None:
            return []
        shape = (1, first.shape[1], PROBE, PROBE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first)
        try:
            return consecutive_pairs(net, lambda: self.trace(net, noise))
        except Exception as error:
            raise RuntimeError(
                f"teacher engine: fold_bn looks for norms in a forward on {shape} noise, which {type(net).__name__} did not take "
                f"({type(error).__name__}: {error}); write trace=(net, images) -> ..., a forward that takes it, or fold_bn=False"
            ) from error

    def _make(self) -> None:
        self._net = prepared(self.original, self.options, self.folded)
        self.shapes = Shapes(self.options, self.call, self.grid)
        self._checked: set[Any] = set()
        self._known_taps: set[Any] = set()

    @property
    def folded(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.conv not in self.unfolded]

    def pyramids(self, images: Tensor, sources: Sequence[Any]) -> list[list[Tensor]]:
        """A pyramid per source, in float32 ``[N, C, H, W]`` unless ``outputs="native"``; gradients flow where they are on."""
        net = self.net()
        net = self._leave_tapped(net, sources)
        with self.entered(images) as x:
            program = None if self.eager else self.shapes.program(net, x, sources)
            run = program or (lambda y: self._eager(net, y, sources))
            maps = run(x)
            self._check(images, sources, run, "program" if program else "eager")
        return [[self._left(m) for m in pyramid] for pyramid in maps]

    def _eager(self, net: nn.Module, images: Tensor, sources: Sequence[Any]) -> list[list[Tensor]]:
        return run_tapped(net, sources, lambda: self.call(net, images), images, self.grid)

    @contextmanager
    def entered(self, images: Tensor) -> Iterator[Tensor]:
        """The images as the net takes them, under its precision."""
        options, kind = self.options, images.device.type
        dtype = options.torch_dtype
        x = images if dtype is None else images.to(dtype)
        if options.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if dtype is None:
            precision: Any = nullcontext()
        else:
            # Nothing to cache: weights that autocast would cast have its dtype. A CUDA graph must not meet a cache.
            precision = torch.autocast(
                kind, dtype=dtype if options.half else None, enabled=options.half, cache_enabled=False
            )
        with precision:
            yield x

    def outputs(self, value: Any) -> Any:
        """What a forward gave, in the type that ``outputs`` names."""
        return tree_map(lambda v: self._left(v) if isinstance(v, Tensor) else v, value)

    def _left(self, value: Tensor) -> Tensor:
        if (
            self.options.outputs == "float32"
            and value.dtype in (torch.bfloat16, torch.float16)
            and self.options.half
        ):
            value = value.float()
        return value.contiguous() if self.options.channels_last else value

    def _leave_tapped(self, net: nn.Module, sources: Sequence[Any]) -> nn.Module:
        """A convolution that is tapped gives its own values, not normalised ones."""
        key = tuple(_key(s) for s in sources)
        if not self.folded or key in self._known_taps:
            return net
        self._known_taps.add(key)
        tapped = {m for s in sources if not callable(s) for _, m in resolve_modules(net, s)}
        seen = {p.conv for p in self.folded if any(net.get_submodule(n) in tapped for n in p.seen_by)}
        if not seen:
            return net
        self.unfolded |= seen
        self._make()
        return self.net()

    @torch.no_grad()
    def _check(self, images: Tensor, sources: Sequence[Any], run: Any, kind: str) -> None:
        """Once for every source and way of running: the first image, or the batch that a program is made for."""
        places = {_key(source): i for i, source in enumerate(sources)}
        keys = {(kind, key) for key in places}
        if self.eager or keys <= self._checked:  # whoever watches an eager forward wants to see one
            return
        self._checked |= keys
        unique = [sources[i] for i in places.values()]
        probe = images.detach() if kind == "program" else images[:1].detach()
        with _no_autocast(images.device.type):
            plain = probe.to(next(self.original.parameters()).dtype)
            truth = self._eager(self.original.eval(), plain, unique)
            with self.entered(probe) as x:
                maps = run(x)
            found = [maps[i] for i in places.values()]
            options, names = self.options, tuple(_name(s) for s in unique)
            bound = options.bound(truth[0][0].dtype, images.device)
            check = EngineCheck(names, compare(found, truth), bound, self.describe())
            self.checks.append(check)
            require(check, options, lambda other: compare(self._with(other, probe, unique), truth))
        if options.report is not None:
            options.report(str(check))

    def _with(self, options: TeacherEngine, images: Tensor, sources: Sequence[Any]) -> Pyramids:
        """The maps under other options, eagerly; a program stays one unless it is what was switched off."""
        other = EngineRun(self.original, options, self.call, self.trace, self.grid)
        other._made_of, other.pairs, other.unfolded = (
            other._stamp(),
            self.pairs if options.fold_bn else [],
            self.unfolded,
        )
        other._make()
        net = other.net()
        with other.entered(images) as x:
            return other._eager(net, x, sources)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled makes its copy and programs again."""
        made = ("shapes", "pairs", "_checked", "_known_taps")
        kept = {k: v for k, v in vars(self).items() if k not in made}
        return kept | {"_net": None, "_made_of": None, "_tensors": []}

    def describe(self) -> str:
        """The options that are on, and how many norms are folded."""
        text = str(self.options)
        norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.original.modules())
        return text.replace("fold_bn", f"fold_bn {len(self.folded)} of {norms}") if norms else text


def _no_autocast(kind: str) -> Any:
    """Entering where there is none to leave would be another state to compile for."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def prepared(net: nn.Module, options: TeacherEngine, pairs: Sequence[Pair]) -> nn.Module:
    """The copy of ``net`` that ``options`` ask for."""
    dtype = options.torch_dtype
    own = next(net.parameters()).dtype
    wide = dtype is not None and own not in (torch.float32, dtype)
    copied = shared_copy(net)
    if wide:
        for module in copied.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and p.is_floating_point():
                    module._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=False)
            for name, b in list(module._buffers.items()):
                if b is not None and b.is_floating_point():
                    module._buffers[name] = b.float()
    fold(copied, pairs)
    if dtype is not None and options.half:
        cast_layers(copied, dtype)
    if options.channels_last:
        lay_out(copied)
    return copied.eval()


def _key(source: Any) -> Any:
    """A callable written anew for every step is the same one."""
    if callable(source):
        return getattr(source, "__code__", source)
    return source if isinstance(source, str) else tuple(source)


def _name(source: Any) -> str:
    if callable(source):
        return getattr(source, "__qualname__", type(source).__name__)
    return source if isinstance(source, str) else "[" + ", ".join(source) + "]"
