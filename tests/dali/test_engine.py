"""The engine's bookkeeping on a decoder of three lines: nothing lost, doubled or reordered, no hang."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from ikd_fast.dali.engine import LOOK_AHEAD, Engine, used
from ikd_fast.dali.host_sample import HostSample, Skipped

BAD = 255
MESSAGE = "Critical error in pipeline:\nError in CPU operator\n\nencountered:\n\nFailed to decode sample #0 : \nCurrent pipeline"


class Pipe:
    """As DALI's: works ahead, fails a batch as a whole when it is asked for, and is of no use after that."""

    def __init__(self, source, ahead: int) -> None:
        self.source, self.ahead, self.queue = source, ahead, deque()
        self.over = self.first = False
        self.first = True

    def schedule_run(self) -> None:
        for _ in range(self.ahead if self.first else 1):
            if not self.over:
                try:
                    self.queue.append([int(sample.encoded[0]) for sample in self.source()])
                except StopIteration:
                    self.over = True
        self.first = False

    def share_outputs(self, stream) -> list:
        if not self.queue:
            raise StopIteration
        batch = self.queue.popleft()
        if BAD in batch:
            raise RuntimeError(MESSAGE)
        return [batch]

    def release_outputs(self) -> None:
        pass

    def _shutdown(self) -> None:
        self.over = True


def sample(value: int, name: str = "") -> HostSample:
    return HostSample(name or str(value), np.array([value], np.uint8), (1, 1), payload={"value": [value]})


def given(rows: list[list[int | str]]) -> list[list[HostSample | Skipped]]:
    """Numbers are images (255 one that fails), words are files that were skipped on the host."""
    return [
        [
            Skipped(x, "no such file") if isinstance(x, str) else sample(x, f"{i}.{k}" if x == BAD else "")
            for k, x in enumerate(row)
        ]
        for i, row in enumerate(rows)
    ]


def run(rows: list[list[int | str]], ahead: int = 2, strict: bool = False):
    pipes = []

    def build(source, size):
        pipes.append(Pipe(source, ahead))
        return pipes[-1]

    engine = Engine(iter(given(rows)), build, 4, strict=strict)
    seen = []
    for batch, outputs in engine:
        names = [x.path for x in batch if isinstance(x, Skipped)]
        values = [x.payload["value"][0] for x in used(batch)]
        seen.append((names, values))
        assert outputs is None or outputs == values
        for x in used(batch):
            x.payload["value"][0] = -1  # what was given away is somebody else's
    assert engine._pipe is None
    return seen, engine, pipes


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_good_batches_pass_through(ahead: int) -> None:
    seen, engine, pipes = run([[1, 2], [3], [4, 5]], ahead)
    assert seen == [([], [1, 2]), ([], [3]), ([], [4, 5])]
    assert engine.stand_ins == 0
    assert len(pipes) == 1
    assert run([], ahead)[0] == []


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_bad_file_costs_its_own_place_only(ahead: int) -> None:
    rows = [[1, BAD, 2], [3, "gone"], [BAD, BAD, 4], [5]]
    seen, engine, _ = run(rows, ahead)
    assert seen == [(["0.1"], [1, 2]), (["gone"], [3]), (["2.0", "2.1"], [4]), ([], [5])]
    assert engine.stand_ins == 0


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize(
    ("rows", "expected", "stand_ins"),
    [
        # The first usable image of the first batch stands in, as it was before the loop changed it.
        ([[1, 2], ["a", "b"], [3], [BAD]], [([], [1, 2]), (["a", "b"], [1]), ([], [3]), (["3.0"], [1])], 2),
        ([[BAD, 2], ["a"], [3]], [(["0.0"], [2]), (["a"], [2]), ([], [3])], 1),
        # The first batch has none: the next that can be decoded.
        ([["a"], [1, 2], [3]], [(["a"], [1]), ([], [1, 2]), ([], [3])], 1),
        ([["a"], [BAD, 1], [2]], [(["a"], [1]), (["1.0"], [1]), ([], [2])], 1),
        ([[BAD], [BAD], ["a"], [BAD, 7]], [(["0.0"], [7]), (["1.0"], [7]), (["a"], [7]), (["3.0"], [7])], 3),
    ],
)
def test_a_batch_with_nothing_usable_gets_a_stand_in(rows, expected, stand_ins: int, ahead: int) -> None:
    seen, engine, _ = run(rows, ahead)
    assert seen == expected
    assert engine.stand_ins == stand_ins


