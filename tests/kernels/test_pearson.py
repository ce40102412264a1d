"""pearson against Pearson's correlation, normalised maps in float64 and hand-computed cases: values, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import pearson
from ikd_fast.kernels.ops import pearson as ops
from ikd_fast.kernels.reference import pearson as reference
from tests.kernels.pairs import assert_compiles_whole, assert_differentiable_once
from tests.losses.published import golden_maps
from tests.tolerances import DTYPES, assert_gradient, assert_near, assert_value, gradcheck

SHAPES = [
    [(2, 3, 5, 7)],
    [(3, 16, 13, 9), (3, 8, 7, 5), (3, 24, 1, 2)],
    [(1, 5, 1, 63), (1, 1, 60, 1)],
    [(2, 21, 20, 33), (2, 13, 10, 17)],
]
EPS = 1e-6


def maps(shapes, dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Each channel of its own mean and scale; both sides share a part, so that r is neither 0 nor 1."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    s, t = [], []
    for n, c, h, w in shapes:
        shared = draw(n, c, h, w)
        for side in (s, t):
            x = (shared + draw(n, c, h, w)) * draw(1, c, 1, 1).exp() + 3 * draw(1, c, 1, 1)
            side.append(x.to(dtype))
    return s, t


def slow(s: Tensor, t: Tensor) -> Tensor:
    """Channel by channel, as the paper writes it."""
    values = []
    for c in range(s.shape[1]):
        a, b = s[:, c].reshape(-1), t[:, c].reshape(-1)
        z_s, z_t = ((x - x.mean()) / (x.std() + EPS) for x in (a, b))
        values.append((z_s - z_t).square().sum() / (2 * len(a)))
    return torch.stack(values).mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda x: "x".join(map(str, x[0])) + f"+{len(x) - 1}")
def test_value_and_gradient(shapes, dtype) -> None:
    s, t = maps(shapes, dtype)
    upstream = torch.randn(len(shapes), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = [x.clone().requires_grad_() for x in s]
    out = pearson(mine, t)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.backward(upstream.to(out.dtype))
    truth = [x.double().requires_grad_() for x in s]
    expected = torch.stack([slow(a, b.double()) for a, b in zip(truth, t, strict=True)])
    expected.backward(upstream)
    assert_value(out, expected, dtype)
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_gradient(a.grad, b.grad, dtype)


def test_is_one_minus_pearsons_correlation() -> None:
    stats = pytest.importorskip("scipy.stats")
    s, t = maps([(2, 7, 9, 11)], torch.float64)
    r = [stats.pearsonr(s[0][:, c].flatten(), t[0][:, c].flatten())[0] for c in range(7)]
    m = 2 * 9 * 11
    expected = (m - 1) / m * (1 - sum(r) / 7)
    # eps = 1e-6 beside standard deviations above 0.1 moves the value by 1e-5 of itself at the most.
    assert pearson(s, t).item() == pytest.approx(expected, rel=1e-5)
    assert pearson(s, t, eps=1e-14).item() == pytest.approx(expected, rel=1e-12)


def test_golden_value() -> None:
    s, t = golden_maps()
    # NumPy in float64; the specification prints 0.0493679079, which is 2.4e-8 of it lower.
    assert pearson([s], [t]).item() == pytest.approx(0.0493679090780549, rel=1e-13)
    assert pearson([s], [t]).item() == pytest.approx(0.0493679079, rel=3e-8)
    m = 2 * 6 * 8
    assert pearson([s], [t], eps=1e-14).item() * m / (m - 1) == pytest.approx(0.0498877290, rel=1e-8)


def test_by_hand() -> None:
    # S: -1, 0, 1 (std 1); T: 1, -2, 1 (std sqrt 3); uncorrelated: (2 + 2 - 0) / 6. A second channel: S = -T, r = -1.
    s = torch.tensor([[[[-1.0, 0.0, 1.0]], [[2.0, 4.0, 9.0]]]], dtype=torch.float64)
    t = torch.tensor([[[[1.0, -2.0, 1.0]], [[-2.0, -4.0, -9.0]]]], dtype=torch.float64)
    assert pearson([s[:, :1]], [t[:, :1]], eps=1e-14).item() == pytest.approx(2 / 3)
    assert pearson([s], [t], eps=1e-14).item() == pytest.approx((2 / 3 + 4 / 3) / 2)
    # dS of channel 0 is (r Z_S - Z_T) / (M C std_S), r = 0.
    s.requires_grad_()
    (grad,) = torch.autograd.grad(pearson([s], [t], eps=1e-14)[0], s)
    assert_near(grad[0, 0, 0], -t[0, 0, 0] / 3**0.5 / (3 * 2), 1e-12)
    assert grad[0, 1].abs().max() < 1e-12  # r = -1 is an extremum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_shift_and_scale_of_a_channel_change_nothing(dtype) -> None:
    s, t = maps([(2, 6, 8, 10), (2, 6, 4, 5)], dtype)
    want = pearson(s, t)
    g = torch.Generator().manual_seed(3)
    for moved in (0, 1):
        sides = [s, t]
        scale = torch.rand(6, 1, 1, generator=g) * 5 + 0.5
        shift = torch.rand(6, 1, 1, generator=g) * 5 - 2.5
        sides[moved] = [x * scale.to(dtype) + shift.to(dtype) for x in sides[moved]]
        # eps beside another std; in float32 also the rounding of the scaled maps themselves
        assert_near(pearson(*sides), want, 2e-5)


def test_scale_and_shift_pass_through_the_gradient() -> None:
    s, t = maps([(2, 4, 6, 5)], torch.float64)
    grads = []
    for x in (s[0], 8 * s[0] + 100):
        x = x.clone().requires_grad_()
        grads += torch.autograd.grad(pearson([x], t, eps=1e-14)[0], x)
    assert_near(8 * grads[1], grads[0], 1e-9)
    # The value moves neither with a channel's mean nor with its scale.
    assert grads[0].sum((0, 2, 3)).abs().max() < 1e-14
    assert (grads[0] * s[0]).sum((0, 2, 3)).abs().max() < 1e-13


def test_equal_maps_give_zero_and_no_gradient() -> None:
    for dtype in DTYPES:
        t = maps([(2, 4, 6, 5), (2, 3, 2, 2)], dtype)[0]
        s = [x.clone().requires_grad_() for x in t]
        out = pearson(s, t)
        assert torch.equal(out, torch.zeros_like(out))
        out.sum().backward()
        assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in s)


def test_gradcheck() -> None:
    s, t = maps([(2, 3, 3, 2), (2, 2, 1, 3)], torch.float64)
    gradcheck(lambda *x: pearson(list(x), t, eps=1e-3), *(x.requires_grad_() for x in s))
    small = [(x * 1e-4).detach().requires_grad_() for x in s]
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: pearson(list(x), t, min_std=0.0) @ weights, small, eps=1e-9, atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels(dtype, offset) -> None:
    """Z = 0 for a constant channel, whatever its value; the gradient is divided by min_std there."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(2, 3, 7, 11, generator=g).to(dtype)  # 154 elements: their sum is rounded
    s = torch.randn(2, 3, 7, 11, generator=g).to(dtype)
    s[:, 1:] = 0.1 + offset
    t[:, 2] = 0.3 + offset
    s.requires_grad_()
    out = pearson([s], [t])
    m = 2 * 7 * 11
    half = (m - 1) / (2 * m)  # sum of Z_T^2 over 2 M
    expected = slow(s.detach().double()[:, :1], t.double()[:, :1])
    assert out.item() * 3 == pytest.approx(float(expected) + half, rel=1e-5)
    out.backward()
    assert s.grad.isfinite().all()
    z_t = (t[:, 1].double() - t[:, 1].double().mean()) / t[:, 1].double().std()
    assert_near(s.grad[:, 1], -z_t / (m * 3 * (1e-3 + EPS)), max(2e-5, torch.finfo(dtype).eps))
    assert torch.equal(s.grad[:, 2], torch.zeros_like(s.grad[:, 2]))


