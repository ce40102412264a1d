"""What the pixels of one image cost by stage, one thread: DALI's operators and cv2's, beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("decode", "decode, resize", "decode, resize, mirror")


def encoded(root: Path, count: int) -> list[np.ndarray]:
    """The bytes of the first ``count`` files of a set."""
    return [np.frombuffer(p.read_bytes(), np.uint8) for p in sorted((root / "train").iterdir())[:count]]


def cv2_stage(stage: str, files: Sequence[np.ndarray], size: tuple[int, int]) -> Callable[[], None]:
    """A function that takes every file through ``stage``; ``size`` is (h, w). The mirror includes mmdet's copy to ``[3, H, W]``."""
    import cv2

    cv2.setNumThreads(1)

    def run() -> None:
        for data in files:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            if stage != "decode":
                image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
            if stage.endswith("mirror"):
                np.ascontiguousarray(image[:, ::-1].transpose(2, 0, 1))

    return run


def dali_stage(
    stage: str, files: Sequence[np.ndarray], size: tuple[int, int], batch: int
) -> Callable[[], None]:
    """The same through a DALI graph with one thread."""
    from nvidia.dali import Pipeline, fn, types

    starts = iter(())

    def source() -> Any:
        part = list(files[next(starts) :][:batch])
        return part, [np.array(size, np.float32)] * len(part)

    pipe = Pipeline(
        batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=2, exec_dynamic=True
    )
    with pipe:
        data, shape = fn.external_source(
            source=source, num_outputs=2, batch=True, dtype=[types.UINT8, types.FLOAT], ndim=[1, 1]
        )
        image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        image = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.BGR)
        if stage != "decode":
            # Ends that are swapped mirror: no pass of its own.
            region = (
                dict(roi_start=[0.0, 1.0], roi_end=[1.0, 0.0], roi_relative=True)
                if stage.endswith("mirror")
                else {}
            )
            image = fn.resize(image, size=shape, interp_type=types.INTERP_LINEAR, antialias=False, **region)
        pipe.set_outputs(image, shape)
    pipe.build()

    def run() -> None:
        nonlocal starts
        starts = iter(range(0, len(files), batch))
        pipe.schedule_run()
        while True:
            try:
                pipe.share_outputs()
            except StopIteration:
                pipe.reset()
                return
            pipe.release_outputs()
            pipe.schedule_run()

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
