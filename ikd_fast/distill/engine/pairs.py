"""Convolutions whose only reader is a batch norm, found by watching a forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Pair:
    """A convolution and the norm that follows it, by module path.

    Attributes:
        seen_by: modules whose output is the convolution's own: a tap of one of them wants it unfolded.
    """

    conv: str
    norm: str
    seen_by: frozenset[str]


@dataclass
class _Seen:
    """What became of one convolution's outputs."""

    calls: int = 0
    norms: list[nn.Module] = field(default_factory=list)
    seen_by: set[str] = field(default_factory=set)
    foreign: bool = False


def plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module does what torch's own of ``kinds`` does: no forward, hook or parametrisation of its own."""
    own = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    hooked = bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    return own and not hooked and "forward" not in vars(module) and not parametrize.is_parametrized(module)


def consecutive_pairs(net: nn.Module, run: Callable[[], Any]) -> list[Pair]:
    """Pairs that a fold leaves the same net of, for all that ``run()`` computes with it.

    The norm is in eval with running statistics, it reads nothing but outputs of this convolution, and no other operation, no
    output of ``run()`` and no other norm reads those. What ``run()`` does not reach is in no pair.
    """
    convs = {m: name for name, m in net.named_modules() if plain(m, CONVOLUTIONS)}
    norms = {m: name for name, m in net.named_modules() if plain(m, NORMS) and _fixed(m)}
    watch = _Watch(net, convs, norms)
    with torch.no_grad(), watch.hooked(), watch:
        result = run()
    for leaf in tree_leaves(result):
        if (origin := watch.origin(leaf)) is not None:
            watch.seen[origin].foreign = True
    readers = Counter(norm for seen in watch.seen.values() for norm in set(seen.norms))
    found = []
    for conv, seen in watch.seen.items():
        if seen.foreign or len(seen.norms) != seen.calls or len(set(seen.norms)) != 1:
            continue
        norm = seen.norms[0]
        if readers[norm] == 1 and norm not in watch.mixed:
            found.append(Pair(convs[conv], norms[norm], frozenset(seen.seen_by)))
    return found


def _fixed(norm: nn.Module) -> bool:
    return not norm.training and getattr(norm, "running_mean", None) is not None


class _Watch(TorchDispatchMode):
    """Follows the memory of every convolution's output: who reads it, and which modules hand it on."""

    def __init__(self, net: nn.Module, convs: dict[nn.Module, str], norms: dict[nn.Module, str]) -> None:
        super().__init__()
        self.net, self.convs, self.norms = net, convs, norms
        self.seen: dict[nn.Module, _Seen] = {}
        self.mixed: set[nn.Module] = set()  # norms that read something else too
        self.reading: nn.Module | None = None
        # A weak reference keeps an address from being given to another tensor, not the memory from being freed.
        self.made: dict[int, tuple[StorageWeakRef, nn.Module, tuple[Any, ...]]] = {}

    def origin(self, value: Any) -> nn.Module | None:
        """The convolution whose output this tensor lies in."""
        if not isinstance(value, Tensor):
            return None
        entry = self.made.get(value.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.reading is None:
            for leaf in tree_leaves((args, kwargs)):
                if (conv := self.origin(leaf)) is not None:
                    self.seen[conv].foreign = True
        return func(*args, **(kwargs or {}))

    def hooked(self) -> ExitStack:
        stack = ExitStack()
        for name, module in self.net.named_modules():
            if module in self.norms:
                stack.enter_context(module.register_forward_pre_hook(self._before_norm))
            stack.enter_context(module.register_forward_hook(self._named(name)))
        return stack

    def _before_norm(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        conv = self.origin(x)
        if conv is None:
            self.mixed.add(norm)
            return
        if self.made[x.untyped_storage()._cdata][2] != _view(x):
            self.seen[conv].foreign = True  # a part of it, or another shape
        self.seen[conv].norms.append(norm)
        self.reading = norm

    def _named(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, _: Any, out: Any) -> None:
            if module is self.reading:
                self.reading = None
            if module in self.convs:
                seen = self.seen.setdefault(module, _Seen())
                seen.calls += 1
                storage = out.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), module, _view(out))
            for leaf in tree_leaves(out):
                if (conv := self.origin(leaf)) is not None:
                    self.seen[conv].seen_by.add(name)

        return after


def _view(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset()
