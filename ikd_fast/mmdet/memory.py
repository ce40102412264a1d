"""The attack's memory in a Runner: which image is canonical, what it will take, whose data it is for."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ikd_fast.attack.memory import Forecast, MemorySettings, PerturbationMemory
from ikd_fast.attack.memory.forecast import human
from ikd_fast.attack.memory.shards import SharedStore

from mmcv.image import rescale_size
from mmengine.logging import print_log

from .memory_files import join, room, settle, store_of, together, troubles
from .pipeline_checks import fixed_resize, leaves
from .sampler import keyed_sampler
from .samples import image_key


@dataclass
class Census:
    """What a data set says of its images without loading them.

    Attributes:
        sizes: canonical (H, W) of each image, by resolution; ``"network"`` only where one fixed Resize makes it.
        unknown: images whose annotation gives no width and height.
        fingerprint: number of images and a hash of their keys and sizes, in any order of the data set's.
        why_original: why ``"network"`` is not possible; empty where it is.
    """

    sizes: dict[str, list[tuple[int, int]]]
    unknown: int
    fingerprint: str
    why_original: str = ""
    rules: list[str] = field(default_factory=list)


def census(dataset: Any) -> Census:
    """Of every image below a data set, each once, however often a wrapper repeats it."""
    original: list[tuple[int, int]] = []
    network: list[tuple[int, int]] = []
    unknown, why, rules = 0, "", []
    keys: list[tuple[int, tuple[int, int]]] = []
    for leaf, transforms in leaves(dataset, "train_dataloader.dataset"):
        rule, reason = fixed_resize(transforms)
        why = why or reason
        if rule is not None:
            rules.append(f"{rule.scale or rule.scale_factor}{' keep_ratio' if rule.keep_ratio else ''}")
        for info in _infos(leaf):
            size = (int(info.get("height") or 0), int(info.get("width") or 0))
            keys.append((image_key(info), size))
            if min(size) < 1:
                unknown += 1
                continue
            original.append(size)
            if rule is not None:
                network.append(_resized(size, rule))
    sizes = {"original": original} if why else {"original": original, "network": network}
    return Census(sizes, unknown, fingerprint(keys), why, sorted(set(rules)))


def fingerprint(images: Iterable[tuple[int, tuple[int, int]]]) -> str:
    """Of the (key, (H, W)) of a data set's images, in any order: how many, and a hash."""
    digest, count = np.zeros(4, dtype=np.uint64), 0
    for key, size in images:
        words = hashlib.blake2b(f"{key}:{size}".encode(), digest_size=32).digest()
        digest += np.frombuffer(words, dtype=np.uint64)
        count += 1
    return f"{count} images {digest.tobytes().hex()[:16]}"


def _infos(leaf: Any) -> Iterator[dict[str, Any]]:
    for i in range(len(leaf)):
        yield leaf.get_data_info(i)


def _resized(size: tuple[int, int], rule: Any) -> tuple[int, int]:
    height, width = size
    if rule.scale and rule.keep_ratio:
        width, height = rescale_size((width, height), tuple(rule.scale))
    elif rule.scale:
        width, height = rule.scale
    else:
        across, down = rule.scale_factor
        width, height = int(width * float(across) + 0.5), int(height * float(down) + 0.5)
    return max(1, int(height)), max(1, int(width))


def choose_resolution(memory: PerturbationMemory, found: Census) -> str:
    """``"network"`` or ``"original"`` for this pipeline.

    Raises:
        ValueError: the memory asks for network resolution and no single rule makes it.
    """
    if memory.resolution == "network" and found.why_original:
        raise ValueError(
            f"memory=dict(resolution='network') keeps perturbations for images as the pipeline resizes them, which it does by another "
            f"rule each time: {found.why_original}; write resolution='original' or 'auto'"
        )
    if memory.resolution != "auto":
        return memory.resolution
    return "original" if found.why_original else "network"


def prepare(
    attack: Any,
    preprocessor: Any,
    dataset: Any,
    *,
    ranks: int = 1,
    shares: int = 1,
    teacher: str = "",
    work_dir: str = ".",
) -> str:
    """Bind the attack's memory to a data set, tell the preprocessor which image is canonical, and require room.

    Args:
        ranks: processes of this machine, each with a memory of its own.
        teacher: hash of the victim's weights.
        shares: ranks of all machines that share the images out for the whole run; 1: each may meet, and keep, every image.

    Returns:
        what is to be logged.

    Raises:
        ValueError: the memory was made for other settings or data; a resolution that the pipeline does not have.
        MemoryError: not enough host memory; names the settings that would fit.
    """
    memory: PerturbationMemory = attack.memory
    found = census(dataset)
    resolution = choose_resolution(memory, found)
    preprocessor.resolution = resolution
    store = store_of(memory)
    if store is not None:
        join(store, len(found.sizes["original"]) + found.unknown, work_dir)
    settings = dict(
        eps=attack.eps, step=attack.step_size, momentum=attack.momentum, channels=3, objective=attack.objective_name
    )  # fmt: skip
    order = "rgb" if getattr(preprocessor, "_channel_conversion", False) else "bgr"
    made = MemorySettings(
        **settings, data=found.fingerprint, size=_made(resolution, found), teacher=teacher, order=order
    )
    if store is None:
        memory.bind(made)
    else:
        together(lambda: memory.bind(made))
    forecast = forecast_of(memory, found, resolution)
    if store is not None:
        # Every rank asks, also one that the system refused: the others would wait for it.
        free = room(store) if store.is_open and forecast.images else None
        together(lambda: memory.require_room(forecast, available=free) if free is not None else None)
        if not store.is_open:
            return f"{describe(forecast, found.unknown, where='')}, of which none is kept"
    if not forecast.images:
        return (
            f"perturbation memory: {memory.bits} bits, stride {memory.stride}, {resolution} resolution. Its size is not known: the data "
            "set gives no width and height of its images"
        )
    if store is not None:
        text = describe(forecast, found.unknown, where="")
        there = len(store)
        return f"{text}, in {store.directory}" + (
            f", which has {there} of them from an earlier run: used" if there else ""
        )
    memory.require_room(forecast, copies=ranks, share=1 / shares)
    return describe(forecast, found.unknown, ranks, shares)


