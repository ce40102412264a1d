"""What is different while a teacher is attacked: it is alone in its process group, and its draws are keyed.

Every context here restores on leaving, by an exception too, what it found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from ikd_fast.generators import keyed_generators
from ikd_fast.kernels.reference.philox import Stream

from mmdet.models.task_modules.samplers import BaseSampler, MaskPseudoSampler, PseudoSampler

COLLECTIVES = (
    "all_reduce all_gather all_gather_into_tensor all_gather_object all_to_all all_to_all_single barrier broadcast "
    "broadcast_object_list gather gather_object irecv isend monitored_barrier recv reduce reduce_scatter "
    "reduce_scatter_tensor scatter scatter_object_list send"
).split()
_SLOTS = 256
_alone: set[int] = set()  # threads inside `alone`
_lock = threading.Lock()
_patched = ExitStack()  # torch.distributed, changed while a thread is inside


@dataclass(frozen=True)
class DrawKey:
    """What decides a draw inside the victim: the image, and where training and attack are."""

    seed: int = 0
    epoch: int = 0
    image_id: int = 0
    step: int = 0

    def generators(self, slot: int, device: torch.device) -> AbstractContextManager[None]:
        """The global generators for one use: slot 0 is the image's own, the others are its samplers'."""
        index = self.step * _SLOTS + slot % _SLOTS
        return keyed_generators(
            self.seed, self.image_id, self.epoch, stream=Stream.VICTIM, index=index, device=device
        )


@contextmanager
def overridden(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of an object or module have other values; what the object itself did not have is removed again."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextmanager
def without_child(module: nn.Module, name: str) -> Iterator[None]:
    """A child module, where there is one, reads as None."""
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        yield
        return
    setattr(module, name, None)
    try:
        yield
    finally:
        setattr(module, name, child)


@contextmanager
def alone() -> Iterator[None]:
    """For this thread no process group exists, so losses normalise by local counts and no rank waits for another.

    mmdet's ``reduce_mean``, mmengine's ``dist`` and well-behaved heads ask before they communicate. One that does not ask
    gets an error instead of a call that hangs ranks which skip this attack.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    # A thread that is inside already has left above: for it there is no process group.
    thread = threading.get_ident()
    with _lock:
        if not _alone:
            _patched.enter_context(_answers_by_thread())
        _alone.add(thread)
    try:
        yield
    finally:
        with _lock:
            _alone.remove(thread)
            if not _alone:
                _patched.close()


def _answers_by_thread() -> AbstractContextManager[None]:
    """torch.distributed answers threads inside :func:`alone` by itself, and all others as ever."""

    def here(original: Callable, substitute: Callable) -> Callable:
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (substitute if threading.get_ident() in _alone else original)(*args, **kwargs)

        return choose

    answers: dict[str, Callable] = {
        "is_initialized": lambda *_, **__: False,
        "get_world_size": lambda *_, **__: 1,
        "get_rank": lambda *_, **__: 0,
    }
    answers |= {name: _refuse(name) for name in COLLECTIVES if hasattr(dist, name)}
    return overridden(dist, **{name: here(getattr(dist, name), answer) for name, answer in answers.items()})


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"the teacher's loss called torch.distributed.{name} during an attack, where ranks do not wait for each other; guard "
            "it with torch.distributed.is_initialized(), which is False there, or use objective='feature'"
        )

    return refuse


def random_samplers(detector: nn.Module) -> list[BaseSampler]:
    """Samplers of the detector's heads that choose among boxes, in the order of its modules."""
    found: list[BaseSampler] = []
    for name, part in detector.named_children():
        if name in ("backbone", "neck"):
            continue
        for module in part.modules():
            for value in vars(module).values():
                for one in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(one, BaseSampler) and not isinstance(
                        one, (PseudoSampler, MaskPseudoSampler)
                    ):
                        found.append(one)
    return found


@contextmanager
def keyed_draws(samplers: list[BaseSampler], key: DrawKey, device: torch.device) -> Iterator[None]:
    """One image's draws: each sampler has generators of its own key, whatever else was drawn before it.

    The global generators are afterwards as they were.
    """

    def keyed(sampler: BaseSampler, slot: int) -> Callable:
        sample = sampler.sample

        def drawn(*args: Any, **kwargs: Any) -> Any:
            with key.generators(slot, device):
                return sample(*args, **kwargs)

        return drawn

    with key.generators(0, device), ExitStack() as stack:
        for slot, sampler in enumerate(samplers, start=1):
            stack.enter_context(overridden(sampler, sample=keyed(sampler, slot)))
        yield
