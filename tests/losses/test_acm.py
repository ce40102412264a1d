"""ACMLoss against its formula in float64; what can be plugged in, extremes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ikd_fast.losses.acm import ACMLoss
from tests.losses.setups import assert_kernels_agree, context, pyramid
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck

G = {
    "relu_mean": lambda x: x.relu().mean((2, 3)),
    "abs_mean": lambda x: x.abs().mean((2, 3)),
    "mean": lambda x: x.mean((2, 3)),
}
NORMS = {
    "l2": lambda d: (d * d).sum(1).sqrt(),
    "l1": lambda d: d.abs().sum(1),
    "square": lambda d: (d * d).sum(1),
}


def formula(s: Tensor, t: Tensor, g: str = "relu_mean", normalize: bool = True, norm: str = "l2") -> Tensor:
    vectors = [G[g](x) for x in (s, t)]
    if normalize:
        vectors = [v / ((v * v).sum(1, keepdim=True).sqrt() + 1e-6) for v in vectors]
    return NORMS[norm](vectors[0] - vectors[1]).mean()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("g", "norm"), [(g, "l2") for g in G] + [("relu_mean", n) for n in ("l1", "square")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient_against_the_formula(dtype, g, norm, normalize) -> None:
    s, t = pyramid(7, 1, dtype=dtype), pyramid(7, 2, dtype=dtype)
    mine, truth = ([x.detach().clone().to(d).requires_grad_() for x in s] for d in (dtype, torch.float64))
    got = ACMLoss(weight=3.0, g=g, norm=norm, normalize=normalize)(mine, t, context())
    want = [3 * formula(a, b.double(), g, normalize, norm) for a, b in zip(truth, t, strict=True)]
    for value, expected in zip(got.values(), want, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=TOLERANCES[dtype].value)
    sum(got.values()).backward()
    sum(want).backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient, "student maps")


@pytest.mark.parametrize("g", list(G))
def test_gradcheck(g) -> None:
    s, t = (pyramid(3, k, dtype=torch.float64, levels=((3, 4),)) for k in (1, 2))
    loss, ctx = ACMLoss(g=g), context()
    gradcheck(lambda x: loss([x], t, ctx)["0"], s[0].requires_grad_())


def test_by_hand() -> None:
    s = torch.tensor([[[[6.0, -2.0]], [[8.0, -9.0]]]])  # means of positive parts: 3, 4
    t = torch.tensor([[[[-1.0, -1.0]], [[2.0, 0.0]]]])  # 0, 1
    assert ACMLoss()([s], [t], context(1))["0"].item() == pytest.approx(math.hypot(0.6, -0.2), rel=1e-6)
    raw = ACMLoss(normalize=False, norm="l1", weight=0.5)([s], [t], context(1))["0"]
    assert raw.item() == pytest.approx(0.5 * 6, rel=1e-6)


def test_functions_may_be_plugged_in() -> None:
    s, t = pyramid(5, 1), pyramid(5, 2)
    loss = ACMLoss(g=lambda x: x.amax((2, 3)), norm=lambda d: d.abs().amax(1), normalize=False)
    got = loss(s, t, context())
    for value, a, b in zip(got.values(), s, t, strict=True):
        want = (a.amax((2, 3)) - b.amax((2, 3))).abs().amax(1).mean()
        assert value.item() == pytest.approx(want.item(), rel=1e-6)
    built_in = ACMLoss()(s, t, context())
    own = ACMLoss(g=lambda x: x.relu().mean((2, 3)), norm=torch.linalg.vector_norm)
    with pytest.raises(ValueError, match=r"the function norm to give a tensor \(2,\), got \(\)"):
        own(s, t, context())
    own = ACMLoss(g=lambda x: x.relu().mean((2, 3)), norm=lambda d: d.norm(dim=1))(s, t, context())
    assert all(own[k].item() == pytest.approx(v.item(), rel=1e-5) for k, v in built_in.items())
    with pytest.raises(ValueError, match=r"the function g to give a tensor \(2, 5\), got \(2,\)"):
        ACMLoss(g=lambda x: x.mean((1, 2, 3)))(s, t, context())


def test_zero_at_equal_maps_with_zero_gradient() -> None:
    t = pyramid(5, 1)
    for norm in NORMS:
        s = [x.clone().requires_grad_() for x in t]
        values = ACMLoss(norm=norm)(s, t, context())
        assert all(v.item() == 0 for v in values.values())
        sum(values.values()).backward()
        assert all(x.grad.abs().max() == 0 for x in s)


def test_scale_changes_nothing_and_negative_entries_count_for_nothing() -> None:
    s, t = (pyramid(5, k, dtype=torch.float64) for k in (1, 2))
    loss = ACMLoss(eps=1e-12)
    want = loss(s, t, context())
    lower = [torch.where(x < 0, 5 * x, 3 * x) for x in s]
    got = loss(lower, [0.1 * x for x in t], context())
    assert all(got[k].item() == pytest.approx(v.item(), rel=1e-9) for k, v in want.items())


@pytest.mark.parametrize("fill", [0.0, -2.0, 3.0])
def test_constant_maps_have_finite_gradients(fill) -> None:
    s = [torch.full_like(x, fill).requires_grad_() for x in pyramid(5, 1)]
    values = ACMLoss()(s, pyramid(5, 2), context())
    sum(values.values()).backward()
    assert all(v.isfinite() and v > 0 for v in values.values())
    assert all(x.grad.isfinite().all() for x in s)


def test_large_half_maps_do_not_overflow() -> None:
    s, t = ([x.mul(1e4 / 3).clamp(-6e4, 6e4).half() for x in pyramid(64, k)] for k in (1, 2))
    mine = [x.clone().requires_grad_() for x in s]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ACMLoss(normalize=False, norm="square")(mine, t, context())
    for value, a, b in zip(got.values(), s, t, strict=True):
        want = formula(a.double(), b.double(), normalize=False, norm="square")
        assert value.item() > 65504
        assert value.item() == pytest.approx(want.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() for x in mine)
    s[0][0, 0, 0, 0] = float("nan")
    assert ACMLoss()(s, t, context())["0"].isnan()


def test_weights_and_align_layer() -> None:
    s, t = pyramid(4, 1), pyramid(6, 2)
    loss = ACMLoss(weight=(1.0, 0.5), levels=(0, 2))
    with pytest.raises(RuntimeError, match=r"call bind\(\[4, 4, 4\], \[6, 6, 6\]\)"):
        loss(s, t, context())
    loss.bind([4] * 3, [6] * 3)
    got = loss(s, t, context())
    assert got.keys() == {"0", "2"}
    for key, weight in (("0", 1.0), ("2", 0.5)):
        level = int(key)
        want = weight * formula(loss.align[key](s[level]), t[level])
        assert got[key].item() == pytest.approx(want.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"g must be one of 'relu_mean', 'abs_mean', 'mean' or a function, got 'max'"
    ):
        ACMLoss(g="max")
    with pytest.raises(ValueError, match=r"norm must be one of 'l2', 'l1', 'square' or a function, got 3"):
        ACMLoss(norm=3)
    with pytest.raises(ValueError, match="eps must be a finite number > 0"):
        ACMLoss(eps=-1.0)
    with pytest.raises(ValueError, match="weight must be a finite number"):
        ACMLoss(weight="1")
    with pytest.raises(ValueError, match=r"one weight for each of the 1 levels \[0\], got 2"):
        ACMLoss(weight=(1.0, 2.0), levels=(0,))
    s, t = pyramid(4, 1), pyramid(4, 2)
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        ACMLoss()(s, [x.clone().requires_grad_() for x in t], context())
    with pytest.raises(ValueError, match=r"levels=\(5,\), but the pyramid has 3 levels"):
        ACMLoss(levels=(5,))(s, t, context())


def test_kernels_give_the_same_loss() -> None:
    assert_kernels_agree(ACMLoss, student=5, teacher=5)
