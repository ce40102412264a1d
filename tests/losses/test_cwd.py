"""CWDLoss against torch's kl_div and the published form: values, gradients, invariance, presets, align, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.losses import AdvFeatureLoss, CWDLoss, build_loss, preset_values
from tests.losses.published import golden_context, golden_maps
from tests.losses.setups import context, pyramid
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck


def by_kl_div(s: Tensor, t: Tensor, tau: float, weight: float) -> Tensor:
    """``torch.nn.functional.kl_div`` with channels as its batch, float64."""
    rows_s, rows_t = ((x.double() / tau).reshape(-1, x.shape[2] * x.shape[3]) for x in (s, t))
    mean = F.kl_div(rows_s.log_softmax(1), rows_t.softmax(1), reduction="batchmean")
    return weight * tau**2 * mean


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 0.0238854130), (4.0, 0.0285187677)])
def test_golden_values(tau, expected) -> None:
    s, t = golden_maps()
    loss = CWDLoss(tau=tau, weight=2.5)
    got = loss([s], [t], golden_context())["0"].item()
    assert got == pytest.approx(2.5 * expected, rel=1e-8)  # the digits printed
    same = AdvFeatureLoss(form="cwd", tau=tau, weight=2.5)
    assert same([s], [t], golden_context())["0"].item() == got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_value_and_gradient_against_kl_div(dtype, tau) -> None:
    s, t = pyramid(9, 1, dtype=dtype), pyramid(9, 2, dtype=dtype)
    mine, truth = [x.clone().requires_grad_() for x in s], [x.double().requires_grad_() for x in s]
    got = CWDLoss(tau=tau, weight=0.7)(mine, t, context())
    want = [by_kl_div(a, b, tau, 0.7) for a, b in zip(truth, t, strict=True)]
    assert list(got) == ["0", "1", "2"]
    for value, expected in zip(got.values(), want, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=TOLERANCES[dtype].value)
    upstream = torch.randn(3, dtype=torch.float64).tolist()
    sum(u * v for u, v in zip(upstream, got.values(), strict=True)).backward()
    sum(u * v for u, v in zip(upstream, want, strict=True)).backward()
    for a, b in zip(mine, truth, strict=True):
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient)


def test_gradcheck() -> None:
    s, t = (pyramid(3, k, dtype=torch.float64, levels=((3, 2), (1, 2))) for k in (1, 2))
    loss, ctx = CWDLoss(tau=2.0), context()
    gradcheck(lambda *s: tuple(loss(list(s), t, ctx).values()), *(x.requires_grad_() for x in s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_maps_give_zero_with_no_gradient(dtype) -> None:
    t = pyramid(5, 1, dtype=dtype)
    s = [x.clone().requires_grad_() for x in t]
    got = CWDLoss()(s, t, context())
    assert [v.item() for v in got.values()] == [0.0] * 3
    sum(got.values()).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in s)


def test_a_constant_in_a_channel_changes_nothing_and_a_scale_does() -> None:
    s, t = pyramid(5, 1, dtype=torch.float64), pyramid(5, 2, dtype=torch.float64)
    shift = torch.randn(2, 5, 1, 1, dtype=torch.float64)
    loss, ctx = CWDLoss(), context()
    want = torch.stack(list(loss(s, t, ctx).values()))
    for pair in (([x + shift for x in s], t), (s, [x - shift for x in t])):
        assert_near(torch.stack(list(loss(*pair, ctx).values())), want, 1e-12)
    scaled = torch.stack(list(loss([2 * x for x in s], t, ctx).values()))
    assert ((scaled - want).abs() > 0.1 * want).all()


def test_constant_channels_have_a_finite_gradient() -> None:
    t = pyramid(4, 1)
    s = [torch.full_like(x, 3.0).requires_grad_() for x in t]
    sum(CWDLoss()(s, t, context()).values()).backward()
    for x, y in zip(s, t, strict=True):
        share = torch.full_like(y, 1 / (y.shape[2] * y.shape[3])) - y.flatten(2).softmax(2).view_as(y)
        assert_near(x.grad, 5.0 / (2 * 4) * share, 1e-5)
    flat = [torch.zeros_like(x) for x in t]
    assert [v.item() for v in CWDLoss()([x.detach() for x in s], flat, context()).values()] == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_of_norm_1e4_under_autocast(dtype) -> None:
    s, t = ([x.mul(1e4 / x.norm()).to(dtype) for x in pyramid(64, k)] for k in (1, 2))
    mine = [x.clone().requires_grad_() for x in s]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = CWDLoss()(mine, t, context())
    for value, a, b in zip(got.values(), s, t, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(by_kl_div(a, b, 1.0, 5.0).item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in mine)


def test_divided_by_images_and_channels_not_by_positions() -> None:
    s, t = pyramid(4, 1), pyramid(4, 2)
    one = CWDLoss()(s, t, context())["0"].item()
    twice = CWDLoss()([x.repeat(2, 3, 1, 1) for x in s], [x.repeat(2, 3, 1, 1) for x in t], context(4))
    assert twice["0"].item() == pytest.approx(one, rel=1e-5)


def test_align_brings_the_student_to_the_teachers_channels() -> None:
    s, t = [x.requires_grad_() for x in pyramid(3, 1)], pyramid(5, 2)
    loss = CWDLoss()
    with pytest.raises(RuntimeError, match=r"level 0: no parameters yet.*bind\(\[3, 3, 3\], \[5, 5, 5\]\)"):
        loss(s, t, context())
    loss.bind([3] * 3, [5] * 3)
    got = loss(s, t, context())
    for i, x in enumerate(s):
        conv = loss.align[str(i)]
        want = by_kl_div(F.conv2d(x, conv.weight, conv.bias), t[i], 1.0, 5.0)
        assert got[str(i)].item() == pytest.approx(want.item(), rel=1e-4)  # of a float32 convolution
    sum(got.values()).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    assert all(loss.align[str(i)].weight.grad.abs().max() > 0 for i in range(3))
    assert all(x.grad.abs().max() > 0 for x in s)


def test_the_teacher_gets_no_gradient_and_levels_choose() -> None:
    s, t = [x.requires_grad_() for x in pyramid(4, 1)], pyramid(4, 2)
    got = CWDLoss(levels=(2, 0))(s, t, context())
    assert list(got) == ["2", "0"]
    everything = CWDLoss()(s, t, context())
    assert all(torch.equal(got[k], everything[k]) for k in got)
    sum(got.values()).backward()
    assert s[1].grad is None
    assert all(x.grad is None for x in t)


@pytest.mark.parametrize("preset", ["retinanet", "faster_rcnn", "gfl"])
def test_presets(preset) -> None:
    published, loss = preset_values(preset, "CWDLoss"), CWDLoss(preset=preset)
    assert (loss.tau, loss.weight) == (published["tau"], published["weight"])
    levels = published["levels"]
    assert loss.levels == (None if levels is None else tuple(levels))
    assert CWDLoss(preset=preset, weight=3).weight == 3.0
    assert CWDLoss(preset=preset, weight=3).tau == published["tau"]


def test_defaults_and_registry() -> None:
    loss = build_loss({"type": "CWDLoss", "tau": 4.0, "source": "decode_head.conv_seg"})
    assert isinstance(loss, CWDLoss)
    assert (loss.tau, loss.weight, loss.name, loss.source) == (4.0, 5.0, "cwd", "decode_head.conv_seg")
    assert (CWDLoss().tau, CWDLoss().weight, CWDLoss().levels) == (1.0, 5.0, None)
    assert repr(loss).startswith("CWDLoss(\n  tau=4.0, weight=5.0, name='cwd'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0.0}, "CWDLoss: tau must be a finite number > 0, got 0.0"),
        ({"tau": -1.0}, "CWDLoss: tau must be a finite number > 0, got -1.0"),
        ({"tau": float("nan")}, "CWDLoss: tau must be a finite number > 0, got nan"),
        ({"weight": float("inf")}, "CWDLoss: weight must be a finite number, got inf"),
        ({"levels": (0, 0)}, r"levels must be distinct indices >= 0.*got \(0, 0\)"),
        ({"preset": "yolo"}, "unknown preset 'yolo'; valid: "),
        ({"backend": "cuda"}, "CWDLoss: backend must be one of"),
    ],
)
def test_argument_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        CWDLoss(**arguments)


def test_input_errors() -> None:
    s, t, ctx = pyramid(4, 1), pyramid(4, 2), context()
    with pytest.raises(ValueError, match=r"CWDLoss: levels=\(7,\), but the pyramid has 3 levels: \[7\]"):
        CWDLoss(levels=(7,))(s, t, ctx)
    with pytest.raises(ValueError, match="level 0: the teacher map requires a gradient"):
        CWDLoss()(s, [x.clone().requires_grad_() for x in t], ctx)
    with pytest.raises(ValueError, match="level 0: expected maps of equal batch, height and width"):
        CWDLoss()(s, [x[..., :-1] for x in t], ctx)
    with pytest.raises(ValueError, match="1 student and 3 teacher levels"):
        CWDLoss()(s[:1], t, ctx)
    bound = CWDLoss()
    bound.bind([4] * 3, [4] * 3)
    with pytest.raises(ValueError, match="bound to .student, teacher. channels"):
        bound(pyramid(5, 1), pyramid(5, 2), ctx)


def test_half_maps_reach_the_operation_uncopied(monkeypatch) -> None:
    from ikd_fast.losses import cwd

    seen = []

    def record(s, t, tau, *, backend):
        seen.extend([*s, *t, tau, backend])
        return torch.zeros(1, 1)

    monkeypatch.setattr(cwd, "channel_kl", record)
    s, t = [torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)], [torch.zeros(1, 2, 2, 2, dtype=torch.float16)]
    CWDLoss(tau=3.0, backend="reference")(s, t, context(1))
    assert seen[0] is s[0]
    assert seen[1] is t[0]
    assert seen[2:] == [3.0, "reference"]
