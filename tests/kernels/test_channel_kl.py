"""channel_kl against torch's kl_div and a closed form in float64: values, gradients, layouts, extremes, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.kernels import channel_kl
from ikd_fast.kernels.ops import backend
from ikd_fast.kernels.ops import channel_kl as kl_ops
from ikd_fast.kernels.reference import channel_kl as reference
from tests.kernels.pairs import assert_compiles_whole, assert_differentiable_once
from tests.tolerances import DTYPES, assert_gradient, assert_near, assert_value, gradcheck

SHAPES = [
    [(2, 3, 5, 7)],
    [(3, 16, 13, 9), (3, 8, 7, 5), (3, 24, 1, 2)],
    [(2, 21, 20, 33), (2, 13, 10, 17)],
]
FORMATS = [torch.contiguous_format, torch.channels_last]


def maps(shapes, dtype, seed=0, scale=1.0) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    s, t = (
        [(scale * torch.randn(x, generator=g, dtype=torch.float64)).to(dtype) for x in shapes]
        for _ in range(2)
    )
    return s, t


def truth(student: list[Tensor], teacher: list[Tensor], tau: float) -> Tensor:
    """``torch.nn.functional.kl_div`` over the positions, with autograd."""
    rows = []
    for s, t in zip(student, teacher, strict=True):
        log_s, p_t = (s / tau).flatten(2).log_softmax(2), (t / tau).flatten(2).softmax(2)
        rows.append(F.kl_div(log_s, p_t, reduction="none").sum((1, 2)))
    return torch.stack(rows)


@pytest.mark.parametrize("tau", [1.0, 4.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda x: "x".join(map(str, x[0])) + f"+{len(x) - 1}")
def test_value_and_gradient(shapes, dtype, tau) -> None:
    s, t = maps(shapes, dtype)
    upstream = torch.randn(
        len(shapes), shapes[0][0], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    mine, exact = [x.clone().requires_grad_() for x in s], [x.double().requires_grad_() for x in s]
    out = channel_kl(mine, t, tau)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.backward(upstream.to(out.dtype))
    want = truth(exact, [x.double() for x in t], tau)
    want.backward(upstream)
    assert_value(out, want, dtype)
    for a, b in zip(mine, exact, strict=True):
        assert a.grad.dtype == dtype
        assert_gradient(a.grad, b.grad, dtype)


def test_two_positions_by_hand() -> None:
    # P_T = (3/4, 1/4), P_S = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2), gradient (P_S - P_T) / tau
    t = torch.tensor([2 * math.log(3.0), 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    s = torch.zeros_like(t).requires_grad_()
    out = channel_kl([s], [t], 2.0)
    assert out.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-14)
    (grad,) = torch.autograd.grad(out.sum(), s)
    assert grad.flatten().tolist() == pytest.approx([-0.125, 0.125], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_large_maps_go_in_chunks(dtype, layout) -> None:
    s, t = ([x.to(memory_format=layout) for x in y] for y in maps([(2, 37, 65, 63)], dtype))
    assert len(list(reference._chunks(s[0]))) == 4  # of 32 channels and 5, an image
    s = [x.requires_grad_() for x in s]
    exact = [x.detach().double().requires_grad_() for x in s]
    out, want = channel_kl(s, t), truth(exact, [x.double() for x in t], 1.0)
    assert_value(out, want, dtype)
    upstream = torch.tensor([[1.5, -0.25]])
    (grad,) = torch.autograd.grad((out * upstream).sum(), s)
    (wanted,) = torch.autograd.grad((want * upstream.double()).sum(), exact)
    assert grad.stride() == s[0].stride()
    assert_gradient(grad, wanted, dtype)


def test_layouts_give_the_same() -> None:
    s, t = maps([(2, 6, 8, 10)], torch.float32)
    want = channel_kl(s, t)
    last = [x.to(memory_format=torch.channels_last) for x in s]
    wide = torch.zeros(2, 6, 8, 20)
    wide[..., ::2] = s[0]
    for view in (last, [wide[..., ::2]]):
        assert_value(channel_kl(view, t), want, torch.float32)
        other = [x.to(memory_format=torch.channels_last) for x in t]
        assert_value(channel_kl(view, other), want, torch.float32)


def test_student_and_teacher_may_differ_in_dtype() -> None:
    s, t = maps([(2, 3, 5, 7)], torch.bfloat16)[0], maps([(2, 3, 5, 7)], torch.float64)[1]
    out = channel_kl([s[0].requires_grad_()], t)
    assert out.dtype == torch.float64
    assert_value(out, truth([s[0].double()], t, 1.0), torch.float64)
    (grad,) = torch.autograd.grad(out.sum(), s)
    assert grad.dtype == torch.bfloat16


def test_gradcheck() -> None:
    s, t = maps([(2, 3, 3, 2), (2, 2, 1, 3)], torch.float64)
    gradcheck(lambda *x: channel_kl(list(x), t, 2.0), *(x.requires_grad_() for x in s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_maps_give_zero_and_no_gradient(dtype) -> None:
    t = maps([(2, 4, 6, 5)], dtype)[0]
    s = [x.clone().requires_grad_() for x in t]
    out = channel_kl(s, t)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert torch.equal(s[0].grad, torch.zeros_like(t[0]))


def test_one_position_and_constant_channels() -> None:
    """A distribution over one position, and two uniform ones: no divergence, no gradient, whatever the constants."""
    for shape in ((2, 3, 1, 1), (2, 3, 4, 5)):
        s, t = torch.full(shape, 7.25, requires_grad=True), torch.full(shape, -3.5)
        out = channel_kl([s], [t])
        assert torch.equal(out, torch.zeros(1, 2))
        (grad,) = torch.autograd.grad(out.sum(), s)
        assert torch.equal(grad, torch.zeros(shape))


def test_a_constant_in_a_channel_changes_nothing() -> None:
    s, t = maps([(2, 4, 6, 5)], torch.float64)
    shift = torch.randn(2, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert channel_kl([t[0] + shift], t).max() < 1e-13
    assert_value(channel_kl([s[0] + shift], t), channel_kl(s, t), torch.float64)
    assert (channel_kl(s, t) > 0).all()
    # Far from zero as well: multiples of 1/64 and 2^17 are added without rounding in float32.
    s, t = ([(x * 64).round().div(64).float() for x in y] for y in (s, t))
    far = [[x + 2.0**17 for x in s], [x - 2.0**17 for x in t]]
    assert torch.equal(channel_kl(*far), channel_kl(s, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_maps_do_not_overflow(dtype) -> None:
    # Where the student's tail underflows: one position against another, 1000 apart.
    peak = torch.zeros(1, 1, 2, 2, dtype=dtype)
    peak[..., 0, 0] = 1000.0
    s = peak.clone().requires_grad_()
    out = channel_kl([s], [peak.flip(-1)])
    assert out.item() == pytest.approx(1000.0, rel=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), s)
    assert grad.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]
    s, t = maps([(1, 8, 9, 9)], dtype, scale=1e4 / math.sqrt(8 * 81))  # maps of norm 1e4
    assert_value(channel_kl(s, t), truth([s[0].double()], [t[0].double()], 1.0), dtype)


def test_what_is_not_finite_is_not_hidden() -> None:
    s, t = maps([(2, 3, 4, 5)], torch.float32)
    clean = channel_kl(s, t)
    for value in (float("nan"), float("inf"), float("-inf")):
        for side in (0, 1):
            pair = [s[0].clone(), t[0].clone()]
            pair[side][1, 2, 0, 3] = value
            out = channel_kl([pair[0]], [pair[1]])
            assert torch.equal(out[0, 0], clean[0, 0])
            assert not out[0, 1].isfinite(), (value, side)
            pair[side][1, 2] = value
            assert not channel_kl([pair[0]], [pair[1]])[0, 1].isfinite(), (value, side)


def test_not_negative_where_rounding_is_all_there_is() -> None:
    t = maps([(8, 16, 9, 9)], torch.float32)[1]
    s = [t[0] * (1 + 1e-6)]
    out = channel_kl(s, t)
    assert (out >= 0).all()
    # 16 channels of rounding: a few 2^-24 each, of logarithms near log(81)
    assert out.max() < 16 * 4.4 * 2.0**-22


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape) -> None:
    x = torch.zeros(shape, requires_grad=True)
    out = channel_kl([x], [x.detach()])
    assert torch.equal(out, torch.zeros(1, shape[0]))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.shape == shape


def test_autocast_changes_nothing() -> None:
    s, t = maps([(2, 8, 9, 9)], torch.float32)
    want = channel_kl(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(channel_kl(s, t), want)


def test_registered_operation_passes_opcheck() -> None:
    s, t = maps([(2, 3, 4, 5), (2, 6, 1, 2)], torch.float32)
    torch.library.opcheck(kl_ops._op, ([x.clone().requires_grad_() for x in s], t, 2.0, "auto"))
    _, stats = kl_ops._op(s, t, 2.0, "auto")
    torch.library.opcheck(kl_ops._op_backward, (torch.randn(2, 2), s, t, stats, 2.0, "auto"))


def test_compiled_whole_equals_eager() -> None:
    s, t = maps([(2, 3, 4, 5), (2, 6, 1, 2)], torch.float32)
    weight = torch.tensor([1.0, 3.0])

    def loss(student, teacher):
        return (channel_kl(student, teacher, 2.0).sqrt().sum(1) * weight).sum()

    assert_compiles_whole(loss, s, t)


def test_a_second_derivative_is_refused() -> None:
    assert_differentiable_once(channel_kl)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(tau) -> None:
    x = [torch.zeros(1, 1, 2, 2)]
    with pytest.raises(ValueError, match="channel_kl: the temperature must be a finite number > 0"):
        channel_kl(x, x, tau)


def test_errors(monkeypatch) -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="1 student and 2 teacher levels"):
        channel_kl([x], [x, x])
    with pytest.raises(ValueError, match="got 0 student"):
        channel_kl([], [])
    with pytest.raises(ValueError, match=r"level 0.*student \(2, 3, 4, 4\) and teacher \(2, 3, 4, 5\)"):
        channel_kl([x], [torch.zeros(2, 3, 4, 5)])
    with pytest.raises(ValueError, match=r"level 1: expected maps \[2,C,H,W\]"):
        channel_kl([x, x[:1]], [x, x[:1]])
    with pytest.raises(TypeError, match=r"level 0.*torch.int64"):
        channel_kl([x.long()], [x.long()])
    with pytest.raises(TypeError, match=r"level 1: expected torch.float32 as the student map of level 0"):
        channel_kl([x, x.half()], [x, x])
    with pytest.raises(ValueError, match=r"level 0.*meta"):
        channel_kl([x], [x.to("meta")])
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        channel_kl([x], [x.clone().requires_grad_()])
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        channel_kl([x], [x], backend="cuda")
    with pytest.raises(
        TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch.float64"
    ):
        channel_kl([x.double()], [x.double()], backend="triton")
    monkeypatch.setattr(backend, "triton_problem", lambda: "triton does not import (made up)")
    with pytest.raises(RuntimeError, match=r"backend='triton' was asked for, but triton does not import"):
        channel_kl([x], [x], backend="triton")


def test_the_reference_keeps_what_the_backward_needs() -> None:
    s, t = maps([(2, 3, 4, 5), (2, 2, 1, 3)], torch.float64)
    _, stats = reference.forward(s, t, 2.0)
    for x, top, log in ((s, stats[0], stats[2]), (t, stats[1], stats[3])):
        whole = torch.cat([(m / 2.0).flatten(2).logsumexp(2).flatten() for m in x])
        assert_near(top / 2.0 + log, whole, 1e-14)
