"""DALI's graph: encoded bytes in, resized, cropped and mirrored images out.

By DALI, resize, crop and mirror are one operator: a resize of a region of interest, whose ends may be swapped. Linear, without
antialiasing and with half-pixel centres, as cv2.INTER_LINEAR. By cv2 they are what mmdet's transforms do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import steps
from .cv2_pixels import Cv2Pixels
from .host_sample import HostSample
from .require import require_dali

INPUTS: dict[str, Callable[[HostSample], np.ndarray]] = {
    "encoded": lambda sample: sample.encoded,
    "steps": lambda sample: steps.table(sample.size, sample.steps),
    "size": lambda sample: np.array(sample.view.size, dtype=np.float32),
    "first": lambda sample: sample.region[0],
    "last": lambda sample: sample.region[1],
    "gain": lambda sample: np.array(sample.gain, dtype=np.float32),
    "sigma": lambda sample: np.array(sample.sigma, dtype=np.float32),
    "mirror": lambda sample: np.array(sample.mirror, dtype=np.int32),
}
"""Bytes; table of steps; by DALI's resize: (h, w), first and last (y, x) of the region; factor, noise, mirror."""
ORDERS = ("bgr", "rgb")


@dataclass(frozen=True)
class Finish:
    """Mirror, noise, normalisation and padding by DALI's own operators.

    Args:
        mean, std: 0..255 units, in the output's channel order.
        divisor: sides are multiples of it.
        seed: of DALI's noise generator, whose draws depend on the place in the batch and on the run.
    """

    mean: Sequence[float]
    std: Sequence[float]
    divisor: int
    seed: int


def inputs_of(samples: list[HostSample], wanted: Iterable[str]) -> list[list[np.ndarray]]:
    """What a graph takes of a batch, a list for each name of :data:`INPUTS` that it wants."""
    return [[INPUTS[name](sample) for sample in samples] for name in wanted]


def image_pipeline(
    source: Callable[[], list[HostSample]],
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    prefetch: int,
    channel_order: str,
    gain: bool,
    cv2: Cv2Pixels | None = None,
    finish: Finish | None = None,
) -> Any:
    """A built ``nvidia.dali.Pipeline`` with one output: uint8 HWC, or float32 CHW of one size with ``finish``.

    Args:
        source: called once a batch, gives at most ``batch_size`` images, raises ``StopIteration`` at the end.
        device_id: None for DALI's CPU operators.
        gain: whether the images' grey levels are scaled (one more pass by DALI).
        cv2: who resizes, crops, mirrors and scales grey levels instead of DALI; with ``device_id=None`` only.
        finish: else ``sigma`` and ``mirror`` of the samples are left to others.
    """
    require_dali()
    from nvidia.dali import Pipeline, fn, math, types

    pipe = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
        seed=finish.seed if finish else None,
    )
    wanted = {"encoded": 1}
    wanted |= {"size": 1, "first": 1, "last": 1} if cv2 is None else {"steps": 2}
    wanted |= {"gain": 0} if gain or cv2 is not None else {}
    wanted |= {"sigma": 0, "mirror": 0} if finish else {}
    special = {"encoded": types.UINT8, "steps": types.INT32, "mirror": types.INT32}

    def feed() -> tuple[list[np.ndarray], ...]:
        return tuple(inputs_of(source(), wanted))

    with pipe:
        nodes = fn.external_source(
            source=feed,
            num_outputs=len(wanted),
            batch=True,
            dtype=[special.get(name, types.FLOAT) for name in wanted],
            ndim=list(wanted.values()),
        )
        given = dict(zip(wanted, nodes, strict=True))
        image = fn.decoders.image(
            given["encoded"], device="cpu" if device_id is None else "mixed", output_type=types.RGB
        )
        if channel_order == "bgr":
            # Decoding to BGR gives the same and takes twice as long on a CPU.
            image = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.BGR)
        if cv2 is not None:
            image = fn.python_function(
                image,
                given["steps"],
                given["gain"],
                function=cv2,
                batch_processing=True,
                output_layouts="HWC",
            )
        else:
            image = fn.resize(
                image,
                size=given["size"],
                roi_start=given["first"],
                roi_end=given["last"],
                roi_relative=False,
                interp_type=types.INTERP_LINEAR,
                antialias=False,
            )
            if gain:
                image = fn.cast(image * given["gain"], dtype=types.UINT8)
        if finish is not None:
            image = math.clamp(
                fn.noise.gaussian(fn.cast(image, dtype=types.FLOAT), stddev=given["sigma"]), 0.0, 255.0
            )
            image = fn.crop_mirror_normalize(
                image,
                mirror=given["mirror"],
                mean=list(finish.mean),
                std=list(finish.std),
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            image = fn.pad(image, axis_names="HW", align=[finish.divisor, finish.divisor], fill_value=0)
        pipe.set_outputs(image)
    pipe.build()
    return pipe
