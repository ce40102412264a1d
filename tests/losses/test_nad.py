"""NADLoss against its closed form in float64; golden value, scale invariance, weights, extremes, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.losses.nad import NADLoss
from tests.losses.published import golden_context, golden_maps
from tests.losses.setups import assert_kernels_agree, context, pyramid
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck


def closed_form(s: Tensor, t: Tensor, p: float, eps: float = 1e-6) -> Tensor:
    maps = []
    for x in (s, t):
        rows = []
        for image in x:
            a = sum(channel.abs() ** p for channel in image)
            rows.append(a / ((a * a).sum().sqrt() + eps))
        maps.append(torch.stack(rows))
    return ((maps[0] - maps[1]) ** 2).sum() / maps[0].numel()


def test_golden_value() -> None:
    s, t = golden_maps()
    # Seven digits are printed: half a unit of the last one.
    assert NADLoss(weight=1.0)([s], [t], golden_context())["0"].item() == pytest.approx(2.558466e-4, rel=2e-7)


@pytest.mark.parametrize("p", [1, 2, 2.5, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient_against_the_closed_form(dtype, p) -> None:
    s, t = pyramid(7, 1, dtype=dtype), pyramid(7, 2, dtype=dtype)
    mine, truth = ([x.detach().clone().to(d).requires_grad_() for x in s] for d in (dtype, torch.float64))
    got = NADLoss(p=p, weight=(500.0, 1000.0, 2000.0))(mine, t, context())
    want = [w * closed_form(a, b.double(), p) for w, a, b in zip((500, 1000, 2000), truth, t, strict=True)]
    for value, expected in zip(got.values(), want, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=TOLERANCES[dtype].value)
    sum(got.values()).backward()
    sum(want).backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, b.grad, 2 * TOLERANCES[dtype].gradient, "student maps")


@pytest.mark.parametrize("p", [1, 2, 3])
def test_gradcheck(p) -> None:
    s, t = (pyramid(3, k, dtype=torch.float64, levels=((3, 4),)) for k in (1, 2))
    loss, ctx = NADLoss(p=p, weight=10.0), context()
    gradcheck(lambda x: loss([x], t, ctx)["0"], s[0].requires_grad_())


def test_zero_at_equal_maps_with_zero_gradient() -> None:
    t = pyramid(5, 1)
    s = [x.clone().requires_grad_() for x in t]
    values = NADLoss()(s, t, context())
    assert all(v.item() == 0 for v in values.values())
    sum(values.values()).backward()
    assert all(x.grad.abs().max() == 0 for x in s)


def test_scale_of_either_side_changes_nothing() -> None:
    s, t = (pyramid(5, k, dtype=torch.float64) for k in (1, 2))
    loss = NADLoss(eps=1e-12)
    want = loss(s, t, context())
    for a, b in ((0.5, 1.0), (1.0, 300.0), (-7.0, 0.1)):
        got = loss([a * x for x in s], [b * x for x in t], context())
        for key, value in want.items():
            assert got[key].item() == pytest.approx(value.item(), rel=1e-9)  # eps against norms above 1e-2
    # signs and the order of channels do not count either
    turned = loss([-x.flip(1) for x in s], t, context())
    assert all(turned[k].item() == pytest.approx(v.item(), rel=1e-12) for k, v in want.items())


@pytest.mark.parametrize("fill", [0.0, 3.0, 1e-20])
def test_constant_maps_have_finite_gradients(fill) -> None:
    s = [torch.full_like(x, fill).requires_grad_() for x in pyramid(5, 1)]
    values = NADLoss()(s, pyramid(5, 2), context())
    sum(values.values()).backward()
    assert all(v.isfinite() and v > 0 for v in values.values())
    assert all(x.grad.isfinite().all() for x in s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_maps_do_not_overflow(dtype) -> None:
    s, t = ([x.mul(1e4 / 3).clamp(-6e4, 6e4).to(dtype) for x in pyramid(64, k)] for k in (1, 2))
    # Maps to the fourth reach 1e18 and the squares in their length 1e36 each: past float32 in sum.
    for p in (2, 4):
        mine = [x.clone().requires_grad_() for x in s]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = NADLoss(p=p, weight=1.0)(mine, t, context())
        for value, a, b in zip(got.values(), s, t, strict=True):
            want = closed_form(a.double(), b.double(), p)
            assert value.item() == pytest.approx(want.item(), rel=2e-5)
        sum(got.values()).backward()
        assert all(x.grad.isfinite().all() for x in mine)


def test_what_does_not_fit_shows() -> None:
    s, t = pyramid(4, 1), pyramid(4, 2)
    s[0][0, 0, 0, 0] = float("nan")
    s[1][0, 0, 0, 0] = float("inf")
    got = NADLoss()(s, t, context())
    assert got["0"].isnan()
    assert got["1"].isnan()
    assert got["2"].isfinite()


def test_channels_need_not_agree() -> None:
    s, t = pyramid(4, 1), pyramid(9, 2)
    loss = NADLoss()
    want = [w * closed_form(a, b, 2) for w, a, b in zip((500, 1000, 1000), s, t, strict=True)]
    for _ in range(2):  # not bound, and bound
        got = loss(s, t, context())
        for value, expected in zip(got.values(), want, strict=True):
            assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.bind([4] * 3, [9] * 3)
    assert not list(loss.parameters())
    with pytest.raises(ValueError, match=r"bound to \(student, teacher\) channels \(4, 9\), got \(5, 9\)"):
        loss(pyramid(5, 1), t, context())


def test_bad_input() -> None:
    for p in (0.5, 0, -1):
        with pytest.raises(ValueError, match="NADLoss: the exponent p must be >= 1"):
            NADLoss(p=p)
    for p in (float("inf"), "2"):
        with pytest.raises(ValueError, match="NADLoss: p must be a finite number"):
            NADLoss(p=p)
    with pytest.raises(ValueError, match="eps must be a finite number > 0"):
        NADLoss(eps=0.0)
    with pytest.raises(ValueError, match=r"weight\[1\] must be a finite number"):
        NADLoss(weight=(1.0, float("nan")))
    with pytest.raises(ValueError, match="one a level, got an empty sequence"):
        NADLoss(weight=())
    with pytest.raises(ValueError, match=r"one weight for each of the 2 levels \[0, 1\], got 3"):
        NADLoss(levels=(0, 1))
    s, t = pyramid(4, 1), pyramid(4, 2)
    with pytest.raises(ValueError, match=r"one weight for each of the 3 levels \[0, 1, 2\], got 2"):
        NADLoss(weight=(1.0, 2.0))(s, t, context())
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        NADLoss()(s, [x.clone().requires_grad_() for x in t], context())
    with pytest.raises(ValueError, match="nothing is resized"):
        NADLoss()(s, t[::-1], context())
    with pytest.raises(ValueError, match=r"levels=\(5,\), but the pyramid has 3 levels"):
        NADLoss(weight=1.0, levels=(5,))(s, t, context())
    assert NADLoss(weight=2.0, levels=(1,))(s, t, context()).keys() == {"1"}


def test_kernels_give_the_same_loss() -> None:
    assert_kernels_agree(NADLoss, student=5, teacher=6)
