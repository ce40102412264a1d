"""What the benchmark of writing behind makes of its figures."""

from __future__ import annotations

import types

import pytest

from benchmarks.memory import write_behind
from benchmarks.memory.write_behind import AGAIN, DIRECTORY, HOST, SHARED, ratios, verdict


def test_a_sides_clock_stops_when_its_records_are_written(monkeypatch) -> None:
    """Every step takes 1 second, what waits another 0.5: each side pays its own, whatever its place in the round."""
    clock, calls = [0.0], []

    class Store:
        def flush(self) -> None:
            clock[0] += 0.5

    class Side:
        def __init__(self, name: str, store: object) -> None:
            self.name = name
            self.attack = types.SimpleNamespace(memory=types.SimpleNamespace(store=store))

        def load(self, epoch: int) -> int:
            clock[0] += 100
            return epoch

        def step(self, batch: int, epoch: int) -> None:
            assert batch == epoch
            calls.append((self.name, epoch))
            clock[0] += 1

    monkeypatch.setattr(write_behind.time, "perf_counter", lambda: clock[0])
    sides = {HOST: Side(HOST, object()), DIRECTORY: Side(DIRECTORY, Store())}
    wall, cpu = write_behind.measure(sides, 2, 3, lambda line: None)
    assert wall == {HOST: [3.0, 3.0], DIRECTORY: [3.5, 3.5]}
    assert len(cpu[HOST]) == 2
    # One round more than is kept, and the same epochs for both.
    assert [epoch for name, epoch in calls if name == HOST] == list(range(9))
    assert [epoch for name, epoch in calls if name == DIRECTORY] == list(range(9))
    assert [name for name, _ in calls[::3]] == [DIRECTORY, HOST, HOST, DIRECTORY, DIRECTORY, HOST]
    assert ratios(wall) == {DIRECTORY: [3.5 / 3] * 2}


SAME = [0.99, 1.0, 1.01] * 8


@pytest.mark.parametrize(
    ("found", "control", "words"),
    [
        ([1.0, 1.01, 1.02] * 8, SAME, "within 3 %"),
        ([1.04, 1.05, 1.07] * 8, SAME, "more than 3 %"),
        ([0.9, 1.0, 1.2] * 8, SAME, "not decided: 0.90 to 1.10"),
        (SAME, [1.04, 1.05, 1.06] * 8, "not decided: the same thing measured twice differs by 1.04 to 1.06"),
        (SAME, [0.94, 0.95, 0.96] * 8, "not decided: the same thing measured twice differs by 0.94 to 0.96"),
    ],
)
def test_verdicts(found: list[float], control: list[float], words: str) -> None:
    assert verdict(found, control) == words


def test_the_table() -> None:
    seconds = {HOST: [3.0] * 4, AGAIN: [3.0] * 4, DIRECTORY: [3.03] * 4, SHARED: [3.3] * 4}
    result = dict(
        machine=dict(cpu="a CPU", threads=1, cores=2, load=0.1), title="a pair", rounds=4, steps=3, record=512,
        seconds=seconds, cpu_seconds=seconds,
    )  # fmt: skip
    lines = write_behind.markdown(result).splitlines()
    assert lines[-4:] == [
        "| host memory | 1.000 (1.000-1.000) | 1 | 1 |  |",
        "| host memory, again | 1.000 (1.000-1.000) | 1.000 (1.000-1.000) | 1.000 | noise of the machine |",
        "| directory | 1.010 (1.010-1.010) | 1.010 (1.010-1.010) | 1.010 | within 3 % |",
        "| shared memory | 1.100 (1.100-1.100) | 1.100 (1.100-1.100) | 1.100 | more than 3 % |",
    ]
