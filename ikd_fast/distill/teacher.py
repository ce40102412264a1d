"""The frozen teacher: eval, no gradients for its weights, outside every module tree."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .engine import EngineCheck, EngineRun, TeacherEngine
from .taps import run_tapped

Sizes = Sequence[tuple[int, int]] | None


class FrozenTeacher:
    """A net whose weights never change, made to be asked for features.

    It is not an ``nn.Module``: nothing of it appears in ``parameters()``, ``state_dict()`` or DDP of what holds it, and
    ``copy.deepcopy`` (an EMA of the holder) shares it. The net itself is switched to eval mode and ``requires_grad_(False)``
    in place, and never changed otherwise: what an ``engine`` changes it changes in a copy that shares the rest.

    Args:
        net: the teacher, weights loaded.
        call: ``(net, images) -> anything``; how a forward is run. Default ``net(images)``.
        convert: maps images from the student's pixel units to the teacher's (default: the same).
        grid: (h, w) of token features.
        engine: how forwards are run, ``TeacherEngine(...)`` or ``dict(fold_bn=True, dtype="bfloat16", ...)``; None: the net as it
            is. The first forward of every set of sources is compared with the net's own, in the net's dtype.
        trace: ``(net, images) -> anything``: the forward in which the engine looks for norms to fold; it should run what features
            and class loss run. Default ``call``.

    A class loss goes through the engine too where it asks the teacher, ``victim=lambda x, y: F.cross_entropy(teacher(x), y)``.

    >>> teacher = FrozenTeacher(nn.Sequential(nn.Conv2d(3, 4, 1)))
    >>> [tuple(m.shape) for m in teacher.features(torch.zeros(1, 3, 5, 5), "0")]
    [(1, 4, 5, 5)]
    >>> folded = FrozenTeacher(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), engine=dict(fold_bn=True, report=None))
    >>> [tuple(m.shape) for m in folded.features(torch.rand(1, 3, 5, 5), "1")], folded.running
    ([(1, 4, 5, 5)], Sequential(
      (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
      (1): Identity()
    ))
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        call: Callable[[nn.Module, Tensor], Any] | None = None,
        convert: Callable[[Tensor, Sequence[tuple[int, int]] | None], Tensor] | None = None,
        grid: tuple[int, int] | None = None,
        engine: TeacherEngine | Mapping[str, Any] | None = None,
        trace: Callable[[nn.Module, Tensor], Any] | None = None,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(net).__name__}")
        self.net = net.eval().requires_grad_(False)
        self.call = call or (lambda module, images: module(images))
        self.convert = convert
        self.grid = grid
        self.loaded: LoadedKeys | None = None
        self.engine = TeacherEngine.of(engine)
        self._run = (
            None
            if self.engine is None
            else EngineRun(self.net, self.engine, self.call, trace or self.call, grid)
        )

    @classmethod
    def from_checkpoint(
        cls, net: nn.Module, checkpoint: Any, *, allow_random: bool = False, **kwargs: Any
    ) -> FrozenTeacher:
        """Load ``checkpoint`` (a path, or a mapping of weights) into ``net``; every key must match.

        Raises:
            ValueError: missing or unexpected keys or other shapes, all listed. A teacher with silently random weights is the
                commonest fault of detector distillation; ``allow_random=True`` accepts *missing* weights (for tests).
        """
        loaded = load_strict(net, checkpoint, allow_missing=allow_random)
        teacher = cls(net, **kwargs)
        teacher.loaded = loaded
        return teacher

    def features(
        self, images: Tensor, source: str | Sequence[str] | Callable, sizes: Sizes = None
    ) -> list[Tensor]:
        """One forward without a graph; the pyramid at ``source``."""
        return self.pyramids(images, [source], sizes)[0]

    @torch.no_grad()
    def pyramids(self, images: Tensor, sources: Sequence[Any], sizes: Sizes = None) -> list[list[Tensor]]:
        """One forward without a graph; a pyramid per source."""
        return self.watch(images, sources, sizes)

    def watch(self, images: Tensor, sources: Sequence[Any], sizes: Sizes = None) -> list[list[Tensor]]:
        """As :meth:`pyramids`, keeping the graph to ``images`` (the attack's way in)."""
        self.net.eval()
        if self.convert is not None:
            images = self.convert(images, sizes)
        if self._run is not None:
            return self._run.pyramids(images, sources)
        return run_tapped(self.net, sources, lambda: self.call(self.net, images), images, self.grid)

    @property
    def running(self) -> nn.Module:
        """The net that forwards run: ``net``, or the engine's copy of it. It is made again when ``net`` moves or is loaded."""
        return self.net if self._run is None else self._run.net()

    @contextmanager
    def entered(self, images: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """``running`` and ``images`` (in the teacher's units) as it takes them, within its precision; graphs are kept.

        >>> teacher = FrozenTeacher(nn.Conv2d(3, 4, 1), engine=dict(dtype="bfloat16", report=None))
        >>> with teacher.entered(torch.zeros(1, 3, 5, 5)) as (net, images):
        ...     net(images).dtype
        torch.bfloat16
        """
        if self._run is None:
            yield self.net.eval(), images
            return
        net = self._run.net()
        with self._run.entered(images) as x:
            yield net, x

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Forwards run module by module on ``running``, as hooks and overridden methods need it, whatever is compiled."""
        if self._run is None:
            yield
            return
        before, self._run.eager = self._run.eager, True
        try:
            yield
        finally:
            self._run.eager = before

    def outputs(self, value: Any) -> Any:
        """Tensors that a forward within :meth:`entered` gave, as :meth:`watch` gives them."""
        return value if self._run is None else self._run.outputs(value)

    def __call__(self, images: Tensor) -> Any:
        """What ``call`` gives for images in the teacher's units, with the graph to them; half precision comes back as float32."""
        with self.entered(images) as (net, x):
            out = self.call(net, x)
        return self.outputs(out)

    @property
    def gradients_in_half(self) -> bool:
        """Whether gradients to the images pass through float16, and so want to be scaled."""
        return self.engine is not None and self.engine.torch_dtype == torch.float16

    @property
    def checks(self) -> list[EngineCheck]:
        """The engine's self-checks so far."""
        return [] if self._run is None else list(self._run.checks)

    def to(self, *args: Any, **kwargs: Any) -> FrozenTeacher:
        """Move the net, in place."""
        self.net.to(*args, **kwargs)
        return self

    def fingerprint(self) -> str:
        """sha256 over names, shapes and bytes of all weights and buffers, as given: no engine changes it."""
        digest = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            data = value.detach().cpu().contiguous()
            digest.update(f"{name}{list(data.shape)}{data.dtype}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict) -> FrozenTeacher:
        return self

    def __repr__(self) -> str:
        engine = "" if self._run is None else f", engine: {self._run.options}"
        weights = sum(p.numel() for p in self.net.parameters()) / 1e6
        return f"FrozenTeacher({type(self.net).__name__}, {weights:.1f} M weights{engine})"


class LoadedKeys(NamedTuple):
    """How many of a net's weights and buffers came from a checkpoint, from which, and what it calls its classes, if it says."""

    loaded: int
    total: int
    origin: str
    classes: tuple[str, ...] | None = None


def load_strict(net: nn.Module, checkpoint: Any, *, allow_missing: bool = False) -> LoadedKeys:
    """Load all weights of ``checkpoint`` into ``net``, or raise with the keys that do not fit."""
    weights = (
        weights_of(checkpoint, "the checkpoint")
        if isinstance(checkpoint, Mapping)
        else read_weights(checkpoint)
    )
    own = net.state_dict()
    ignored = {k for k in own if k.endswith("num_batches_tracked")}
    missing = sorted(k for k in own if k not in weights and k not in ignored)
    unexpected = sorted(k for k in weights if k not in own and not k.endswith("num_batches_tracked"))
    shapes = sorted(
        f"{k} (checkpoint {list(weights[k].shape)}, model {list(own[k].shape)})"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    )
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:12])}{', ...' if len(keys) > 12 else ''}"
        for what, keys in (
            ("missing in the checkpoint", [] if allow_missing else missing),
            ("unexpected in the checkpoint", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit {type(net).__name__} ({len(own)} keys): {'; '.join(problems)}. "
            "Check that config and checkpoint belong together"
        )
    fitting = {k: v for k, v in weights.items() if k in own}
    net.load_state_dict(fitting, strict=False)
    origin = "given weights" if isinstance(checkpoint, Mapping) else str(checkpoint)
    return LoadedKeys(len(fitting), len(fitting) + len(missing), origin)


def read_weights(path: Any) -> dict[str, Tensor]:
    """Weights of a ``.pth`` (plain, or under ``state_dict`` or ``model``) or ``.safetensors`` file, on the CPU in float32 for
    half types."""
    return weights_of(read_file(path), str(path))


def read_file(path: Any) -> Any:
    """All that a ``.pth`` or ``.safetensors`` file holds, on the CPU.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no checkpoint.
    """
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"teacher checkpoint not found: {path}") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: expected a .pth of torch.save (weights only) or a .safetensors file; "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def weights_of(weights: Any, name: str) -> dict[str, Tensor]:
    """The name-to-tensor part of what a checkpoint holds."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{name} must hold a dict of weights, or one under 'state_dict' or 'model'; got {type(weights).__name__}"
        )
    for key in ("state_dict", "model"):
        if isinstance(weights.get(key), Mapping):
            weights = weights[key]
    return {
        k.removeprefix("module."): v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
        for k, v in weights.items()
        if isinstance(v, Tensor)
    }
