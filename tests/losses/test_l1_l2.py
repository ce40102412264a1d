"""L2Loss and L1Loss: values against torch's losses, normalisation, reductions, gradients, precision, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.losses import build_loss
from ikd_fast.losses.l1 import L1Loss
from ikd_fast.losses.l2 import L2Loss
from tests.losses.published import golden_context, golden_maps
from tests.losses.setups import context, pyramid
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck

ALL = [
    *(pytest.param(L2Loss, {"normalize": n, "reduction": r}, id=f"l2-{r}-{'unit' if n else 'raw'}")
      for n in (True, False) for r in ("batch", "mean", "norm")),
    *(pytest.param(L1Loss, {"reduction": r}, id=f"l1-{r}") for r in ("mean", "batch", "sum")),
]  # fmt: skip


def truth(cls, s: Tensor, t: Tensor, reduction: str, normalize: bool = False) -> Tensor:
    n = len(s)
    if normalize:
        s, t = (F.normalize(x.flatten(1), dim=1).view_as(x) for x in (s, t))
    if cls is L1Loss:
        return F.l1_loss(s, t) if reduction == "mean" else F.l1_loss(s, t, reduction="sum") / (
            n if reduction == "batch" else 1
        )  # fmt: skip
    if reduction == "norm":
        return (s - t).norm()
    return F.mse_loss(s, t) if reduction == "mean" else F.mse_loss(s, t, reduction="sum") / n


@pytest.mark.parametrize(("cls", "options"), ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(cls, options, dtype) -> None:
    s, t = pyramid(9, 1, dtype=dtype), pyramid(9, 2, dtype=dtype)
    mine, wanted = [x.clone().requires_grad_() for x in s], [x.double().requires_grad_() for x in s]
    # so large that no gradient is among fp16's subnormal numbers
    got = cls(weight=700.0, **options)(mine, t, context())
    want = [700.0 * truth(cls, a, b.double(), **options) for a, b in zip(wanted, t, strict=True)]
    assert list(got) == ["0", "1", "2"]
    for value, expected in zip(got.values(), want, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=TOLERANCES[dtype].value)
    upstream = torch.randn(3, dtype=torch.float64).tolist()
    sum(u * v for u, v in zip(upstream, got.values(), strict=True)).backward()
    sum(u * v for u, v in zip(upstream, want, strict=True)).backward()
    for a, b in zip(mine, wanted, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (L2Loss(normalize=False), 11.796087766),
        (L2Loss(normalize=False, reduction="norm"), 4.857177733),
        (L2Loss(normalize=False, reduction="mean"), 11.796087766 / 192),
        (L1Loss(reduction="batch"), 41.985340190),
        (L1Loss(reduction="sum"), 2 * 41.985340190),
        (L1Loss(), 41.985340190 / 192),
    ],
    ids=repr,
)
def test_golden_values(loss, expected) -> None:
    s, t = golden_maps()
    # half a unit of the last digit given
    assert float(loss([s], [t], golden_context())["0"]) == pytest.approx(expected, rel=1e-8)


def test_normalised_distance_is_that_of_cosines() -> None:
    s, t = (pyramid(5, k, dtype=torch.float64) for k in (1, 2))
    got = L2Loss()(s, t, context())
    for value, a, b in zip(got.values(), s, t, strict=True):
        cosine = F.cosine_similarity(a.flatten(1), b.flatten(1))
        assert value.item() == pytest.approx((2 - 2 * cosine).mean().item(), rel=1e-12)
    scaled = L2Loss()([x * torch.tensor([0.1, 30.0]).view(2, 1, 1, 1) for x in s], t, context())
    for value, want in zip(scaled.values(), got.values(), strict=True):
        assert value.item() == pytest.approx(want.item(), rel=1e-6)  # factors of float32


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_equal_maps(cls, options) -> None:
    t = pyramid(5, 1)
    s = [x.clone().requires_grad_() for x in t]
    got = cls(**options)(s, t, context())
    expected = 1e-6 if options["reduction"] == "norm" else 0.0  # 1e-12 under the root
    assert [v.item() for v in got.values()] == pytest.approx([expected] * 3, rel=1e-6)
    sum(got.values()).backward()
    assert all(x.grad.abs().max() < 1e-7 for x in s)


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_gradcheck(cls, options) -> None:
    s, t = (pyramid(3, k, dtype=torch.float64, levels=((3, 2), (1, 2))) for k in (1, 2))
    loss, ctx = cls(**options), context()
    gradcheck(lambda *s: tuple(loss(list(s), t, ctx).values()), *(x.requires_grad_() for x in s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_map_of_zeros_keeps_a_finite_gradient(dtype) -> None:
    s, t = torch.zeros(2, 3, 4, 4, dtype=dtype, requires_grad=True), torch.rand(2, 3, 4, 4).to(dtype)
    got = L2Loss()([s], [t], context())["0"]
    assert got.item() == pytest.approx(1.0, rel=1e-6)  # |T / |T||^2
    got.backward()
    unit = t.double() / t.double().flatten(1).norm(dim=1).view(2, 1, 1, 1)
    assert_near(s.grad, -2 * unit / (2 * 1e-3), TOLERANCES[dtype].gradient)
    assert L2Loss()([s], [torch.zeros_like(t)], context())["0"].item() == 0.0


@pytest.mark.parametrize(("cls", "options"), ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_of_norm_1e4_under_autocast(cls, options, dtype) -> None:
    s, t = ([x.mul(100).to(dtype).requires_grad_(k == 1) for x in pyramid(64, k)] for k in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cls(**options)(s, t, context())
    for value, a, b in zip(got.values(), s, t, strict=True):
        assert value.dtype == torch.float32
        want = truth(cls, a.detach().double(), b.double(), **options)
        assert value.item() == pytest.approx(want.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() for x in s)


def test_half_maps_reach_the_operation_uncopied(monkeypatch) -> None:
    from ikd_fast.losses import l1, l2

    s, t = [torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)], [torch.zeros(1, 2, 2, 2, dtype=torch.float16)]
    for module, name, loss in ((l1, "pyramid_l1", L1Loss()), (l2, "pyramid_l2", L2Loss(normalize=False))):
        seen = []
        monkeypatch.setattr(module, name, lambda s, t, _=seen, **k: _.extend([*s, *t]) or torch.zeros(1, 1))
        loss(s, t, context(1))
        assert seen[0] is s[0]
        assert seen[1] is t[0]


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_align(cls, options) -> None:
    s, t = [x.requires_grad_() for x in pyramid(3, 1)], pyramid(5, 2)
    loss = cls(**options)
    with pytest.raises(RuntimeError, match=r"level 0: no parameters yet.*bind\(\[3, 3, 3\], \[5, 5, 5\]\)"):
        loss(s, t, context())
    loss.bind([3] * 3, [5] * 3)
    got = loss(s, t, context())
    for i, x in enumerate(s):
        conv = loss.align[str(i)]
        want = truth(cls, F.conv2d(x, conv.weight, conv.bias), t[i], **options)
        assert got[str(i)].item() == pytest.approx(want.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())
    assert all(x.grad.abs().max() > 0 for x in s)


def test_built_by_name() -> None:
    two = build_loss(dict(type="L2Loss", weight=2.0, normalize=False, reduction="mean", levels=[1]))
    assert isinstance(two, L2Loss)
    assert "weight=2, normalize=False, reduction='mean', name='l2'" in repr(two)
    one = build_loss(dict(type="L1Loss", reduction="sum"))
    assert isinstance(one, L1Loss)
    assert "weight=1, reduction='sum', name='l1'" in repr(one)
    s, t, ctx = pyramid(4, 1), pyramid(4, 2), context()
    assert list(two(s, t, ctx)) == ["1"]
    assert two(s, t, ctx)["1"].item() == pytest.approx(2 * F.mse_loss(s[1], t[1]).item(), rel=1e-6)


@pytest.mark.parametrize("cls", [L1Loss, L2Loss])
def test_errors(cls) -> None:
    name, s, t, ctx = cls.__name__, pyramid(4, 1), pyramid(4, 2), context()
    with pytest.raises(ValueError, match=rf"{name}: reduction must be one of .*'batch'.*, got 'none'"):
        cls(reduction="none")
    with pytest.raises(ValueError, match=rf"{name}: weight must be a finite number, got inf"):
        cls(weight=float("inf"))
    with pytest.raises(ValueError, match=r"\[3\] do not exist; valid indices are 0\.\.2"):
        cls(levels=(3,))(s, t, ctx)
    with pytest.raises(ValueError, match=r"level 0.*the teacher map requires a gradient"):
        cls()(s, [x.clone().requires_grad_() for x in t], ctx)
    with pytest.raises(ValueError, match=r"level 2.*student \(2, 4, 3, 4\) and teacher \(2, 4, 3, 5\)"):
        cls()(s, [*t[:2], torch.zeros(2, 4, 3, 5)], ctx)


def test_normalize_is_a_truth_value() -> None:
    with pytest.raises(TypeError, match="L2Loss: normalize must be True or False, got 'batch'"):
        L2Loss(1.0, "batch")
