"""Two processes joined by gloo that run functions of test modules, with a limit on the time that a hang may take."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
START_SECONDS = 180
"""Importing mmdet in each takes ten times as long beside other work; where it passes, the limit costs nothing."""
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=50)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, world: int, port: int, tasks: Any, results: Any, stacks: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    import ikd_fast.mmdet  # noqa: F401

    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    results.put((rank, True, "ready"))
    with open(stacks, "w") as file:
        while (task := tasks.get()) is not None:
            module, name, args, kwargs, limit = task
            faulthandler.dump_traceback_later(limit, file=file)
            try:
                torch.manual_seed(0)
                results.put((rank, True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
            except BaseException:
                results.put((rank, False, traceback.format_exc()))
            finally:
                faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


class Pair:
    """Processes that stay between calls, since importing mmdet takes longer than most of the tests."""

    def __init__(self, folder: Path, world: int = WORLD) -> None:
        self.folder, self.world = folder, world
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(self.world)]
        self.stacks = [self.folder / f"stack{rank}.txt" for rank in range(self.world)]
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, self.world, port, self.tasks[rank], self.results, str(self.stacks[rank])),
                daemon=False,  # loader workers are its children
            )
            for rank in range(self.world)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *args: Any, limit: float = 60, **kwargs: Any) -> list[Any]:
        """``function(*args, **kwargs)`` in every process; results by rank. A hang fails ``limit`` + 5 seconds after they started it."""
        if not self.processes:
            self._start()
            self._answers("start", START_SECONDS)
        for tasks in self.tasks:
            tasks.put((function.__module__, function.__name__, args, kwargs, limit))
        return self._answers(function.__name__, limit + 5)

    def _answers(self, name: str, limit: float) -> list[Any]:
        end = time.monotonic() + limit
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            try:
                rank, good, answer = self.results.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                silent = sorted(set(range(self.world)) - set(answers))
                stacks = "\n".join(
                    f"rank {r}:\n{self.stacks[r].read_text()}" for r in silent if self.stacks[r].exists()
                )
                self.stop()
                raise AssertionError(
                    f"{name}: no answer from ranks {silent} in {limit:.0f} s; where they were:\n{stacks}"
                ) from None
            if not good:
                # The other one may wait for this one forever.
                self.stop()
                raise AssertionError(f"{name} failed on rank {rank}:\n{answer}")
            answers[rank] = answer
        return [answers[rank] for rank in range(self.world)]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.processes = []

    def close(self) -> None:
        """Let them end by themselves."""
        for tasks in self.tasks if self.processes else ():
            tasks.put(None)
        for process in self.processes:
            with contextlib.suppress(Exception):
                process.join(10)
        self.stop()
