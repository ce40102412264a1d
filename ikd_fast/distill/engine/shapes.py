"""Which shapes are compiled or captured, and their programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .options import TeacherEngine
from .programs import GraphedProgram, Program, TappedNet, compiled


class Shapes:
    """Programs by shape, for one state of a net.

    A shape that comes for the first time runs as it is: a probe, or a rare size of multi-scale training, costs no compilation.
    """

    def __init__(
        self,
        options: TeacherEngine,
        call: Callable[[nn.Module, Tensor], Any],
        grid: tuple[int, int] | None,
    ) -> None:
        self.options, self.call, self.grid = options, call, grid
        self.met: set[tuple[int, ...]] = set()
        self.chosen: set[tuple[int, ...]] = set()
        self.compiled: dict[Any, Program] = {}
        self.graphs: dict[Any, GraphedProgram] = {}
        self.pool: Any = None
        self.full = False

    def program(self, net: nn.Module, images: Tensor, sources: Sequence[Any]) -> Program | None:
        """How to run these images, or None: as they are."""
        options = self.options
        if not (options.compile or options.cuda_graphs) or not self._again(images):
            return None
        key = tuple(s if callable(s) or isinstance(s, str) else tuple(s) for s in sources)
        if options.compile and key not in self.compiled:
            tapped = TappedNet(net, sources, self.call, self.grid).eval()
            self.compiled[key] = compiled(tapped, options.compile, options.max_shapes)
        if not options.cuda_graphs or torch.is_grad_enabled():
            return self.compiled.get(key)
        if images.device.type != "cuda":
            raise RuntimeError(
                f"teacher engine: cuda_graphs=True needs images on a CUDA device, got {images.device}; move the teacher and its images, "
                "teacher.to('cuda'), or write cuda_graphs=False"
            )
        shape = (key, tuple(images.shape), images.dtype)
        if shape not in self.graphs:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            run = self.compiled.get(key) or TappedNet(net, sources, self.call, self.grid).eval()
            self.graphs[shape] = GraphedProgram(run, images, self.pool)
        return self.graphs[shape]

    def _again(self, images: Tensor) -> bool:
        shape = tuple(images.shape)
        if shape in self.chosen:
            return True
        if shape not in self.met:
            self.met.add(shape)
            return False
        if len(self.chosen) < self.options.max_shapes:
            self.chosen.add(shape)
            return True
        if not self.full:
            self.full = True
            warnings.warn(
                f"teacher engine: {self.options.max_shapes} shapes are compiled or captured, {shape} and further ones run without; raise "
                "max_shapes, or let images come in fewer padded shapes (a larger pad_size_divisor)",
                stacklevel=2,
            )
        return False
