"""PKDLoss: golden value, Pearson's correlation, invariances, resized levels, half precision, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.losses import build_loss
from ikd_fast.losses.pkd import PKDLoss
from tests.losses.published import golden_context, golden_maps
from tests.losses.setups import context, pyramid
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck


def published(s: Tensor, t: Tensor) -> Tensor:
    """Both maps standardised over N, H, W, then half of their mean squared difference."""
    z_s, z_t = (
        (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6) for x in (s, t)
    )
    return F.mse_loss(z_s, z_t) / 2


def test_golden_value() -> None:
    s, t = golden_maps()
    for loss, weight in ((PKDLoss(weight=1.0), 1.0), (PKDLoss(), 6.0)):
        value = float(loss([s], [t], golden_context())["0"])
        # The specification's tenth decimal is off, see tests/kernels/test_pearson.py.
        assert value == pytest.approx(weight * 0.0493679079, rel=3e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(dtype) -> None:
    s, t = pyramid(9, 1, dtype=dtype), pyramid(9, 2, dtype=dtype)
    mine, truth = [x.clone().requires_grad_() for x in s], [x.double().requires_grad_() for x in s]
    got = PKDLoss(weight=0.7)(mine, t, context())
    want = [0.7 * published(a, b.double()) for a, b in zip(truth, t, strict=True)]
    assert list(got) == ["0", "1", "2"]
    for value, expected in zip(got.values(), want, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=TOLERANCES[dtype].value)
    upstream = torch.randn(3, dtype=torch.float64).tolist()
    sum(u * v for u, v in zip(upstream, got.values(), strict=True)).backward()
    sum(u * v for u, v in zip(upstream, want, strict=True)).backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient)


def test_is_one_minus_scipys_correlation() -> None:
    stats = pytest.importorskip("scipy.stats")
    s, t = (pyramid(5, k, dtype=torch.float64) for k in (1, 2))
    got = PKDLoss(weight=1.0)(s, t, context())
    for value, a, b in zip(got.values(), s, t, strict=True):
        r = [stats.pearsonr(a[:, c].flatten(), b[:, c].flatten())[0] for c in range(5)]
        m = a[:, 0].numel()
        # eps = 1e-6 beside standard deviations near 1
        assert value.item() == pytest.approx((m - 1) / m * (1 - sum(r) / 5), rel=1e-5)


def test_shift_and_scale_of_any_channel_change_nothing() -> None:
    s, t, ctx = pyramid(6, 1), pyramid(6, 2), context()
    want = PKDLoss()(s, t, ctx)
    scale, shift = torch.rand(6, 1, 1) + 0.5, torch.randn(6, 1, 1)
    for a, b in (([x * scale + shift for x in s], t), (s, [x * scale + shift for x in t])):
        for key, value in PKDLoss()(a, b, ctx).items():
            assert value.item() == pytest.approx(want[key].item(), rel=1e-5)
    flipped = PKDLoss(weight=1.0)([-x for x in t], t, ctx)  # r = -1
    for value, x in zip(flipped.values(), t, strict=True):
        m = x[:, 0].numel()
        assert value.item() == pytest.approx(2 * (m - 1) / m, rel=1e-5)


def test_equal_maps_give_zero_and_a_finite_gradient() -> None:
    t = pyramid(5, 1)
    s = [x.clone().requires_grad_() for x in t]
    got = PKDLoss()(s, t, context())
    assert [v.item() for v in got.values()] == [0.0, 0.0, 0.0]
    sum(got.values()).backward()
    assert all(x.grad.abs().max() < 1e-7 for x in s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_constant_channels(dtype) -> None:
    """A dead channel of the student: half a level's value for it, and a gradient that fits half precision."""
    s, t = ([x.to(dtype) for x in pyramid(4, k)] for k in (1, 2))
    for x in s:
        x[:, 1] = 0.0
    for x in t:
        x[:, 2] = 7.7
    s = [x.requires_grad_() for x in s]
    got = PKDLoss(weight=1.0)(s, t, context())
    for key, a, b in zip(got, s, t, strict=True):
        m, kept = a[:, 0].numel(), [0, 3]
        rest = 2 * published(a.detach().double()[:, kept], b.double()[:, kept])
        # Z = 0 on one side: the other side's sum of Z^2 over 2 M, (M - 1) / (2 M), in two channels
        assert got[key].item() == pytest.approx((rest.item() + (m - 1) / m) / 4, rel=1e-5)
    sum(got.values()).backward()
    for x in s:
        m = x[:, 0].numel()
        assert x.grad.isfinite().all()
        # |Z_T| <= sqrt(M), divided by M C min_std
        assert 0 < x.grad[:, 1].abs().max() <= m**0.5 / (m * 4 * 1e-3)


