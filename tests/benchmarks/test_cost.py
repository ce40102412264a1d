"""The cost benchmark: its formulas against what steps are counted to take, its timers on a clock of our own, its tables."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.device import steps
from benchmarks.device.output import _ratios
from benchmarks.end_to_end import cost_table, timeline
from benchmarks.end_to_end.cost import main
from benchmarks.end_to_end.flops import CountFlops, gmac_of
from benchmarks.end_to_end.measure import seen
from benchmarks.end_to_end.modes import MIX, MODES, PLAIN, PUBLISHED, mixture
from benchmarks.end_to_end.prediction import Pieces, Visited, count_pieces, predict
from benchmarks.end_to_end.schedule import Schedule, rows
from benchmarks.end_to_end.small import LEVELS, SmallPair, task_loss
from benchmarks.end_to_end.timeline import PARTS, Timeline
from ikd_fast import IKD, FGDLoss, KDLoss, OnlineDIFGSM

TINY = SmallPair(2, (64, 96), width=4)
# Of the teacher's backbone in a step: the clean images, the adversarial ones, and one for every gradient of the attack, but that
# carry takes its gradient from the adversarial forward; on a first visit from one of its own.
FORWARDS = {
    "student alone": 0, PLAIN: 1, PUBLISHED: 1, "offline images": 2, "single": 3, "iterative": 7, "carry": 2,
    "carry, feature objective": 2, "carry, first visit": 3, "carry, reused visit": 2, "carry, fresh": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return count_pieces(TINY.nets())


def test_pieces_by_hand(pieces: Pieces) -> None:
    """Layer by layer: k^2 c_in c_out multiply-adds a pixel of the output."""

    def net(width: int, depth: int) -> tuple[int, int, int, int]:
        """Backbone and pyramid, its first layer alone, head; of one image."""
        pixels = [64 * 96 // 4**i for i in range(6)]
        first = 9 * 3 * width * pixels[1]
        total = first + 9 * width * width * pixels[2]
        for i, level in zip(range(3), (3, 4, 5), strict=True):
            a, b = width * 2**i, width * 2 ** (i + 1)
            total += (9 * a * b + depth * 9 * b * b + b * 64 + 9 * 64 * 64) * pixels[level]
        head = sum((9 * 64 * 64 + 9 * 64 * 20) * pixels[level] for level in (3, 4, 5))
        return total, first, head, 0

    teacher, _, t_head, _ = net(6, 2)
    student, first, s_head, _ = net(4, 1)
    found = {name: round(value * 1e9 / 2) for name, value in pieces.asdict().items() if name != "distill"}
    assert found == {
        "teacher": teacher,
        "head": t_head,
        "teacher_input": teacher,
        "head_input": t_head,
        # Forward, backward to weights, backward to maps; there is none to the student's images.
        "task": 3 * (student + s_head) - first,
        "features": 3 * student - first,
    }


@pytest.mark.parametrize("name", MODES)
def test_a_step_takes_what_the_formulas_say(pieces: Pieces, name: str) -> None:
    mode, clock = MODES[name], Timeline()
    side = TINY.side(mode, clock)
    epochs = 8 if mode.fraction < 1 else 1
    for epoch in range(epochs):
        side.step(side.load(epoch), epoch)
    forwards = Counter()
    if side.ikd is not None:
        side.ikd.teacher.net.stem.register_forward_hook(lambda *_: forwards.update(teacher=1))
    with CountFlops(lambda: clock.part) as flops:
        side.step(side.load(epochs), epochs)
    visited = seen(side)
    # The published loops multiply a little more in the loss itself.
    tolerance = dict(rel=1e-2) if name == PUBLISHED else dict(rel=1e-9)
    assert flops.gmac == pytest.approx(predict(mode, pieces, visited), **tolerance)
    assert sum(flops.parts.values()) == flops.total
    assert set(flops.parts) <= set(PARTS)
    if mode.fraction == 1:
        assert predict(mode, pieces, visited) == pytest.approx(predict(mode, pieces))
        assert forwards["teacher"] == FORWARDS[name]
        gradients = {"iterative": 5, "none": 0, "offline": 0, "reused": 0}.get(mode.kind, 1)
        assert (visited.gradients if visited else 0) == gradients


def test_shares_of_a_step_that_attacks_some_images(pieces: Pieces) -> None:
    mode = MODES["carry, fraction 0.5"]
    whole, first = (predict(MODES[name], pieces) for name in ("carry", "carry, first visit"))
    assert predict(mode, pieces) == pytest.approx((pieces.plain + whole) / 2)
    assert predict(mode, pieces, Visited(0.0, 0.0, 0)) == pytest.approx(pieces.plain)
    assert predict(mode, pieces, Visited(1.0, 0.25, 1)) == pytest.approx(0.75 * whole + 0.25 * first)


def test_the_papers_scale_in_the_formulas() -> None:
    """RetinaNet X101-64x4d to R50 at 800x1344, where gradients cost what forwards do: the ratios of the design."""
    f, s, h = 349.0, 106.0, 145.0
    p = Pieces(f, h, f, h, 3 * (s + h), 3 * s, 0.0)
    ratios = {name: predict(MODES[name], p) / p.plain for name in MODES}
    expected = {"offline images": 1.61, "carry, feature objective": 1.92, "carry": 2.19, "iterative": 6.09}
    assert {name: round(ratios[name], 2) for name in expected} == expected
    reused = 5 / 16 * ratios["carry, feature objective"] + 11 / 16 * ratios["offline images"]
    assert reused == pytest.approx(1.70, abs=0.01)


def test_backward_is_counted_by_what_it_computes() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    x = torch.zeros(1, 4, 5, 7, requires_grad=True)
    one = 9 * 4 * 8 * 35 / 1e9
    assert gmac_of(lambda: conv(x)) == pytest.approx(one)
    y = conv(x).sum()
    assert gmac_of(lambda: torch.autograd.grad(y, x, retain_graph=True)) == pytest.approx(one)
    assert gmac_of(lambda: torch.autograd.grad(y, [x, conv.weight])) == pytest.approx(2 * one)


class Clock:
    """Stands for ``time``: it advances when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timeline, "time", made)
    return made