@pytest.mark.parametrize("rows", [[["a"], ["b", "c"]], [[BAD], [BAD, "c"]], [["a"]] * 3 + [[BAD]]])
def test_nothing_usable_at_all_is_an_error_that_names_the_first(rows) -> None:
    with pytest.raises(
        RuntimeError, match=r"none of the images .* the first is (a: no such file|0\.0: DALI)"
    ):
        run(rows)


def test_a_stream_without_an_end_is_not_searched_for_ever() -> None:
    taken = 0

    def stream():
        nonlocal taken
        while True:
            taken += 1
            yield given([["a"]])[0]

    engine = Engine(stream(), lambda source, size: Pipe(source, 1), 1)
    with pytest.raises(RuntimeError, match="none of the images"):
        next(iter(engine))
    assert taken == LOOK_AHEAD + 1


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("bad", ["gone", BAD])
def test_strict_delivers_what_comes_before_and_ends_there(bad, ahead: int) -> None:
    seen, engine, _ = run([[1], [2], [3, bad], [4], [BAD]], ahead, strict=True)
    assert seen == [([], [1]), ([], [2]), (["gone" if bad == "gone" else "2.1"], [3])]
    assert engine.stand_ins == 0


def test_a_failure_without_a_bad_file_is_handed_on() -> None:
    class Tired(Pipe):
        def share_outputs(self, stream):
            if self.ahead == 2:
                self.ahead = 1
                raise RuntimeError("out of memory")
            return super().share_outputs(stream)

    made = []

    def build(source, size):
        made.append(Tired(source, 1 if made else 2))
        return made[-1]

    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(Engine(iter(given([[1], [2]])), build, 1)))


@pytest.mark.parametrize("skipped", [[], ["gone"]])
def test_a_failure_of_the_machine_is_no_files(skipped: list[str]) -> None:
    """After two good batches nothing can be decoded any more, an image of our own as little: no file is blamed, nothing repeats."""
    made = []

    class Ill(Pipe):
        def share_outputs(self, stream):
            if len(seen) >= 2:
                raise RuntimeError("cannot allocate memory")
            return super().share_outputs(stream)

    def build(source, size):
        made.append(Ill(source, 2))
        return made[-1]

    seen = []
    engine = Engine(iter(given([[1], [2], [3, 4, *skipped], [5]])), build, 4)
    with pytest.raises(RuntimeError, match="cannot allocate memory"):
        seen.extend(outputs for _, outputs in engine)
    assert seen == [[1], [2]]
    assert len(made) < 10


def test_a_stand_in_that_fails_is_no_files_fault() -> None:
    """It could be used before; replacing it by itself would never end."""
    made = []

    class Forgetful(Pipe):
        def share_outputs(self, stream):
            if len(seen) >= 1 and 1 in self.queue[0]:
                raise RuntimeError("no memory for this one")
            return super().share_outputs(stream)

    def build(source, size):
        made.append(Forgetful(source, 1))
        return made[-1]

    seen = []
    engine = Engine(iter(given([[1], ["gone"], [2]])), build, 4)
    with pytest.raises(RuntimeError, match="no memory for this one"):
        seen.extend(outputs for _, outputs in engine)
    assert seen == [[1]]
    assert len(made) < 10


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_an_error_of_the_host_side_comes_in_its_turn_and_ends_the_pipeline(ahead: int) -> None:
    pipes, seen = [], []

    def batches():
        yield from given([[1], [2], [3]])
        raise OSError("the disk is gone")

    def build(source, size):
        pipes.append(Pipe(source, ahead))
        return pipes[-1]

    engine = Engine(batches(), build, 1)
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(outputs for _, outputs in engine)
    assert seen == [[1], [2], [3]]
    assert engine._pipe is None
    assert pipes[0].over


def test_what_dali_says_is_one_line() -> None:
    engine = Engine(iter([]), lambda source, size: Pipe(source, 1), 1)
    found = engine._probed(sample(BAD, "x.jpg"))
    assert found == Skipped("x.jpg", "DALI cannot decode it (Failed to decode sample #0)")
