"""Sigmoid focal loss, served through mmcv.ops, against its definition in float64 and mmdet's Python version."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ikd_fast.mmdet  # noqa: F401  activates compat before mmcv.ops is imported
from ikd_fast.mmdet.compat.focal import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward


def definition(
    logits: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None = None
) -> Tensor:
    """Eq. 5 of the focal loss paper, entry by entry in float64; differentiable."""
    p = logits.double().sigmoid()
    rows = []
    for n in range(len(p)):
        row = []
        for c in range(p.size(1)):
            if int(target[n]) == c:
                value = -alpha * (1 - p[n, c]) ** gamma * torch.log(p[n, c])
            else:
                value = -(1 - alpha) * p[n, c] ** gamma * torch.log(1 - p[n, c])
            if weight is not None and int(target[n]) < p.size(1):
                value = value * weight[target[n]].double()
            row.append(value)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def sample(n: int = 17, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator) * 3
    target = torch.randint(0, classes + 1, (n,), generator=generator)  # `classes` is background
    assert (target == classes).any()
    return logits, target


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.4), (0.0, 0.5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_equal_the_definition(gamma: float, alpha: float, weighted: bool) -> None:
    from mmcv.ops import sigmoid_focal_loss

    logits, target = sample()
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0]) if weighted else None
    exact_logits = logits.double().requires_grad_()
    exact = definition(exact_logits, target, gamma, alpha, weight)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_logits)

    ours_logits = logits.clone().requires_grad_()
    ours = sigmoid_focal_loss(ours_logits, target, gamma, alpha, weight, "none")
    (grad,) = torch.autograd.grad(ours.sum(), ours_logits)
    # A dozen float32 roundings (6e-8 each), a few of them raised to the power gamma.
    torch.testing.assert_close(ours.double(), exact.detach(), rtol=2e-6, atol=1e-9)
    # The gradient subtracts terms of like size, so the bound is relative to the largest gradient.
    torch.testing.assert_close(
        grad.double(), exact_grad, rtol=2e-6, atol=2e-6 * float(exact_grad.abs().max())
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_and_their_gradients(reduction: str) -> None:
    from mmcv.ops import sigmoid_focal_loss

    logits, target = sample()
    exact_logits = logits.double().requires_grad_()
    exact = definition(exact_logits, target, 2.0, 0.25).sum()
    if reduction == "mean":
        exact = exact / len(logits)  # mmcv's mean is over rows
    (exact_grad,) = torch.autograd.grad(exact, exact_logits)
    double = logits.double().requires_grad_()
    ours = sigmoid_focal_loss(double, target, 2.0, 0.25, None, reduction)
    (grad,) = torch.autograd.grad(ours, double)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-15)


def test_equals_mmdet_python_version() -> None:
    from mmcv.ops import sigmoid_focal_loss
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    logits, target = sample(64, 7)
    one_hot = torch.nn.functional.one_hot(target, 8)[:, :7]
    theirs_logits, ours_logits = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    theirs = py_sigmoid_focal_loss(theirs_logits, one_hot, gamma=2.0, alpha=0.25, reduction="none")
    ours = sigmoid_focal_loss(ours_logits, target, 2.0, 0.25, None, "none")
    torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=1e-8)  # both float32, in another order
    theirs.sum().backward()
    ours.sum().backward()
    torch.testing.assert_close(ours_logits.grad, theirs_logits.grad, rtol=5e-6, atol=1e-6)


def test_by_hand_at_logit_zero() -> None:
    output = torch.empty(2, 1)
    sigmoid_focal_loss_forward(
        torch.zeros(2, 1), torch.tensor([0, 1]), torch.empty(0), output, gamma=2.0, alpha=0.25
    )
    # p = 1/2: 1/4 * 1/4 * ln 2 and 3/4 * 1/4 * ln 2.
    assert output.flatten().tolist() == pytest.approx([math.log(2) / 16, 3 * math.log(2) / 16], rel=1e-6)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_finite_where_the_sigmoid_saturates(logit: float) -> None:
    logits, target = torch.full((2, 1), logit), torch.tensor([0, 1])
    output, grad = torch.empty(2, 1), torch.empty(2, 1)
    sigmoid_focal_loss_forward(logits, target, torch.empty(0), output, gamma=2.0, alpha=0.25)
    sigmoid_focal_loss_backward(logits, target, torch.empty(0), grad, gamma=2.0, alpha=0.25)
    # A wrong, certain answer costs alpha_t |x| with slope alpha_t; a right one nothing.
    loss, slope = ([50.0, 0.0], [-0.25, 0.0]) if logit < 0 else ([0.0, 150.0], [0.0, 0.75])
    assert output.flatten().tolist() == pytest.approx(loss, abs=1e-30)
    assert grad.flatten().tolist() == pytest.approx(slope, abs=1e-30)


def test_half_precision_is_computed_in_float32() -> None:
    logits, target = sample()
    half = logits.half()
    output, expected = torch.empty_like(half), torch.empty_like(logits)
    sigmoid_focal_loss_forward(half, target, torch.empty(0), output, gamma=2.0, alpha=0.25)
    sigmoid_focal_loss_forward(half.float(), target, torch.empty(0), expected, gamma=2.0, alpha=0.25)
    assert torch.equal(output, expected.half())


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits \[N, C\] and targets \[N\], got \(3, 2\) and \(4,\)"):
        sigmoid_focal_loss_forward(
            torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), torch.empty(0), torch.empty(3, 2), 2.0, 0.25
        )
