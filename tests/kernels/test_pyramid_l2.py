"""pyramid_l2, pyramid_l1 and channel_kl against float64 loops: values, gradients, layouts, dtypes, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import channel_kl, pyramid_l1, pyramid_l2
from tests.tolerances import DTYPES, TOLERANCES, assert_gradient, assert_value, gradcheck


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SHAPES = [
    [(1, 1, 1, 1)],
    [(2, 3, 5, 7)],
    [(3, 16, 13, 9), (3, 8, 7, 5), (3, 24, 1, 1)],
    [(2, 21, 20, 33), (2, 13, 10, 17)],
]


def slow_l2(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([((s[i] - t[i]) ** 2).sum() for i in range(len(s))])


def slow_l1(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(s[i] - t[i]).abs().sum() for i in range(len(s))])


def slow_kl(s: Tensor, t: Tensor) -> Tensor:
    rows = []
    for i in range(len(s)):
        total = s.new_zeros(())
        for c in range(s.shape[1]):
            p, q = (t[i, c] / 2.0).reshape(-1).softmax(0), (s[i, c] / 2.0).reshape(-1).softmax(0)
            total = total + (p * (p / q).log()).sum()
        rows.append(total)
    return torch.stack(rows)


OPS = [
    pytest.param(pyramid_l2, slow_l2, id="l2"),
    pytest.param(pyramid_l1, slow_l1, id="l1"),
    pytest.param(lambda s, t: channel_kl(s, t, 2.0), slow_kl, id="kl"),
]


def maps(shapes, dtype, seed=0) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    s, t = ([torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in shapes] for _ in range(2))
    return s, t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda x: "x".join(map(str, x[0])) + f"+{len(x) - 1}")
@pytest.mark.parametrize(("op", "slow"), OPS)
def test_value_and_gradient(op, slow, shapes, dtype) -> None:
    s, t = maps(shapes, dtype)
    upstream = torch.randn(len(shapes), shapes[0][0], dtype=torch.float64)
    mine = [x.clone().requires_grad_() for x in s]
    out = op(mine, t)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.backward(upstream.to(out.dtype))
    truth = [x.double().requires_grad_() for x in s]
    expected = torch.stack([slow(a, b.double()) for a, b in zip(truth, t, strict=True)])
    expected.backward(upstream)
    if shapes[0][2:] == (1, 1) and slow is slow_kl:
        assert torch.equal(out, torch.zeros_like(out))  # one position: both distributions are the same
        return
    assert_value(out, expected, dtype)
    for a, b in zip(mine, truth, strict=True):
        if slow is slow_kl and a[0, 0].numel() == 1:
            assert torch.equal(a.grad, torch.zeros_like(a))
        else:
            assert a.grad.dtype == dtype
            assert_gradient(a.grad, b.grad, dtype)


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_layouts_give_the_same(op, slow) -> None:
    s, t = maps([(2, 6, 8, 10)], torch.float32)
    want = op(s, t)
    last = [x.to(memory_format=torch.channels_last) for x in s]
    wide = torch.zeros(2, 6, 8, 20)
    wide[..., ::2] = s[0]
    for view in (last, [wide[..., ::2]]):
        assert_value(op(view, t), want, torch.float32)
        assert_value(op(view, [x.to(memory_format=torch.channels_last) for x in t]), want, torch.float32)


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_gradcheck(op, slow) -> None:
    s, t = maps([(2, 3, 3, 2), (2, 2, 1, 3)], torch.float64)
    gradcheck(lambda *x: op(list(x), t), *(x.requires_grad_() for x in s))


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_equal_maps_give_zero_and_no_gradient(op, slow) -> None:
    t = maps([(2, 4, 6, 5)], torch.float32)[0]
    s = [x.clone().requires_grad_() for x in t]
    out = op(s, t)
    assert torch.equal(out, torch.zeros(1, 2))
    out.sum().backward()
    assert s[0].grad.abs().max() <= 1e-7  # kl: p - q of two equal softmaxes


def test_channel_kl_ignores_a_constant_per_channel_and_is_not_negative() -> None:
    s, t = maps([(2, 4, 6, 5)], torch.float64)
    shift = torch.randn(2, 4, 1, 1, dtype=torch.float64)
    assert channel_kl([t[0] + shift], t).abs().max() < 1e-13
    assert_value(channel_kl([s[0] + shift], t), channel_kl(s, t), torch.float64)
    assert (channel_kl(s, t) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_maps_do_not_overflow(dtype) -> None:
    s, t = (
        [torch.full((1, 256, 10, 10), 150.0, dtype=dtype)],
        [torch.full((1, 256, 10, 10), -150.0, dtype=dtype)],
    )
    assert pyramid_l2(s, t).item() == pytest.approx(300.0**2 * 25600, rel=TOLERANCES[dtype].value)
    # A softmax whose student tail underflows: log_softmax keeps it finite.
    peak = torch.zeros(1, 1, 2, 2, dtype=dtype)
    peak[..., 0, 0] = 1000.0
    assert channel_kl([peak], [peak.flip(-1)]).item() == pytest.approx(1000.0, rel=1e-6)


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_autocast_changes_nothing(op, slow) -> None:
    s, t = maps([(2, 8, 9, 9)], torch.float32)
    want = op(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(s, t), want)


@pytest.mark.parametrize("op", [pyramid_l2, pyramid_l1, channel_kl])
def test_errors(op) -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="1 student and 2 teacher levels"):
        op([x], [x, x])
    with pytest.raises(ValueError, match="got 0 student"):
        op([], [])
    with pytest.raises(ValueError, match=r"level 0.*student \(2, 3, 4, 4\) and teacher \(2, 3, 4, 5\)"):
        op([x], [torch.zeros(2, 3, 4, 5)])
    with pytest.raises(ValueError, match=r"level 1: expected maps \[2,C,H,W\]"):
        op([x, x[:1]], [x, x[:1]])
    with pytest.raises(TypeError, match=r"level 0.*torch.int64"):
        op([x.long()], [x.long()])
    with pytest.raises(ValueError, match=r"level 0.*meta"):
        op([x], [x.to("meta")])
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        op([x], [x.clone().requires_grad_()])


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(tau) -> None:
    x = [torch.zeros(1, 1, 2, 2)]
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        channel_kl(x, x, tau)
