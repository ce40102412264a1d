"""Feature taps: forward hooks that live only while a forward is being watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Source = str | Sequence[str] | Callable


def resolve_modules(net: nn.Module, source: str | Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Modules named by a path, a list of paths, or a path with ``{i}`` (0, 1, ... while it exists).

    >>> net = nn.ModuleDict({"convs": nn.ModuleList([nn.Identity(), nn.Identity()])})
    >>> [name for name, _ in resolve_modules(net, "convs.{i}")]
    ['convs.0', 'convs.1']
    """
    paths = [source] if isinstance(source, str) else list(source)
    found: list[tuple[str, nn.Module]] = []
    for path in paths:
        if "{i}" not in path:
            found.append((path, _module(net, path)))
            continue
        i = 0
        while (module := _find(net, path.format(i=i))) is not None:
            found.append((path.format(i=i), module))
            i += 1
        if i == 0:
            raise ValueError(_unknown(net, path.format(i=0)))
    return found


def _find(net: nn.Module, path: str) -> nn.Module | None:
    try:
        return net.get_submodule(path)
    except AttributeError:
        return None


def _module(net: nn.Module, path: str) -> nn.Module:
    module = _find(net, path)
    if module is None:
        raise ValueError(_unknown(net, path))
    return module


def _unknown(net: nn.Module, path: str) -> str:
    names = [name for name, _ in net.named_children()]
    return f"features: {type(net).__name__} has no module {path!r}; its children are {names}; deeper ones are written 'child.part'"


class FeatureTap:
    """Captures the pyramid a net produces at ``source`` during one forward.

    One module giving a tuple is a pyramid; one module giving a map each time it is called (a head shared by the levels)
    is a pyramid in call order; several modules give one map each.

    Args:
        net: the module to watch.
        source: module path, list of paths, or a path with ``{i}``.
        grid: (h, w) of token sequences ``[N, L, C]``, which become maps ``[N, C, h, w]``; a square L needs none.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    >>> with FeatureTap(net, "0").capture() as maps:
    ...     _ = net(torch.zeros(1, 3, 5, 5))
    >>> [tuple(m.shape) for m in maps]
    [(1, 4, 5, 5)]
    """

    def __init__(
        self, net: nn.Module, source: str | Sequence[str], *, grid: tuple[int, int] | None = None
    ) -> None:
        self.source = source
        self.grid = grid
        self.modules = resolve_modules(net, source)

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Hooks are removed on leaving, also by an exception; the list is the caller's to drop."""
        maps: list[Tensor] = []
        calls: list[list[Any]] = [[] for _ in self.modules]
        handles = [
            module.register_forward_hook(lambda _m, _i, out, slot=slot: slot.append((out, _versions(out))))
            for (_, module), slot in zip(self.modules, calls, strict=True)
        ]
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()
        maps.extend(self._pyramid(calls))

    def _pyramid(self, calls: list[list[Any]]) -> list[Tensor]:
        for (name, _), outs in zip(self.modules, calls, strict=True):
            if not outs:
                raise RuntimeError(f"features: module {name!r} was not called in this forward")
            if len(self.modules) > 1 and len(outs) != 1:
                raise RuntimeError(
                    f"features: module {name!r} was called {len(outs)} times, expected once per forward"
                )
            if any(_versions(out) != version for out, version in outs):
                raise RuntimeError(
                    f"features: what {name!r} gave was changed in place afterwards (an activation with inplace=True?); tap the module "
                    "that changes it, or set inplace=False"
                )
        return [m for outs in calls for out, _ in outs for m in as_pyramid(out, self.grid)]


def _versions(value: object) -> list[int]:
    """In-place counters of the tensors in a module's output."""
    values = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, (list, tuple))
        else [value]
    )
    return [v._version for v in values if isinstance(v, Tensor) and not v.is_inference()]


def run_tapped(
    net: nn.Module,
    sources: Sequence[Any],
    run: Callable[[], Any],
    images: Tensor,
    grid: tuple[int, int] | None,
) -> list[list[Tensor]]:
    """One ``run()`` with every path source tapped; callable sources ``(net, images)`` run by themselves."""
    captured: dict[int, list[Tensor]] = {}
    with ExitStack() as stack:
        for i, source in enumerate(sources):
            if not callable(source):
                captured[i] = stack.enter_context(FeatureTap(net, source, grid=grid).capture())
        if captured:
            run()
    return [captured[i] if i in captured else as_pyramid(s(net, images), grid) for i, s in enumerate(sources)]


def as_pyramid(value: object, grid: tuple[int, int] | None = None) -> list[Tensor]:
    """A map, a sequence or a dict of maps as a list of ``[N, C, H, W]``."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Tensor):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Tensor) for v in value):
        raise TypeError(f"features must be maps [N, C, H, W] or tokens [N, L, C], got {_describe(value)}")
    return [tokens_to_map(v, grid) if v.dim() == 3 else _four(v) for v in value]


def tokens_to_map(tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """``[N, L, C]`` to ``[N, C, h, w]``; without ``grid`` L must be a square number.

    >>> import torch
    >>> tuple(tokens_to_map(torch.zeros(2, 12, 8), (3, 4)).shape)
    (2, 8, 3, 4)
    """
    n, length, channels = tokens.shape
    h, w = grid or (math.isqrt(length),) * 2
    if h * w != length:
        raise ValueError(
            f"tokens [N, L, C] with L={length} do not fill a {h}x{w} grid; give token_grid=(h, w) with h*w={length}"
        )
    return tokens.transpose(1, 2).reshape(n, channels, h, w)


def _four(value: Tensor) -> Tensor:
    if value.dim() != 4:
        raise TypeError(
            f"features must be maps [N, C, H, W] or tokens [N, L, C], got shape {list(value.shape)}"
        )
    return value


def _describe(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {sorted({type(v).__name__ for v in value})}"
    return type(value).__name__
