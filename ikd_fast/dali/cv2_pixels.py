"""cv2 in DALI's graph: crops, resizes and mirrors decoded images in threads of its own, with mmdet's pixels to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

import numpy as np

from . import steps


class Cv2Pixels:
    """The function of an ``fn.python_function``: whole batches of images, tables of their steps and factors.

    Args:
        threads: cv2 lets go of the interpreter's lock while it works.

    Raises:
        ImportError: cv2 is not installed.
    """

    def __init__(self, threads: int) -> None:
        try:
            import cv2  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"DALIDetLoader(resizer='cv2') needs OpenCV ({error}): pip install opencv-python-headless, or write resizer='dali'"
            ) from error
        self._pool = None
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ikd_fast-cv2")
            # All now: begun from one of DALI's threads, Python would keep a record of that one for good.
            together = Barrier(threads)
            wait([self._pool.submit(together.wait) for _ in range(threads)])

    def __call__(
        self, images: Sequence[np.ndarray], tables: Sequence[np.ndarray], gains: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        apply = map if self._pool is None else self._pool.map
        return list(apply(steps.run, images, tables, map(float, gains)))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