def test_a_part_is_charged_until_another_begins(clock: Clock) -> None:
    line = Timeline()

    def spend(seconds: float) -> None:
        clock.now += seconds

    assert line.part == "outside"
    spend(100)
    with line.within("student"):
        spend(1)
        line.wrapped("teacher", spend)(2)
        spend(4)
        with line.within("attack"), line.within("teacher"):
            spend(8)
        line.switch("losses")
        spend(16)
        assert line.part == "losses"
    spend(100)
    line.switch("losses")  # outside a step nothing is charged
    expected = dict.fromkeys(PARTS, 0.0) | {"student": 5.0, "teacher": 10.0, "losses": 16.0}
    assert line.seconds() == expected
    line.clear()
    assert line.seconds() == dict.fromkeys(PARTS, 0.0)


class Slow(torch.autograd.Function):
    """The identity, which takes its time in both directions."""

    @staticmethod
    def forward(ctx, x: Tensor, clock: Clock, there: float, back: float) -> Tensor:
        ctx.clock, ctx.back = clock, back
        clock.now += there
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.clock.now += ctx.back
        return grad, None, None, None


class SlowLoss(KDLoss):
    clock: Clock

    def forward(self, student, teacher, ctx):
        return {
            str(i): (Slow.apply(s, self.clock, 1, 10) - t).square().mean()
            for i, s, t in self.pairs(student, teacher)
        }


def test_backward_of_a_loss_is_the_losses_and_the_rest_the_students(clock: Clock) -> None:
    loss, line = SlowLoss(levels=[0, 2]), Timeline()
    loss.clock = clock
    loss.forward = timeline.charged_backward(line, loss, loss.forward)
    weight = torch.ones(1, 2, 4, 4, requires_grad=True)
    with line.within("student"):
        maps = [Slow.apply(weight, clock, 100, 1000) for _ in range(3)]
        # Another use of the same maps, made before the loss as the student's own losses are.
        task = torch.stack([Slow.apply(m, clock, 100, 1000).mean() for m in maps]).sum()
        value = loss(maps, [torch.zeros(1, 2, 4, 4)] * 3, None)
        (task + sum(value.values())).backward()
    spent = line.seconds()
    assert spent["losses"] == 2 * (1 + 10)
    assert spent["student"] == 6 * (100 + 1000)


