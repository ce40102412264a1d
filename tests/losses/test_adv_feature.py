"""AdvFeatureLoss: every form against a loop in float64, gradients at and off equality, align, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ikd_fast.losses import AdvFeatureLoss, DistillContext
from ikd_fast.losses.adv_feature import FORMS
from tests.losses import published
from tests.losses.setups import context, pyramid
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(form, dtype) -> None:
    tau = 2.0 if form == "cwd" else 1.0
    loss = AdvFeatureLoss(form=form, tau=tau, weight=0.7)
    s, t = pyramid(9, 1, dtype=dtype), pyramid(9, 2, dtype=dtype)
    mine = [x.clone().requires_grad_() for x in s]
    truth = [x.double().requires_grad_() for x in s]
    got = loss(mine, t, context())
    want = [0.7 * published.adv(form, a, b.double(), tau) for a, b in zip(truth, t, strict=True)]
    assert list(got) == ["0", "1", "2"]
    for value, expected in zip(got.values(), want, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=TOLERANCES[dtype].value)
    upstream = torch.randn(3, dtype=torch.float64).tolist()
    sum(u * v for u, v in zip(upstream, got.values(), strict=True)).backward()
    sum(u * v for u, v in zip(upstream, want, strict=True)).backward()
    for a, b in zip(mine, truth, strict=True):
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient)


@pytest.mark.parametrize("form", FORMS)
def test_equal_maps(form) -> None:
    t = pyramid(5, 1)
    s = [x.clone().requires_grad_() for x in t]
    got = AdvFeatureLoss(form=form)(s, t, context())
    # The norms keep 1e-12 under the root: 1e-6 at equality.
    expected = 1e-6 if form.startswith("norm") else 0.0
    assert [v.item() for v in got.values()] == pytest.approx([expected] * 3, rel=1e-6)
    sum(got.values()).backward()
    assert all(x.grad.abs().max() < 1e-7 for x in s)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form) -> None:
    s, t = (pyramid(3, k, dtype=torch.float64, levels=((3, 2), (1, 2))) for k in (1, 2))
    loss, ctx = AdvFeatureLoss(form=form), context()
    gradcheck(lambda *s: tuple(loss(list(s), t, ctx).values()), *(x.requires_grad_() for x in s))


def test_norm_per_image_does_not_depend_on_the_batch_and_norm_does() -> None:
    s, t = (pyramid(4, k, n=1) for k in (1, 2))
    for form, factor in (("norm_per_image", 1.0), ("sum_per_image", 1.0), ("mean", 1.0), ("norm", 2.0)):
        loss = AdvFeatureLoss(form=form)
        one = loss(s, t, context(1))["0"].item()
        four = loss([x.repeat(4, 1, 1, 1) for x in s], [x.repeat(4, 1, 1, 1) for x in t], context(4))[
            "0"
        ].item()
        assert four == pytest.approx(factor * one, rel=1e-5), form


def test_align() -> None:
    s, t = [x.requires_grad_() for x in pyramid(3, 1)], pyramid(5, 2)
    loss = AdvFeatureLoss()
    with pytest.raises(RuntimeError, match=r"level 0: no parameters yet.*bind\(\[3, 3, 3\], \[5, 5, 5\]\)"):
        loss(s, t, context())
    loss.bind([3] * 3, [5] * 3)
    got = loss(s, t, context())
    for i, x in enumerate(s):
        conv = loss.align[str(i)]
        want = (F.conv2d(x, conv.weight, conv.bias) - t[i]).square().sum() / 2
        assert got[str(i)].item() == pytest.approx(want.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())
    assert all(x.grad.abs().max() > 0 for x in s)


def test_equal_channels_need_no_bind_and_make_no_parameters() -> None:
    loss = AdvFeatureLoss()
    before = loss(pyramid(4, 1), pyramid(4, 2), context())["0"]
    loss.bind([4] * 3, [4] * 3)
    assert torch.equal(loss(pyramid(4, 1), pyramid(4, 2), context())["0"], before)
    assert not list(loss.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_of_norm_1e4_under_autocast(form, dtype) -> None:
    s, t = ([x.mul(100).to(dtype).requires_grad_(k == 1) for x in pyramid(64, k)] for k in (1, 2))
    loss = AdvFeatureLoss(form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(s, t, context())
    for i, value in enumerate(got.values()):
        assert value.dtype == torch.float32
        want = published.adv("mean" if form == "cwd" else form, s[i].detach().double(), t[i].double())
        if form == "cwd":  # its softmax form overflows even in float64 at these sizes: finite is what counts
            assert value.isfinite()
        else:
            assert value.item() == pytest.approx(want.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() for x in s)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "mse"}, "unknown form 'mse'; valid: sum_per_image, norm, norm_per_image, mean, l1, cwd"),
        ({"form": "cwd", "tau": 0.0}, "tau must be a finite number > 0, got 0.0"),
        ({"tau": 4.0}, "tau=4.0 is for form='cwd', got form='sum_per_image'"),
        ({"weight": float("inf")}, "weight must be a finite number, got inf"),
    ],
)
def test_argument_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdvFeatureLoss(**arguments)


@pytest.mark.parametrize("form", ["sum_per_image", "norm", "norm_per_image", "mean", "l1"])
def test_padding_left_out_equals_the_cropped_maps(form) -> None:
    # input 64x64 at strides 8 and 16; the second image fills 30 of 64 rows: ceil(30 / 8) = 4, ceil(30 / 16) = 2 cells
    ctx = DistillContext([], None, [(64, 64), (30, 64)], (64, 64), [0, 1])
    g = torch.Generator().manual_seed(3)
    s, t = ([torch.randn(2, 5, k, k, generator=g) for k in (8, 4)] for _ in range(2))
    for maps in (s, t):  # what lies in the padding must not matter
        maps[0][1, :, 4:] = float("nan")
        maps[1][1, :, 2:] = float("nan")
    got = AdvFeatureLoss(form=form, ignore_padding=True)(s, t, ctx)
    for level, (a, b, rows) in enumerate(zip(s, t, (4, 2), strict=True)):
        d = [(a[0] - b[0]).double(), (a[1, :, :rows] - b[1, :, :rows]).double()]
        squares = [float((x * x).sum()) for x in d]
        want = {
            "sum_per_image": sum(squares) / 2,
            "norm": sum(squares) ** 0.5,
            "norm_per_image": (squares[0] ** 0.5 + squares[1] ** 0.5) / 2,
            "mean": sum(squares) / (d[0].numel() + d[1].numel()),
            "l1": sum(float(x.abs().sum()) for x in d) / 2,
        }[form]
        assert got[str(level)].item() == pytest.approx(want, rel=1e-6)  # float32 sums of 320 terms


def test_masks_of_the_caller_are_taken_by_level() -> None:
    masks = [torch.zeros(1, 2, 2, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool)]
    ctx = DistillContext([], None, [(16, 16)], (16, 16), [0], valid=masks)
    s, t = (
        [torch.ones(1, 3, 2, 2), torch.ones(1, 3, 1, 1)],
        [torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 1, 1)],
    )
    got = AdvFeatureLoss(ignore_padding=True, levels=(1,))(s, t, ctx)
    assert {k: v.item() for k, v in got.items()} == {"1": 3.0}
    assert AdvFeatureLoss(ignore_padding=True, levels=(0,))(s, t, ctx)["0"].item() == 0.0


def test_padding_cannot_be_left_out_of_a_softmax() -> None:
    with pytest.raises(ValueError, match="ignore_padding=True is not for form='cwd'"):
        AdvFeatureLoss(form="cwd", ignore_padding=True)


def test_half_maps_reach_the_operation_uncopied(monkeypatch) -> None:
    from ikd_fast.losses import adv_feature

    seen = []
    monkeypatch.setattr(
        adv_feature, "pyramid_l2", lambda s, t, *a, **k: seen.extend([*s, *t]) or torch.zeros(1, 1)
    )
    s, t = [torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)], [torch.zeros(1, 2, 2, 2, dtype=torch.float16)]
    AdvFeatureLoss()(s, t, context(1))
    assert seen[0] is s[0]
    assert seen[1] is t[0]


def test_every_form_hands_on_the_backend(monkeypatch) -> None:
    from ikd_fast.losses import adv_feature

    seen = []

    def record(*args, backend):
        seen.append(backend)
        return torch.zeros(1, 1)

    for op in ("channel_kl", "pyramid_l1", "pyramid_l2"):
        monkeypatch.setattr(adv_feature, op, record)
    maps = [torch.zeros(1, 2, 2, 2)]
    for form in FORMS:
        AdvFeatureLoss(form=form, backend="reference")(maps, maps, context(1))
    assert seen == ["reference"] * len(FORMS)
