"""SSIMLoss: golden values, kornia's loss, invariances, rescaling and its gradient, small levels, precision, errors."""

from __future__ import annotations

import math

import pytest
import torch

from ikd_fast.losses import preset_names, preset_values
from ikd_fast.losses.registry import build_loss
from ikd_fast.losses.ssim import RESCALES, SSIMLoss, rescale
from tests.kernels.test_ssim import slow
from tests.losses.published import golden_context, golden_maps
from tests.losses.setups import context, pyramid
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck

# Levels 1 and 2 are too small for a window of 11: 11 of 12 rows, 11 of 6, 7 of 4 by 4.
LEVELS = ((12, 16), (6, 8), (3, 4))


def rescaled(x, how):
    """Each group's minimum and maximum from a loop over its elements."""
    n, c = x.shape[:2]
    groups = {
        "image": [(i, slice(None)) for i in range(n)],
        "batch": [(slice(None), slice(None))],
        "channel": [(i, k) for i in range(n) for k in range(c)],
    }[how]
    out = x.clone()
    for g in groups:
        low, high = x[g].min(), x[g].max()
        out[g] = (x[g] - low) / max(high - low, torch.tensor(1e-6))
    return out


@pytest.mark.parametrize(("window", "expected"), [(11, 0.0375904507), (5, 0.0428459465)])
def test_golden(window, expected) -> None:
    s, t = golden_maps()
    loss = SSIMLoss(weight=1.0, window=window)
    # half a unit of the last printed digit
    assert float(loss([s], [t], golden_context())["0"]) == pytest.approx(expected, abs=5e-11)
    assert float(SSIMLoss(window=window)([s], [t], golden_context())["0"]) == pytest.approx(
        4 * expected, abs=2e-10
    )


