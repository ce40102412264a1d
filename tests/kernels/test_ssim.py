"""ssim against the textbook formula in float64 and against kornia: values, gradients, layouts, dtypes, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.kernels import ssim
from ikd_fast.kernels.ops import ssim as ops
from ikd_fast.kernels.reference import ssim as reference
from tests.kernels.pairs import assert_compiles_whole, assert_differentiable_once
from tests.tolerances import DTYPES, TOLERANCES, assert_gradient, assert_near, assert_value, gradcheck

SHAPES = [
    [(1, 1, 1, 1)],
    [(2, 3, 7, 6)],
    [(2, 5, 13, 17), (2, 3, 6, 8), (2, 4, 5, 3), (2, 2, 1, 4)],
]
# Where a window sees a variance far below C2 = 9e-4, parts of the gradient up to 1 / C2 times its size cancel, in kornia's
# form as in ours: 2^-24 / C2 = 6.6e-5 of it remain in float32, all of it with windows of one tap.
FLAT = 1e-4
# A map of more elements than the reference computes at a time: 3 planes of 60000 in two chunks.
LARGE = [(1, 3, 240, 250)]


def slow(s: Tensor, t: Tensor, window: int = 11, sigma: float = 1.5, data_range: float = 1.0) -> Tensor:
    """``[N]``: the formula as written, filters by convolution of the padded map; differentiable by autograd."""
    size = min(window, 2 * min(s.shape[2:]) - 1)
    x = torch.arange(size, dtype=s.dtype) - size // 2
    g = (-(x**2) / (2 * sigma**2)).exp()
    kernel = torch.outer(g, g) / g.sum() ** 2

    def mean(x: Tensor) -> Tensor:
        padded = F.pad(x, (size // 2,) * 4, mode="reflect").flatten(0, 1)[:, None]
        return F.conv2d(padded, kernel[None, None]).view(s.shape)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mu_s, mu_t = mean(s), mean(t)
    var_s, var_t = mean(s * s) - mu_s**2, mean(t * t) - mu_t**2
    numerator = (2 * mu_s * mu_t + c1) * (2 * (mean(s * t) - mu_s * mu_t) + c2)
    denominator = (mu_s**2 + mu_t**2 + c1) * (var_s + var_t + c2) + 1e-12 * data_range**4
    return ((1 - numerator / denominator) / 2).clamp(0, 1).mean((1, 2, 3))


def maps(shapes, dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    s, t = ([torch.rand(x, generator=g, dtype=torch.float64).to(dtype) for x in shapes] for _ in range(2))
    return s, t


def gradients(op, s: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    mine = [x.clone().requires_grad_() for x in s]
    out = op(mine)
    return out.detach(), *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), mine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shapes", [*SHAPES, LARGE], ids=lambda x: "x".join(map(str, x[0])) + f"+{len(x) - 1}"
)
def test_value_and_gradient(shapes, dtype) -> None:
    s, t = maps(shapes, dtype)
    upstream = torch.randn(len(s), len(s[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream *= 2.0**10  # as a loss scale: the gradient of a mean over 180000 elements is subnormal in fp16
    value, *grads = gradients(lambda x: ssim(x, t), s, upstream)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    t64 = [x.double() for x in t]
    expected, *wanted = gradients(
        lambda x: torch.stack([slow(a, b) for a, b in zip(x, t64, strict=True)]),
        [x.double() for x in s],
        upstream,
    )
    assert_value(value, expected, dtype)
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == dtype
        assert_near(
            a, b, max(TOLERANCES[dtype].gradient, FLAT if dtype == torch.float32 and 1 in a.shape[2:] else 0)
        )


@pytest.mark.parametrize(
    "options", [{"window": 5}, {"window": 1}, {"window": 31, "sigma": 7.0}, {"sigma": 0.3}]
)
def test_window_and_sigma(options) -> None:
    s, t = maps([(2, 2, 17, 24), (2, 3, 9, 4)], torch.float64)
    upstream = torch.ones(2, 2)
    got = gradients(lambda x: ssim(x, t, **options), s, upstream)
    want = gradients(
        lambda x: torch.stack([slow(a, b, **options) for a, b in zip(x, t, strict=True)]), s, upstream
    )
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 1e-11)


def test_the_unit_is_the_data_range() -> None:
    s, t = maps([(2, 3, 9, 8)], torch.float64)
    value, grad = gradients(lambda x: ssim(x, t), s, torch.ones(1, 2))
    for k in (255.0, 1e-3):
        big = [[x * k for x in y] for y in (s, t)]
        scaled, scaled_grad = gradients(
            lambda x, k=k, t=big[1]: ssim(x, t, data_range=k), big[0], torch.ones(1, 2)
        )
        assert_near(scaled, value, 1e-12)
        assert_near(scaled_grad * k, grad, 1e-11)
        assert_near(scaled[0], slow(big[0][0], big[1][0], data_range=k), 1e-12)


def test_as_kornia() -> None:
    losses = pytest.importorskip("kornia.losses", reason="kornia is compared with where it is installed")
    for dtype in (torch.float64, torch.float32):
        s, t = maps([(2, 4, 21, 16)], dtype)
        got = gradients(lambda x, t=t: ssim(x, t), s, torch.full((1, 2), 0.5))
        want = gradients(lambda x, t=t: losses.ssim_loss(x[0], t[0], 11), s, torch.ones(()))
        assert float(got[0].mean()) == pytest.approx(float(want[0]), abs=1e-5 * float(want[0]))
        assert_near(got[1], want[1], 1e-5 if dtype == torch.float32 else 1e-12)


def test_a_constant_pair_by_hand() -> None:
    # Only the means differ: SSIM = (2 m_s m_t + C1) / (m_s^2 + m_t^2 + C1), since C2 cancels but for 1e-12.
    s, t = (
        [torch.full((1, 2, 7, 9), 0.3, dtype=torch.float64)],
        [torch.full((1, 2, 7, 9), 0.8, dtype=torch.float64)],
    )
    value, grad = gradients(lambda x: ssim(x, t), s, torch.ones(1, 1))
    want = (1 - (0.48 + 1e-4) / (0.73 + 1e-4)) / 2
    assert float(value) == pytest.approx(want, abs=1e-8)
    slope = -(2 * 0.8 * (0.73 + 1e-4) - 2 * 0.3 * (0.48 + 1e-4)) / (0.73 + 1e-4) ** 2 / 2
    assert float(grad.sum()) == pytest.approx(
        slope, rel=1e-7
    )  # the means' slopes are shared among the elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_maps(dtype) -> None:
    t = maps(SHAPES[-1], dtype)[0]
    value, *grads = gradients(lambda x: ssim(x, t), t, torch.ones(4, 2))
    # 1e-12 / (2 B1 B2): B1 >= C1 = 1e-4, B2 >= C2 = 9e-4
    assert float(value.max()) <= 1e-12 / (2 * 1e-4 * 9e-4)
    assert float(value.min()) >= 0
    for x, g in zip(t, grads, strict=True):
        assert float(g.abs().max()) <= 1e-2 / x[0].numel()
        assert bool(g.isfinite().all())
    zero = [torch.zeros(1, 2, 6, 6, dtype=dtype)]
    assert float(ssim(zero, zero)) == pytest.approx(0.5e-12 / (9e-8 + 1e-12), rel=1e-5)


def test_close_maps_keep_their_digits() -> None:
    # 1 - SSIM is 1e-4 here: from SSIM itself in float32 (6e-8 at 1) only three digits would be left.
    g = torch.Generator().manual_seed(3)
    t = torch.rand(1, 4, 16, 16, generator=g) * 0.5 + 0.25
    s = t + 2.0**-8 * torch.rand(t.shape, generator=g)
    want = slow(s.double(), t.double())
    assert 1e-5 < float(want) < 1e-3
    # S - T has 2^-24 / 2^-8 of its size, twice that squared, and the plane's mean rounds it once more
    assert_near(ssim([s], [t])[0], want, 8 * 2.0**-16)


def test_flat_planes_with_an_offset_keep_their_digits() -> None:
    """E[x^2] - E[x]^2 in float32 is off by 6e-8 E[x]^2: as much as a variance of (2e-4)^2, unless offsets are taken out."""
    g = torch.Generator().manual_seed(4)
    s, t = (0.9 + 2.0**-7 * torch.rand(1, 3, 20, 20, generator=g) for _ in range(2))
    upstream = torch.ones(1, 1)
    got = gradients(lambda x: ssim(x, [t]), [s], upstream)
    want = gradients(lambda x: slow(x[0], t.double())[None], [s.double()], upstream)
    assert_near(got[0], want[0], 1e-5)
    assert_near(got[1], want[1], FLAT)


def test_rounding_is_clamped() -> None:
    """|SSIM| <= 1 but for rounding: variances of flat halves 1000 apart are off by 1e-2, ten times C2, to either side."""
    g = torch.Generator().manual_seed(5)
    s, t = (torch.rand(1, 1, 24, 24, generator=g) * 0.05 for _ in range(2))
    for x in (s, t):
        x[..., 12:] += 1000.0
    weights = reference.taps(11, 1.5, 24, 24)
    found = reference._statistics(s[0], t[0], weights)
    assert bool((found.loss < 0).any())
    value, grad = gradients(lambda x: ssim(x, [t]), [s], torch.ones(1, 1))
    assert_near(value[0, 0], found.loss.clamp(0, 1).mean(), 1e-6)
    assert bool(grad.isfinite().all())
    # outside 0..1 everywhere, to either side: no gradient at all
    for factor in (-1.0, 1e-9):
        outside = found._replace(gap=found.gap.abs() + 1.0, contrast=found.contrast.abs() + 1.0)
        outside = outside._replace(denominator=outside.denominator.abs() * factor)
        assert bool(((outside.loss < 0) | (outside.loss > 1)).all())
        assert not bool(reference._gradient(outside, weights).any())


def test_layouts_give_the_same() -> None:
    s, t = maps([(2, 6, 8, 10)], torch.float32)
    want = gradients(lambda x: ssim(x, t), s, torch.ones(1, 2))
    last = s[0].to(memory_format=torch.channels_last)
    wide = torch.zeros(2, 6, 8, 20)
    wide[..., ::2] = s[0]
    for view in (last, wide[..., ::2]):
        for teacher in (t, [x.to(memory_format=torch.channels_last) for x in t]):
            leaf = view.detach().requires_grad_()
            out = ssim([leaf], teacher)
            (grad,) = torch.autograd.grad(out.sum(), leaf)
            assert_value(out, want[0], torch.float32)
            assert_gradient(grad, want[1], torch.float32)
            if view is last:
                assert grad.stride() == last.stride()


def test_gradcheck() -> None:
    s, t = maps([(2, 1, 4, 3), (2, 1, 3, 5), (2, 1, 1, 2)], torch.float64)
    gradcheck(lambda *x: ssim(list(x), t, window=5), *(x.requires_grad_() for x in s))


def test_adjoint_of_the_filter() -> None:
    g = torch.Generator().manual_seed(2)
    for h, w, window in ((1, 1, 11), (2, 9, 11), (6, 6, 11), (20, 13, 5), (7, 8, 1)):
        x, y = (torch.rand(2, h, w, generator=g, dtype=torch.float64) for _ in range(2))
        weights = reference.taps(window, 1.5, h, w)
        assert math.fsum(weights) == pytest.approx(1, abs=1e-15)
        left = (reference.smooth(x, weights) * y).sum()
        assert float((x * reference.smooth_adjoint(y, weights)).sum()) == pytest.approx(
            float(left), rel=1e-13
        )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(value) -> None:
    s, t = maps([(2, 3, 12, 12)], torch.float32)
    for bad in (0, 1):
        pair = [s[0].clone(), t[0].clone()]
        pair[bad][1, 2, 4, 4] = value
        out, grad = gradients(lambda x, t=pair[1]: ssim(x, [t]), [pair[0]], torch.ones(1, 2))
        assert bool(out[0, 1].isnan())
        assert bool(grad[1, 2].isnan().all())
        # the other image is what it was, and so are the gradients of the other planes
        assert_value(out[0, :1], slow(s[0][:1].double(), t[0][:1].double()), torch.float32)
        assert bool(grad[0].isfinite().all())
        assert bool(grad[1, :2].isfinite().all())


def test_empty_batch() -> None:
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    out = ssim([x, x[:, :, :2]], [x.detach(), x.detach()[:, :, :2]])
    assert out.shape == (2, 0)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_registered_operation_passes_opcheck() -> None:
    s, t = maps([(2, 2, 4, 5), (2, 3, 1, 1)], torch.float32)
    settings = (5, 1.5, 1.0, "auto")
    torch.library.opcheck(ops._op, ([x.requires_grad_() for x in s], t, *settings))
    torch.library.opcheck(ops._op_backward, (torch.rand(2, 2), [x.detach() for x in s], t, *settings))


def test_compiled_whole_equals_eager() -> None:
    s, t = maps([(2, 2, 4, 5), (2, 3, 7, 6)], torch.float32)
    weight = torch.tensor([[1.0, 3.0], [0.5, 2.0]])

    def loss(student, teacher):
        return (ssim(student, teacher, window=7).sqrt() * weight).sum()

    assert_compiles_whole(loss, s, t)


def test_autocast_changes_nothing() -> None:
    s, t = maps([(2, 3, 9, 9)], torch.float32)
    want = ssim(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim(s, t), want)


def test_a_float64_side_makes_it_float64() -> None:
    s, t = maps([(1, 2, 8, 9)], torch.float64)
    s = [s[0].float().requires_grad_()]
    out = ssim(s, t)
    assert out.dtype == torch.float64
    assert_near(out[0], slow(s[0].detach().double(), t[0]), TOLERANCES[torch.float64].value)
    (grad,) = torch.autograd.grad(out.sum(), s)
    assert grad.dtype == torch.float32


def test_a_second_derivative_is_refused() -> None:
    assert_differentiable_once(ssim)


def test_errors() -> None:
    x = torch.zeros(2, 3, 4, 4)
    for window in (10, 0, -3, 51, 11.0, True):
        with pytest.raises(
            ValueError, match=rf"ssim: window must be an odd integer in 1\.\.49, got {window}"
        ):
            ssim([x], [x], window=window)
    for name in ("sigma", "data_range"):
        for value in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"ssim: {name} must be a finite number > 0, got {value}"):
                ssim([x], [x], **{name: value})
    with pytest.raises(
        ValueError, match=r"ssim, level 1: expected maps of at least one element .* \(2, 0, 4, 4\)"
    ):
        ssim([x, x[:, :0]], [x, x[:, :0]])
    with pytest.raises(ValueError, match=r"ssim: .*1 student and 2 teacher levels"):
        ssim([x], [x, x])
    with pytest.raises(ValueError, match=r"level 0.*student \(2, 3, 4, 4\) and teacher \(2, 3, 4, 5\)"):
        ssim([x], [torch.zeros(2, 3, 4, 5)])
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        ssim([x], [x.clone().requires_grad_()])
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        ssim([x], [x], backend="cuda")