def test_watching_a_step_does_not_change_it() -> None:
    def terms(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        if watched:
            side = TINY.side(MODES["carry"], Timeline())
            return side.step(side.load(0), 0)
        teacher = TINY.teacher()
        ikd = IKD(
            TINY.student(), teacher, features=LEVELS, call=lambda net, x: net.features(x), losses=[FGDLoss(preset="retinanet")],
            task_loss=task_loss, attack=OnlineDIFGSM("carry", value_range=(0, 1)), augment=side_augment(),
            victim=victim_of(teacher), pad_divisor=32,
        )  # fmt: skip
        return ikd.step(TINY.batch, TINY.targets, image_ids=[0, 1], epoch=0).terms

    plain, watched = terms(False), terms(True)
    assert plain.keys() == watched.keys() == {"task/task", "kd/fgd", "kd/adv"}
    assert all(torch.equal(plain[k], watched[k]) for k in plain)


def side_augment():
    from ikd_fast import AdaptiveFreqAug

    return AdaptiveFreqAug(value_range=(0, 1))


def victim_of(teacher):
    from benchmarks.end_to_end.nets import class_loss

    return lambda images, targets: class_loss(teacher(images), targets)


def made(**seconds: float) -> dict:
    """A result with steps of so many seconds, each over one GMAC a second but where ``attack`` says more."""
    modes = {}
    for name, value in seconds.items():
        parts = dict.fromkeys(PARTS, [0.0] * 3) | {"student": [value] * 3, "data": [1.0] * 3}
        gmac = {PLAIN: 2.0}.get(name, 4.0)
        modes[name] = {
            "seconds": [value] * 3, "parts": parts, "predicted": [gmac] * 3, "counted": gmac, "predicted_once": gmac,
            "counted_parts": {"student": gmac}, "gradients": [0.0] * 3,
        }  # fmt: skip
    return {"modes": modes}


def test_measured_beside_predicted_and_where_the_rest_went() -> None:
    r = made(**{PLAIN: 2.0, "carry": 5.0})
    assert cost_table.ratios(r, "carry") == {"time": (2.5,) * 3, "excess": (1.25,) * 3}
    r["modes"]["carry"]["parts"]["losses"] = [0.6] * 3
    r["modes"]["carry"]["parts"]["student"] = [4.4] * 3
    by_part = cost_table.excess_by_part(r, "carry")
    assert sum(by_part.values()) == pytest.approx(0.25)
    assert by_part["losses"] == pytest.approx(0.15)
    assert by_part["student"] == pytest.approx(0.1)
    assert cost_table.explanation(r)[2] == "- carry, 1.25: losses +15 %, student +10 %."
    assert "Every side is within 1.15" in cost_table.explanation(made(**{PLAIN: 2.0, "carry": 4.5}))[0]


def test_appendix_b_by_hand() -> None:
    seconds = {
        PLAIN: 1.0,
        "offline images": 2.0,
        "carry": 3.0,
        "carry, first visit": 5.0,
        "carry, reused visit": 2.0,
    }
    r = made(**seconds, single=4.0, iterative=9.0)
    schedule = Schedule(steps=100, batch=4, images=20, active=0.5)  # ten visits
    found = {row["row"]: row for row in rows(schedule, r["modes"], [6.0, 7.0, 8.0])}
    # Reading a batch takes a second more in every step; half of the steps are plain ones.
    expected = {
        "baseline: FGD": 200, "adversarial images beforehand (20 images, 5 steps)": 140, "training with them": 250, "both": 390,
        "`carry`, nothing beforehand": 50 * 2 + 50 * (0.1 * 6 + 0.9 * 4),
        "`carry`, `refresh=5`, nothing beforehand": 50 * 2 + 50 * (0.1 * 6 + 0.4 * 4 + 0.5 * 3),
        "`single` in the step": 50 * 2 + 50 * 5, "`iterative` in the step": 50 * 2 + 50 * 10,
    }  # fmt: skip
    assert {name: row["seconds"] for name, row in found.items()} == pytest.approx(expected)
    assert found["both"]["paper_of_baseline"] == 1.25
    assert found["both"]["of_baseline"] == pytest.approx(1.95)
    assert len(rows(schedule, r["modes"], None)) == 5


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of the modes that the mixture is made of."""
    out = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.end_to_end.small.SmallPair", lambda: TINY)
        patch.setattr(torch, "set_num_threads", lambda _: None)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        arguments = ["--out", str(out), "--model", "small", "--rounds", "2", "--only", *mixture()]
        assert main(arguments) == 0
    return out


def test_a_result_has_every_mode_and_the_mixture(written: Path) -> None:
    result = json.loads((written / "cost-small.json").read_text())
    shares = mixture()
    assert list(result["modes"]) == [n for n in MODES if n in shares or n == PLAIN] + [MIX]
    for name, mode in result["modes"].items():
        assert len(mode["seconds"]) == len(mode["predicted"]) == result["rounds"] == 2, name
        parts = sum(sum(mode["parts"][p]) for p in PARTS if p != "data")
        assert 0 < parts <= sum(mode["seconds"]), name
    mix = result["modes"][MIX]
    for i in range(2):
        expected = sum(share * result["modes"][name]["seconds"][i] for name, share in shares.items())
        assert mix["seconds"][i] == pytest.approx(expected)
    assert statistics.fmean(mix["gradients"]) == pytest.approx(5 / 16)
    assert result["schedule"] is None
    assert result["generation"] is None


def test_tables_and_picture(written: Path, tmp_path: Path) -> None:
    assert (written / "cost-small.png").stat().st_size > 5000
    text = (written / "cost-small.md").read_text()
    assert "| **FGD** |" in text
    assert "| carry | 1 |" in text
    assert "| single |" not in text
    page = tmp_path / "page.md"
    page.write_text(f"head\n{cost_table.BEGIN}\nold\n{cost_table.END}\ntail\n")
    assert cost_table.main([str(written / "cost-small.json"), "--into", str(page)]) == 0
    assert text.strip() in page.read_text()
    assert "old" not in page.read_text()
    with pytest.raises(ValueError, match="expected a page with the lines"):
        cost_table.insert("no marks", text)


@pytest.mark.parametrize("wrong", [["--rounds", "1"], ["--images", "0"], ["--only", "carri"]])
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--out", "nowhere", "--model", "small", *wrong])
    assert caught.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_page_has_the_marks(repo_root: Path) -> None:
    page = (repo_root / "docs" / "cost.md").read_text()
    assert page.count(cost_table.BEGIN) == page.count(cost_table.END) == 1


@pytest.mark.parametrize("side", [steps.CARRY, steps.HALF, f"{steps.CARRY}, feature objective"])
def test_the_gpu_scripts_steps_take_what_the_formulas_say(side: str) -> None:
    made = steps.Steps(steps.DRY_STEP, torch.device("cpu"))
    run = made.ours(side)
    run(0)
    with CountFlops() as flops:
        run(1)
    expected = predict(MODES[steps.SIDES[side]], made.pieces())
    assert flops.gmac == pytest.approx(expected, rel=1e-9)


def test_the_gpu_scripts_carry_is_held_to_its_prediction() -> None:
    """A GMAC of plain FGD, 1.8 of carry by these pieces: 2 and 4 seconds are 2.0 times, 1.11 of the prediction."""
    pieces = Pieces(0.4, 0.1, 0.2, 0.1, 0.6, 0.0, 0.0)
    notes = steps._beside_prediction(steps.CARRY, {steps.OURS: 2.0, steps.CARRY: 4.0}, pieces)
    assert notes == {"time_of_fgd": 2.0, "predicted_of_fgd": 1.8, "of_prediction": 1.111}
    for side in (steps.PLAIN, steps.OURS, steps.HALF):
        assert steps._beside_prediction(side, {steps.OURS: 2.0, side: 4.0}, pieces) == {}
    line = dict(side=steps.CARRY, role="ours", targets={}, notes=notes, median=4.0)
    (text,) = _ratios([line])
    assert text.endswith("by its multiply-adds 1.80x: 1.11 of the prediction; target at most 1.1 MISSED")
    (text,) = _ratios([line | dict(notes=notes | dict(of_prediction=1.1))])
    assert text.endswith("target at most 1.1 met")


@pytest.mark.slow
def test_the_demos_pair_takes_what_the_formulas_say() -> None:
    pytest.importorskip("mmdet")
    from benchmarks.end_to_end.demo import DemoPair

    pair = DemoPair(images=1)
    pieces = count_pieces(pair.nets())
    for name in ("offline images", "carry"):
        side = pair.side(MODES[name], Timeline())
        side.step(side.load(0), 0)
        with CountFlops() as flops:
            side.step(side.load(1), 1)
        assert flops.gmac == pytest.approx(predict(MODES[name], pieces, seen(side)), rel=1e-6), name