@pytest.mark.parametrize("how", RESCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(how, dtype) -> None:
    s, t = pyramid(5, 1, dtype=dtype, levels=LEVELS), pyramid(5, 2, dtype=dtype, levels=LEVELS)
    mine, truth = [x.clone().requires_grad_() for x in s], [x.double().requires_grad_() for x in s]
    got = SSIMLoss(weight=3.0, rescale=how, window=7)(mine, t, context())
    want = [
        3.0 * slow(rescaled(a, how), rescaled(b.double(), how), window=7).mean()
        for a, b in zip(truth, t, strict=True)
    ]
    assert list(got) == ["0", "1", "2"]
    for value, expected in zip(got.values(), want, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(expected.item(), rel=TOLERANCES[dtype].value)
    upstream = [0.5, -2.0, 1.5]
    sum(u * v for u, v in zip(upstream, got.values(), strict=True)).backward()
    sum(u * v for u, v in zip(upstream, want, strict=True)).backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient)


@pytest.mark.parametrize("window", [5, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_kornia(dtype, window) -> None:
    """The paper's one line, on rescaled maps, in float64: value and gradient within 1e-5, in float32 too.

    kornia's own float32 gradient is off by up to 1e-4 here, at the extremes, where the gradients of a whole map add up;
    without rescaling its float32 is compared with in tests/kernels/test_ssim.py.
    """
    losses = pytest.importorskip("kornia.losses", reason="kornia is compared with where it is installed")
    s, t = (pyramid(6, k, dtype=dtype, levels=((14, 18), (6, 9))) for k in (1, 2))
    mine, theirs = [x.clone().requires_grad_() for x in s], [x.double().requires_grad_() for x in s]
    got = SSIMLoss(weight=2.0, window=window)(mine, t, context())
    want = [
        2.0 * losses.ssim_loss(rescale(a), rescale(b.double()), window)
        for a, b in zip(theirs, t, strict=True)
    ]
    for a, b in zip(got.values(), want, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5 if dtype == torch.float32 else 1e-12)
    sum(got.values()).backward()
    sum(want).backward()
    for a, b in zip(mine, theirs, strict=True):
        assert_near(a.grad, b.grad, 1e-5 if dtype == torch.float32 else 1e-11)


def test_equal_maps_give_zero_and_next_to_no_gradient() -> None:
    t = pyramid(5, 1)
    s = [x.clone().requires_grad_() for x in t]
    got = SSIMLoss(weight=1.0)(s, t, context())
    # 1e-12 over SSIM's denominator, at most 5.6e-6
    assert all(0 <= v.item() < 5.6e-6 for v in got.values())
    sum(got.values()).backward()
    other = [x.clone().requires_grad_() for x in pyramid(5, 3)]
    sum(SSIMLoss(weight=1.0)(other, t, context()).values()).backward()
    for x, y in zip(s, other, strict=True):
        assert x.grad.abs().max() < 1e-3 * y.grad.abs().max()


@pytest.mark.parametrize("how", RESCALES)
def test_scale_and_shift_do_not_count(how) -> None:
    s, t = (pyramid(4, k, dtype=torch.float64) for k in (1, 2))
    loss, ctx = SSIMLoss(rescale=how), context()
    want = loss(s, t, ctx)
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (7.5, -3.0))
    if how != "batch":  # one of each for every group that shares a range
        shape = (2, 1, 1, 1) if how == "image" else (2, 4, 1, 1)
        a, b = (torch.linspace(1, 2, math.prod(shape), dtype=torch.float64).view(shape) * v for v in (a, b))
    for moved in (loss([x * a + b for x in s], t, ctx), loss(s, [x * a + b for x in t], ctx)):
        for key, value in moved.items():
            assert value.item() == pytest.approx(want[key].item(), rel=1e-12)


def test_gradcheck() -> None:
    s, t = (pyramid(2, k, n=2, dtype=torch.float64, levels=((4, 3), (2, 1))) for k in (1, 2))
    for how in RESCALES:
        loss, ctx = SSIMLoss(rescale=how, window=5), context()
        gradcheck(
            lambda *x, f=loss, c=ctx: tuple(f(list(x), t, c).values()),
            *(x.detach().requires_grad_() for x in s),
        )


def test_the_extremes_carry_the_gradient_of_the_range() -> None:
    """r does not change when a map is moved or scaled, so neither does the loss: sum g = 0 and sum g x = 0."""
    s, t = (
        [x.requires_grad_() for x in pyramid(4, 1, dtype=torch.float64)],
        pyramid(4, 2, dtype=torch.float64),
    )
    sum(SSIMLoss()(s, t, context()).values()).backward()
    for x in s:
        size = float(x.grad.abs().sum())
        assert size > 0
        assert float(x.grad.sum()) == pytest.approx(0, abs=1e-12 * size)
        assert float((x.grad * x.detach()).sum()) == pytest.approx(0, abs=1e-11 * size)


def test_ties_share_the_gradient() -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 3.0], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    rescale(x)[0, 0, 1, 0].backward()
    # y = (x2 - m) / (M - m) = 1/3: dy/dm = (y - 1) / 3 shared by two, dy/dM = -y / 3
    assert x.grad.flatten().tolist() == pytest.approx([-1 / 9, -1 / 9, 1 / 3, -1 / 9])


@pytest.mark.parametrize("how", RESCALES)
def test_constant_maps_and_channels_have_finite_gradients(how) -> None:
    s, t = pyramid(4, 1), pyramid(4, 2)
    s[0][:, 1] = 0.25
    t[0][:, 2] = -1.0
    s[1].fill_(3.0)
    t[2].fill_(0.0)
    s = [x.requires_grad_() for x in s]
    got = SSIMLoss(rescale=how)(s, t, context())
    assert all(v.isfinite() for v in got.values())
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() for x in s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_of_norm_1e4_under_autocast(dtype) -> None:
    s, t = ([x.mul(100).to(dtype).requires_grad_(k == 1) for x in pyramid(64, k)] for k in (1, 2))
    assert all(float(x.detach().double().norm()) > 3e3 for x in s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = SSIMLoss()(s, t, context())
    for i, value in enumerate(got.values()):
        assert value.dtype == torch.float32
        want = 4 * slow(*(rescaled(x.detach().double(), "image") for x in (s[i], t[i]))).mean()
        assert value.item() == pytest.approx(want.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in s)


def test_levels_of_one_cell() -> None:
    s, t = (pyramid(3, k, levels=((12, 16), (1, 1), (2, 1))) for k in (1, 2))
    got = SSIMLoss()([x.requires_grad_() for x in s], t, context())
    for i in range(3):
        want = 4 * slow(*(rescaled(x.detach().double(), "image") for x in (s[i], t[i]))).mean()
        assert got[str(i)].item() == pytest.approx(want.item(), rel=1e-5)


def test_align_and_levels() -> None:
    s, t = [x.requires_grad_() for x in pyramid(3, 1)], pyramid(5, 2)
    loss = SSIMLoss(levels=(0, 2))
    with pytest.raises(
        RuntimeError, match=r"SSIMLoss, level 0: no parameters yet.*bind\(\[3, 3, 3\], \[5, 5, 5\]\)"
    ):
        loss(s, t, context())
    loss.bind([3] * 3, [5] * 3)
    got = loss(s, t, context())
    assert list(got) == ["0", "2"]
    sum(got.values()).backward()
    assert all(p.grad.abs().max() > 0 for k, p in loss.named_parameters() if k.endswith("weight"))
    assert s[1].grad is None
    for i in (0, 2):
        conv = loss.align[str(i)]
        with torch.no_grad():
            want = 4 * slow(rescaled(conv(s[i]).double(), "image"), rescaled(t[i].double(), "image")).mean()
        assert got[str(i)].item() == pytest.approx(want.item(), rel=1e-5)


def test_presets_and_defaults() -> None:
    families = [f for f in preset_names() if _known(f)]
    assert {"retinanet", "reppoints"} <= set(families)
    for family in families:
        loss, numbers = SSIMLoss(preset=family), preset_values(family, "SSIMLoss")
        assert (loss.weight, loss.levels) == (numbers["weight"], numbers["levels"])
        assert loss.weight in (2.0, 4.0)  # the paper's best
        assert SSIMLoss(preset=family, weight=1.5).weight == 1.5
    loss = build_loss({"type": "SSIMLoss"})
    assert (loss.weight, loss.window, loss.sigma, loss.rescale, loss.levels, loss.name) == (
        4.0, 11, 1.5, "image", None, "ssim",
    )  # fmt: skip
    assert "weight=4.0, window=11, sigma=1.5, rescale='image'" in repr(loss)


def _known(family: str) -> bool:
    try:
        return bool(preset_values(family, "SSIMLoss"))
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 4}, r"SSIMLoss: window must be an odd integer in 1\.\.49, got 4"),
        ({"sigma": 0.0}, "SSIMLoss: sigma must be a finite number > 0, got 0.0"),
        ({"weight": math.nan}, "SSIMLoss: weight must be a finite number, got nan"),
        ({"rescale": "pixel"}, "SSIMLoss: unknown rescale 'pixel'; valid: image, batch, channel"),
        ({"levels": [-1]}, "levels must be distinct indices >= 0"),
        ({"preset": "yolo"}, "unknown preset 'yolo'"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_argument_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SSIMLoss(**arguments)


def test_input_errors() -> None:
    s, t = pyramid(3, 1), pyramid(3, 2)
    with pytest.raises(
        ValueError, match=r"SSIMLoss: levels=\(4,\), but the pyramid has 3 levels: \[4\] do not exist"
    ):
        SSIMLoss(levels=[4])(s, t, context())
    with pytest.raises(ValueError, match=r"SSIMLoss, level 0: the teacher map requires a gradient"):
        SSIMLoss()(s, [x.requires_grad_() for x in pyramid(3, 2)], context())
    with pytest.raises(
        ValueError, match=r"SSIMLoss, level 0: expected maps of equal batch, height and width"
    ):
        SSIMLoss()([x[..., 1:] for x in s], t, context())
