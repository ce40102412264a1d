"""The frozen teacher: eval, no gradients for its weights, outside every module tree."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .taps import FeatureTap, as_pyramid

Sizes = Sequence[tuple[int, int]] | None


class FrozenTeacher:
    """A net whose weights never change, made to be asked for features.

    It is not an ``nn.Module``: nothing of it appears in ``parameters()``, ``state_dict()`` or DDP of what holds it, and
    ``copy.deepcopy`` (an EMA of the holder) shares it. The net itself is switched to eval mode and ``requires_grad_(False)``
    in place.

    Args:
        net: the teacher, weights loaded.
        call: ``(net, images) -> anything``; how a forward is run. Default ``net(images)``.
        convert: maps images from the student's pixel units to the teacher's (default: the same).
        grid: (h, w) of token features.

    >>> teacher = FrozenTeacher(nn.Sequential(nn.Conv2d(3, 4, 1)))
    >>> [tuple(m.shape) for m in teacher.features(torch.zeros(1, 3, 5, 5), "0")]
    [(1, 4, 5, 5)]
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        call: Callable[[nn.Module, Tensor], Any] | None = None,
        convert: Callable[[Tensor, Sequence[tuple[int, int]] | None], Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(net).__name__}")
        self.net = net.eval().requires_grad_(False)
        self.call = call or (lambda module, images: module(images))
        self.convert = convert
        self.grid = grid
        self.loaded: LoadedKeys | None = None

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
        return run_tapped(self.net, sources, lambda: self.call(self.net, images), images, self.grid)

    def to(self, *args: Any, **kwargs: Any) -> FrozenTeacher:
        """Move the net, in place."""
        self.net.to(*args, **kwargs)
        return self

    def fingerprint(self) -> str:
        """sha256 over names, shapes and bytes of all weights and buffers."""
        digest = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            data = value.detach().cpu().contiguous()
            digest.update(f"{name}{list(data.shape)}{data.dtype}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict) -> FrozenTeacher:
        return self

    def __repr__(self) -> str:
        return f"FrozenTeacher({type(self.net).__name__}, {sum(p.numel() for p in self.net.parameters()) / 1e6:.1f} M weights)"


def run_tapped(
    net: nn.Module,
    sources: Sequence[Any],
    run: Callable[[], Any],
    images: Tensor,
    grid: tuple[int, int] | None,
) -> list[list[Tensor]]:
    """One ``run()`` with every path source tapped; callable sources ``(net, images)`` run by themselves."""
    from contextlib import ExitStack

    captured: dict[int, list[Tensor]] = {}
    with ExitStack() as stack:
        for i, source in enumerate(sources):
            if not callable(source):
                captured[i] = stack.enter_context(FeatureTap(net, source, grid=grid).capture())
        if captured:
            run()
    return [captured[i] if i in captured else as_pyramid(s(net, images), grid) for i, s in enumerate(sources)]


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
