"""Shares of the gradient norm against closed forms; a calibrated step leaves the step as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ikd_fast.distill.calibration import Calibration, gradient_norms


class Said:
    """What a calibration says, by kind."""

    def __init__(self) -> None:
        self.facts: list[str] = []
        self.warnings: list[str] = []

    def __call__(self, text: str, is_warning: bool) -> None:
        (self.warnings if is_warning else self.facts).append(text)


@pytest.fixture
def said() -> Said:
    return Said()


def linear(*weights: float) -> nn.Linear:
    net = nn.Linear(len(weights), 1, bias=False)
    net.weight.data.copy_(torch.tensor([weights]))
    return net


def terms_of(net: nn.Module, x: Tensor, beta: float) -> dict[str, Tensor]:
    """Gradients 3x and 1x of the task (4x together), 2x of the KD loss, beta x of the adversarial branch."""
    y = net(x).sum()
    return {"task/loss_cls": 3 * y, "task/loss_bbox": y, "kd/my_loss": 2 * y, "kd/adv": beta * y}


def test_shares_are_the_closed_form(said: Said) -> None:
    net, x = linear(1.0, 2.0), torch.tensor([[3.0, 4.0]])
    calibration = Calibration(2, say=said)
    for scale in (1.0, 3.0):
        logs = calibration.observe(terms_of(net, scale * x, 0.5), net, beta=0.5)
        assert {k: float(v) for k, v in logs.items()} == pytest.approx(
            {"gradshare/task": 4 / 6.5, "gradshare/kd/my_l": 2 / 6.5, "gradshare/kd/adv": 0.5 / 6.5}
        )
        assert not any("loss" in key for key in logs)
    assert not calibration.active
    assert net.weight.grad is None
    rows = {row.name: row for row in calibration.report}
    assert rows["kd/my_loss"].ratio == pytest.approx(2 / 4)
    assert rows["kd/adv"].ratio == pytest.approx(0.5 / 6)
    assert rows["kd/adv"].share == pytest.approx(0.5 / 6.5)
    assert said.warnings == []
    assert len(said.facts) == 1
    assert calibration.observe(terms_of(net, x, 0.5), net, beta=0.5) == {}


@pytest.mark.parametrize("beta", [1e-4, 600.0])
def test_the_advised_beta_brings_the_branch_to_the_middle(said: Said, beta: float) -> None:
    net, x = linear(1.0, -2.0, 0.5), torch.tensor([[1.0, -1.0, 2.0]])
    calibration = Calibration(1, say=said)
    calibration.observe(terms_of(net, x, beta), net, beta=beta)
    (warning,) = said.warnings
    assert ("next to nothing" if beta < 1 else "swamps") in warning
    advised = float(warning.split("beta=")[1].split(" ")[0])
    again = Calibration(1, say=said)
    again.observe(terms_of(net, x, advised), net, beta=advised)
    # Two digits are printed; the middle of 0.01 .. 1.
    assert again.report[-1].ratio == pytest.approx(0.1, rel=0.05)
    assert again.report[-1].advice == ""


def test_a_kd_loss_outside_its_band_gets_a_factor(said: Said) -> None:
    net = linear(1.0)
    y = net(torch.ones(1, 1)).sum()
    Calibration(1, say=said).observe({"task/task": y, "kd/fgd": 1000 * y}, net, beta=0.0)
    (warning,) = said.warnings
    assert "kd/fgd" in warning
    assert "times 0.001 " in warning


def test_a_branch_that_does_not_reach_the_student_is_named(said: Said) -> None:
    net, other = linear(1.0), linear(2.0)
    x = torch.ones(1, 1)
    terms = {"task/task": net(x).sum(), "kd/adv": other(x).sum()}
    Calibration(1, say=said).observe(terms, net, beta=1.0)
    assert "reach the student" in said.warnings[0]


def test_steps_that_are_not_finite_are_left_out(said: Said) -> None:
    net, x = linear(1.0), torch.ones(1, 1)
    calibration = Calibration(3, say=said)
    for beta in (0.5, math.inf, 0.7):
        calibration.observe(terms_of(net, x, beta), net, beta=0.6)
    assert calibration.report[-1].ratio == pytest.approx(0.6 / 6)


def test_no_gradient_no_terms_and_resumed_runs_are_not_measured(said: Said) -> None:
    net, x = linear(1.0), torch.ones(1, 1)
    calibration = Calibration(2, say=said)
    with torch.no_grad():
        assert calibration.observe(terms_of(net, x, 0.1), net, beta=0.1) == {}
    assert calibration.observe({"task/task": net(x).sum()}, net, beta=0.1) == {}
    assert calibration.active
    assert calibration.observe(terms_of(net, x, 0.1), net, beta=0.1, step=2) == {}
    assert not calibration.active
    assert said.facts == said.warnings == []


def test_one_read_from_the_device(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = linear(1.0, 2.0), torch.ones(1, 2)
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *a, n=name, f=original, **k: (reads.append(n), f(self, *a, **k))[1]
        )
    calibration = Calibration(3, say=said)
    for k in range(3):
        assert reads == []
        calibration.observe(terms_of(net, x, 0.5), net, beta=0.5, step=k)
    assert reads == ["tolist"]


class Deep(nn.Module):
    """A net with running statistics whose block may be recomputed in backward."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "none":
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.recompute == "reentrant")