def test_gradcheck() -> None:
    s, t = (pyramid(3, k, dtype=torch.float64, levels=((3, 2), (1, 2))) for k in (1, 2))
    loss, ctx = PKDLoss(), context()
    gradcheck(lambda *s: tuple(loss(list(s), t, ctx).values()), *(x.requires_grad_() for x in s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_of_norm_1e4_under_autocast(dtype) -> None:
    s, t = ([x.mul(100).add(1000).to(dtype).requires_grad_(k == 1) for x in pyramid(64, k)] for k in (1, 2))
    assert all(x.detach().double().norm() > 1e4 for x in s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = PKDLoss()(s, t, context())
    for value, a, b in zip(got.values(), s, t, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(6 * published(a.detach().double(), b.double()).item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in s)


def test_half_maps_reach_the_operation_uncopied(monkeypatch) -> None:
    from ikd_fast.losses import pkd

    seen = []
    monkeypatch.setattr(pkd, "pearson", lambda s, t, **k: seen.extend([*s, *t]) or torch.zeros(1))
    s, t = [torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)], [torch.zeros(1, 2, 2, 2, dtype=torch.float16)]
    PKDLoss()(s, t, context(1))
    assert seen[0] is s[0]
    assert seen[1] is t[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("match", ["student", "teacher"])
def test_levels_of_other_sizes_are_resized(match, dtype) -> None:
    """Level 1 differs in both sides, level 2 in width alone; level 0 is equal and stays as it is."""
    s = pyramid(4, 1, dtype=dtype, levels=((12, 16), (6, 8), (3, 4)))
    t = pyramid(4, 2, dtype=dtype, levels=((12, 16), (9, 11), (3, 6)))
    mine, truth = [x.clone().requires_grad_() for x in s], [x.double().requires_grad_() for x in s]
    got = PKDLoss(weight=1.0, match=match)(mine, t, context())
    want = []
    for a, b in zip(truth, [x.double() for x in t], strict=True):
        if match == "student":
            a = F.interpolate(a, b.shape[2:], mode="bilinear", align_corners=False)
        else:
            b = F.interpolate(b, a.shape[2:], mode="bilinear", align_corners=False)
        want.append(published(a, b))
    for value, expected in zip(got.values(), want, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    sum(got.values()).backward()
    sum(want).backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient)


def test_only_the_chosen_levels_are_resized() -> None:
    s, t = pyramid(4, 1), [*pyramid(4, 2)[:2], torch.zeros(2, 4, 0, 5)]
    got = PKDLoss(levels=(0, 1))(s, t, context())
    assert list(got) == ["0", "1"]


def test_unequal_sizes_are_refused_without_match() -> None:
    s, t = pyramid(4, 1), [*pyramid(4, 2)[:2], torch.rand(2, 4, 3, 5)]
    assert list(PKDLoss()(s, t, context())) == ["0", "1", "2"]
    with pytest.raises(
        ValueError, match=r"PKDLoss, level 2: .*student \(2, 4, 3, 4\) and teacher \(2, 4, 3, 5\)"
    ):
        PKDLoss(match=None)(s, t, context())


@pytest.mark.parametrize(
    ("preset", "weight"), [("faster_rcnn", 6.0), ("retinanet", 10.0), ("reppoints", 10.0)]
)
def test_presets(preset, weight) -> None:
    loss = PKDLoss(preset=preset)
    assert (loss.weight, loss.levels) == (weight, (0, 1, 2, 3))
    assert PKDLoss(preset=preset, weight=2.5, levels=(1,)).weight == 2.5
    assert PKDLoss().weight == 6.0
    assert PKDLoss().levels is None


def test_it_is_built_by_name_and_has_no_parameters() -> None:
    loss = build_loss(dict(type="PKDLoss", weight=3.0, levels=[0, 2]))
    loss.bind([4] * 3, [4] * 3)
    assert isinstance(loss, PKDLoss)
    assert not list(loss.parameters())
    assert loss.name == "pkd"
    assert "weight=3, match='student', name='pkd'" in repr(loss)
    assert list(loss(pyramid(4, 1), pyramid(4, 2), context())) == ["0", "2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_the_same_loss(dtype) -> None:
    pytest.importorskip("triton", minversion="3.6", reason="needs triton >= 3.6 (Linux)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for backend in ("reference", "triton"):
        s = [x.to(device).requires_grad_() for x in pyramid(5, 1, dtype=dtype)]
        t = [x.to(device) for x in pyramid(5, 2, dtype=dtype)]
        values = PKDLoss(backend=backend)(s, t, context())
        results.append((values, torch.autograd.grad(sum(values.values()), s)))
    for key, value in results[0][0].items():
        assert results[1][0][key].item() == pytest.approx(value.item(), rel=1e-5)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        assert_near(a, b, TOLERANCES[dtype].gradient, "gradient")


def test_errors() -> None:
    s, t, ctx = pyramid(4, 1), pyramid(4, 2), context()
    with pytest.raises(ValueError, match="PKDLoss: weight must be a finite number, got nan"):
        PKDLoss(weight=float("nan"))
    with pytest.raises(
        ValueError, match="PKDLoss: match must be one of 'student', 'teacher', None, got 'resize'"
    ):
        PKDLoss(match="resize")
    with pytest.raises(
        ValueError, match=r"levels=\(0, 3\), but the pyramid has 3 levels: \[3\] do not exist"
    ):
        PKDLoss(levels=(0, 3))(s, t, ctx)
    with pytest.raises(
        ValueError, match=r"level 0: expected equal channels, got student 4 and teacher 6; .* no align layer"
    ):
        PKDLoss()(s, pyramid(6, 2), ctx)
    with pytest.raises(ValueError, match=r"level 1.*the teacher map requires a gradient.*map\.detach\(\)"):
        PKDLoss()(s, [t[0], t[1].clone().requires_grad_(), t[2]], ctx)
    with pytest.raises(ValueError, match=r"level 1.*the teacher map requires a gradient.*map\.detach\(\)"):
        PKDLoss(match="teacher")(s, [t[0], torch.rand(2, 4, 5, 5).requires_grad_(), t[2]], ctx)
    with pytest.raises(ValueError, match="3 student and 2 teacher levels"):
        PKDLoss()(s, t[:2], ctx)
    with pytest.raises(ValueError, match="0 student and 0 teacher levels"):
        PKDLoss()([], [], ctx)
    with pytest.raises(ValueError, match=r"level 0: expected a floating-point student map.*torch\.int64"):
        PKDLoss()([x.long() for x in s], t, ctx)
    with pytest.raises(ValueError, match=r"level 0: expected at least one element"):
        PKDLoss()(s, [t[0][..., :0], *t[1:]], ctx)
    with pytest.raises(ValueError, match=r"level 0.*student \(2, .* teacher \(1, "):
        PKDLoss()(s, [x[:1] for x in t], ctx)
    with pytest.raises(ValueError, match="PKDLoss: backend must be one of 'auto', 'triton', 'reference'"):
        PKDLoss(backend="cuda")