def test_small_student_maps_get_a_shorter_gradient_of_the_same_direction() -> None:
    s, t = maps([(2, 4, 6, 5)], torch.float64)
    s = [(x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True) * 1e-5 for x in s]
    x = s[0].requires_grad_()
    (exact,) = torch.autograd.grad(pearson([x], t, min_std=0.0)[0], x)
    (clamped,) = torch.autograd.grad(pearson([x], t)[0], x)
    assert_near(clamped * (1e-3 + EPS) / (1e-5 + EPS), exact, 1e-12)
    assert pearson([x], t, min_std=0.0).item() == pearson([x], t).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_maps_far_from_zero_lose_nothing(dtype) -> None:
    """Means of 1e4 beside a std of about 100: E[x^2] - E[x]^2 would lose four of the seven digits of float32."""
    s, t = maps([(2, 5, 9, 13)], torch.float64)
    s, t = ([(x[0] * 50 + 1e4).to(dtype)] for x in (s, t))
    mine, truth = s[0].clone().requires_grad_(), s[0].double().requires_grad_()
    out, expected = pearson([mine], t), slow(truth, t[0].double())
    assert_value(out, expected[None], dtype)
    out.sum().backward()
    expected.backward()
    assert_gradient(mine.grad, truth.grad, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 2, 3, 1)])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_shows(bad, where, side) -> None:
    sides = [maps([(2, 3, 4, 5), (2, 3, 2, 2)], torch.float32)[k] for k in (0, 1)]
    sides[side][0][where] = bad
    s = [x.requires_grad_() for x in sides[0]]
    out = pearson(s, sides[1])
    assert out.isnan().tolist() == [True, False]
    out.sum().backward()
    assert s[0].grad[:, where[1]].isnan().all()
    assert s[1].grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (1, 3, 1, 1)], ids=str)