def step(net: Deep, calibration: Calibration | None) -> dict[str, Tensor]:
    """Gradients and buffers after a step; ``x`` needs a gradient for reentrant checkpointing to have one at all."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = net(x)
    terms = {"task/task": y.square().mean(), "kd/fgd": y.abs().mean(), "kd/adv": 0.1 * (y - 1).abs().mean()}
    if calibration is not None:
        calibration.observe(terms, net, beta=0.1)
    sum(terms.values()).backward()
    return {**{n: p.grad for n, p in net.named_parameters()}, **dict(net.named_buffers())}


@pytest.mark.parametrize("recompute", ["none", "plain"])
def test_the_step_is_the_same_bit_for_bit(said: Said, recompute: str) -> None:
    """Also where activation checkpointing runs the forward again, which would move the running statistics."""
    calibration = Calibration(1, say=said)
    measured, alone = step(Deep(recompute), calibration), step(Deep(recompute), None)
    assert calibration.report is not None
    for name, value in alone.items():
        assert torch.equal(measured[name], value), name


def test_reentrant_checkpointing_turns_it_off_with_a_message(said: Said) -> None:
    calibration = Calibration(5, say=said)
    measured, alone = step(Deep("reentrant"), calibration), step(Deep("reentrant"), None)
    assert not calibration.active
    assert "use_reentrant=False" in said.warnings[0]
    for name, value in alone.items():
        assert torch.equal(measured[name], value), name


def test_float16_gradients_do_not_vanish(said: Said) -> None:
    """The branch's gradient, 1e-8 a weight, is zero in float16; a float32 net of the same weights is the truth."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    x = torch.randn(4, 8)
    (truth,) = gradient_norms({"kd/adv": 1e-8 * net(x).sum()}, net).values()
    with torch.autocast("cpu", torch.float16):
        term = 1e-8 * net(x).sum().float()
        (found,) = gradient_norms({"kd/adv": term}, net).values()
        naive = torch.autograd.grad(term, list(net.parameters()))
    assert all(not g.any() for g in naive[:2])
    # Half precision has 11 bits; scaled by 4096 the gradient is 4e-5, subnormal, with about 9 of them left.
    assert float(found) == pytest.approx(float(truth), rel=0.01)


def test_a_distributed_step_reduces_once_and_as_without(said: Said) -> None:
    """One process: the reducer must see each parameter ready once, in backward, not in the measurement."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    class Step(nn.Module):
        def __init__(self, calibration: Calibration | None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.calibration = nn.Linear(4, 2), calibration

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            terms = {"task/task": y.square().mean(), "kd/adv": 0.1 * y.abs().mean()}
            if self.calibration is not None:
                self.calibration.observe(terms, self.net, beta=0.1)
            return sum(terms.values())

    x = torch.randn(3, 4)
    alone = Step(None)
    alone(x).backward()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        calls = []
        wrapped = DistributedDataParallel(Step(Calibration(2, say=said)))
        wrapped.register_comm_hook(None, lambda state, bucket: (calls.append(1), _done(bucket.buffer()))[1])
        for k in range(3):
            wrapped.zero_grad()
            total = wrapped(x)
            assert len(calls) == k
            total.backward()
            assert len(calls) == k + 1
            assert torch.equal(wrapped.module.net.weight.grad, alone.net.weight.grad)
    finally:
        distributed.destroy_process_group()
    assert len(said.facts) == 1


def _done(value: Tensor) -> torch.futures.Future:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(value)
    return future


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_bad_numbers_of_steps(steps) -> None:
    with pytest.raises(ValueError, match="write 0 for none"):
        Calibration(steps)
    with pytest.raises(ValueError, match="adv_band must be"):
        Calibration(1, adv_band=(1.0, 0.1))
