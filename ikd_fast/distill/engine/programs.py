"""A forward with its taps as one function of the images, which can be compiled or captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..taps import as_pyramid, resolve_modules
from .copies import shared_copy

Program = Callable[[Tensor], list[list[Tensor]]]


class TappedNet(nn.Module):
    """``images -> a pyramid per source``, by hooks that stay, on a copy of the net that shares its tensors.

    What :class:`~ikd_fast.distill.FeatureTap` finds wrong with a tap it says in the eager forward that every shape has first.
    """

    def __init__(
        self,
        net: nn.Module,
        sources: Sequence[Any],
        call: Callable[[nn.Module, Tensor], Any],
        grid: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.net = shared_copy(net)
        self.call, self.grid, self.sources = call, grid, list(sources)
        self.slots: list[list[list[Any]]] = []
        for source in self.sources:
            modules = [] if callable(source) else [m for _, m in resolve_modules(self.net, source)]
            self.slots.append([self._slot(module) for module in modules])

    @staticmethod
    def _slot(module: nn.Module) -> list[Any]:
        found: list[Any] = []
        module.register_forward_hook(lambda _module, _inputs, out: found.append(out))
        return found

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        if any(self.slots):
            self.call(self.net, images)
        pyramids = []
        for source, slots in zip(self.sources, self.slots, strict=True):
            if callable(source):
                pyramids.append(as_pyramid(source(self.net, images), self.grid))
            else:
                pyramids.append([m for outs in slots for out in outs for m in as_pyramid(out, self.grid)])
        for slots in self.slots:
            for outs in slots:
                outs.clear()
        return pyramids


def compiled(program: TappedNet, backend: Any, shapes: int) -> Program:
    """``program`` compiled for every shape it meets, each by itself.

    Torch stops after 8 variants of one code object: here that is the program's own, so that no other teacher uses them up, and
    may have ``shapes`` shapes with and without gradient, inside autocast and outside.
    """
    forward = TappedNet.forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__, "forward")
    run = torch.compile(
        MethodType(own, program), dynamic=False, backend="inductor" if backend is True else backend
    )
    limits = {"recompile_limit": max(8, 4 * shapes), "accumulated_recompile_limit": 1 << 20}
    met: set[tuple[Any, ...]] = set()

    def limited(images: Tensor) -> list[list[Tensor]]:
        kind = images.device.type
        variant = (tuple(images.shape), torch.is_grad_enabled(), torch.is_autocast_enabled(kind))
        if variant in met:  # setting a limit costs more than a small net
            return run(images)
        from torch._dynamo import config

        met.add(variant)
        with config.patch(limits):
            return run(images)

    return limited


class GraphedProgram:
    """``program`` without gradient as a CUDA graph of one shape, replayed on a buffer of its own.

    Args:
        pool: of ``torch.cuda.graph_pool_handle()``. Graphs may share one since what a replay gives is copied out before another.
    """

    WARM_UP = 3

    def __init__(self, program: Program, images: Tensor, pool: Any) -> None:
        self.images = images.detach().clone(memory_format=torch.preserve_format)
        try:
            with torch.no_grad(), torch.cuda.device(images.device):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):  # libraries choose and allocate before the capture
                    for _ in range(self.WARM_UP):
                        program(self.images)
                torch.cuda.current_stream().wait_stream(side)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, pool=pool):
                    self.maps = program(self.images)
        except Exception as error:
            raise RuntimeError(
                f"teacher engine: cuda_graphs=True, but the forward on {tuple(images.shape)} cannot be captured ({error}); it waits for "
                "the device or allocates on the host somewhere. Write cuda_graphs=False"
            ) from error

    def __call__(self, images: Tensor) -> list[list[Tensor]]:
        """Copies of the maps: the graph's own are overwritten by its next replay."""
        self.images.copy_(images)
        self.graph.replay()
        return [[m.clone() for m in maps] for maps in self.maps]