def test_nothing_to_correlate_is_zero(shape) -> None:
    x = torch.ones(shape, requires_grad=True)
    out = pearson([x], [torch.zeros(shape)])
    assert torch.equal(out, torch.zeros(1))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(shape))


def test_layouts_give_the_same() -> None:
    s, t = maps([(2, 6, 8, 10)], torch.float32)
    wide = torch.zeros(2, 6, 8, 20)
    wide[..., ::2] = s[0]
    results = []
    for x in (s[0], s[0].to(memory_format=torch.channels_last), wide[..., ::2]):
        for y in (t[0], t[0].to(memory_format=torch.channels_last)):
            x = x.detach().requires_grad_()
            out = pearson([x], [y])
            (grad,) = torch.autograd.grad(out.sum(), x)
            if x.is_contiguous(memory_format=torch.channels_last):
                assert grad.stride() == x.stride()
            results.append((out, grad))
    for out, grad in results[1:]:
        assert_value(out, results[0][0], torch.float32)
        assert_gradient(grad, results[0][1], torch.float32)


def test_large_maps_are_taken_a_few_channels_at_a_time(monkeypatch) -> None:
    s, t = maps([(2, 7, 6, 5)], torch.float64)
    want, saved = reference.forward(s, t, EPS, 1e-3)
    (grad,) = reference.backward(torch.ones_like(want), s, t, saved)
    monkeypatch.setattr(reference, "_CHUNK", 3 * 2 * 6 * 5)
    assert [x.start for x in reference._slices(s[0], t[0])] == [0, 3, 6]
    got, kept = reference.forward(s, t, EPS, 1e-3)
    assert_near(got, want, 1e-14)
    assert_near(reference.backward(torch.ones_like(want), s, t, kept)[0], grad, 1e-12)


def test_autocast_changes_nothing() -> None:
    s, t = maps([(2, 6, 8, 10)], torch.float32)
    x = s[0].requires_grad_()
    want = pearson([x], t)
    (grad,) = torch.autograd.grad(want.sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pearson([x], t)
        assert torch.equal(out, want)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], grad)


def test_sides_may_differ_in_dtype() -> None:
    s, _ = maps([(2, 4, 5, 6)], torch.float16)
    _, t = maps([(2, 4, 5, 6)], torch.float64)
    x = s[0].requires_grad_()
    out = pearson([x], t)
    assert out.dtype == torch.float64
    assert_near(out, slow(s[0].double(), t[0])[None], 1e-12)
    out.sum().backward()
    assert x.grad.dtype == torch.float16


def test_repeats_give_the_same_bits() -> None:
    s, t = maps([(2, 6, 8, 10)], torch.float32)
    assert torch.equal(pearson(s, t), pearson(s, t))


def test_registered_operation_passes_opcheck() -> None:
    s, t = maps([(2, 3, 4, 5), (2, 6, 1, 2)], torch.float32)
    s = [x.requires_grad_() for x in s]
    torch.library.opcheck(ops._op, (s, t, EPS, 1e-3, "auto"))
    flat = [x.detach() for x in s]
    _, saved = reference.forward(flat, t, EPS, 1e-3)
    torch.library.opcheck(ops._op_backward, (torch.randn(2), flat, t, saved, "auto"))


def test_compiled_whole_equals_eager() -> None:
    s, t = maps([(2, 3, 4, 5), (2, 6, 1, 2)], torch.float32)
    weight = torch.tensor([1.0, 3.0])

    def loss(student, teacher):
        return (pearson(student, teacher).sqrt() * weight).sum()

    assert_compiles_whole(loss, s, t)


def test_a_second_derivative_is_refused() -> None:
    assert_differentiable_once(pearson)


def test_errors() -> None:
    x = torch.zeros(2, 3, 4, 4)
    for eps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="pearson: eps must be a finite number > 0, got"):
            pearson([x], [x], eps=eps)
    for min_std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="pearson: min_std must be a finite number >= 0, got"):
            pearson([x], [x], min_std=min_std)
    with pytest.raises(ValueError, match=r"pearson, level 0: expected maps \[2,C,H,W\] of equal shape"):
        pearson([x], [x[..., :3]])
    with pytest.raises(ValueError, match="1 student and 2 teacher levels"):
        pearson([x], [x, x])
    with pytest.raises(ValueError, match=r"the teacher map requires a gradient; pass map\.detach\(\)"):
        pearson([x], [x.clone().requires_grad_()])
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        pearson([x], [x], backend="cuda")
    with pytest.raises(
        TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch.float64"
    ):
        pearson([x.double()], [x.double()], backend="triton")