def forecast_of(memory: PerturbationMemory, found: Census, resolution: str) -> Forecast:
    others = {name: rows for name, rows in found.sizes.items() if name != resolution}
    return memory.forecast(found.sizes[resolution], resolution=resolution, others=others, channels=3)


def memory_facts(memory: PerturbationMemory, dataset: Any) -> dict[str, Any]:
    """For ``ikd-fast explain``: which image is canonical, and the forecast as text (None: the data set gives no sizes)."""
    found = census(dataset)
    resolution = choose_resolution(memory, found)
    forecast = forecast_of(memory, found, resolution)
    return {
        "canonical": _made(resolution, found),
        "forecast": str(forecast) if forecast.images else None,
        "bytes": forecast.bytes if forecast.images else None,
    }


def _made(resolution: str, found: Census) -> str:
    return f"network {', '.join(found.rules)}" if resolution == "network" else resolution


def describe(
    forecast: Forecast, unknown: int = 0, ranks: int = 1, shares: int = 1, where: str = " of host memory"
) -> str:
    """The forecast as it is logged; arguments as in :func:`prepare`, and where it is kept."""
    text = f"perturbation memory: {forecast.told(where)}"
    if unknown:
        text += f"; {unknown} more images have no width and height in the data set and are not counted"
    if shares > 1:
        text += f"; each of the {shares} ranks keeps its own images', about {human(forecast.bytes / shares)}"
    elif ranks > 1:
        text += (
            f"; each of the {ranks} ranks of this machine keeps its own and may come to that, since it starts every image anew that "
            "another rank has had. train_dataloader.sampler=dict(type='KeyedSampler', slots=...) keeps each image with one rank"
        )
    return text


def start(runner: Any, model: Any) -> None:
    """Prepare the memory of a distiller's attack before the first step, and log it; nothing where it keeps none."""
    memory = memory_of(model)
    if memory is None or not model.is_active():
        return
    loader = runner.train_dataloader
    shares = _world_size() if getattr(keyed_sampler(loader), "slots", None) else 1
    text = prepare(
        model.ikd.attack, model.data_preprocessor, loader.dataset, ranks=_local_ranks(), shares=shares,
        teacher=model.ikd.teacher.fingerprint()[:16], work_dir=runner.work_dir,
    )  # fmt: skip
    if getattr(runner, "_resume", False) and len(memory.store) == 0 and store_of(memory) is None:
        text += "\nthe run is resumed, and host memory is not in a checkpoint: every image starts anew at its next visit"
    print_log(f"ikd_fast {text}", logger="current", level=logging.INFO)
    attack, augment = model.ikd.attack, getattr(model.data_preprocessor, "augment", None)
    if augment is not None and augment.crop_prob > 0 and augment.crop_align == 1 and not attack.fresh:
        print_log(
            "ikd_fast: mode 'carry' keeps perturbations that are tied to the teacher's grid, and AdaptiveFreqAug crops at any pixel, "
            "which costs most of their strength (docs/attack.md). Write augment=dict(..., crop_align=8), or attack=dict(..., fresh=True), "
            "or mode='single'",
            logger="current",
            level=logging.WARNING,
        )


def between_epochs(model: Any) -> None:
    """A memory of files is the same for all ranks when an epoch begins."""
    store = store_of(memory_of(model))
    if store is not None and model.is_active():
        settle(store)


def finish(model: Any, *, release: bool = False) -> None:
    """Log what the memory has done, if anything; ``release`` it where no later step will need it."""
    memory = memory_of(model)
    if memory is None:
        return
    store, counts, whose = store_of(memory), None, " (this rank's)"
    if store is not None:
        store.sync()
        counts, whose = sum(troubles(store), Counter()), " (visits: this rank's)"
    if not len(memory.store) and not counts:
        return
    text = f"ikd_fast {memory.report(counts)}" + (whose if _world_size() > 1 else "")
    if release:
        memory.close()
        text += "; the adversarial branch is over, and its "
        text += "memory is given back" if store is None or isinstance(store, SharedStore) else "files stay"
    print_log(text, logger="current", level=logging.INFO)


def memory_of(model: Any) -> PerturbationMemory | None:
    """Of a distiller whose adversarial branch is on and keeps perturbations."""
    ikd = getattr(model, "ikd", None)
    return getattr(ikd.attack, "memory", None) if ikd is not None and ikd.adversarial else None


def _local_ranks() -> int:
    """Processes of this run on this machine: as the launcher says, else at most one for each of its devices."""
    # Slurm writes "4", or "4(x2)" where it tells how many nodes have as many.
    slurm = os.environ.get("SLURM_NTASKS_PER_NODE", "").partition("(")[0]
    told = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (int(slurm) if slurm.isdigit() else 0)
    return told or min(_world_size(), torch.cuda.device_count() or _world_size())


def _world_size() -> int:
    from mmengine.dist import get_world_size

    return get_world_size()
