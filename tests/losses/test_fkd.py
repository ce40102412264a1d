"""FKDLoss against the published form written out in float64; golden values, initialisation, gradients, pools, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.losses.fkd import FKDLoss
from ikd_fast.losses.non_local import NonLocal
from tests.losses.published import attention, golden_context, golden_maps
from tests.losses.setups import context, pyramid, randomise
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck

LEVELS = ((12, 16), (6, 8), (3, 4), (1, 1))  # the last is smaller than its pool
POOLS = (8, 4, 2, 1)
CHANNELS = 8  # one inner channel would leave nothing but rounding behind a normalisation


def conv1(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    weight = p[f"{name}.weight"].flatten(1)
    return torch.einsum("oi,nihw->nohw", weight, x) + p[f"{name}.bias"][None, :, None, None]


def published_non_local(x: Tensor, p: dict[str, Tensor], pool: int) -> Tensor:
    """The matrix of all positions by pooled positions, image by image; normalisation written out."""
    theta = conv1(x, p, "theta")
    phi, g = (F.max_pool2d(conv1(x, p, name), pool, pool) for name in ("phi", "g"))
    rows = []
    for i in range(len(x)):
        f = theta[i].flatten(1).T @ phi[i].flatten(1) / phi[i][0].numel()
        rows.append((f @ g[i].flatten(1).T).T.reshape(theta[i].shape))
    y = conv1(torch.stack(rows), p, "out")
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = (p[f"norm.{k}"][None, :, None, None] for k in ("weight", "bias"))
    return x + (y - mean) / (var + 1e-5).sqrt() * scale + shift


def published_fkd(
    s: Tensor, t: Tensor, p: dict[str, Tensor], pool: int, tau: float, both: bool
) -> list[Tensor]:
    with torch.no_grad():
        spatial, channel = ((a + b) / 2 for a, b in zip(attention(s, tau), attention(t, tau), strict=True))
    weight = spatial[:, None].expand_as(s)
    if both:
        weight = weight * channel[:, :, None, None]
    feat = (((t - conv1(s, p, "feature")) ** 2) * weight).sum().sqrt()
    vector = s.mean((2, 3)) @ p["channel.weight"].T + p["channel.bias"]
    chan = (t.mean((2, 3)) - vector).norm()
    picture = F.conv2d(s.mean(1, keepdim=True), p["spatial.weight"], p["spatial.bias"], padding=1)
    spat = (t.mean(1, keepdim=True) - picture).norm()
    sides = [
        published_non_local(
            x, {k.removeprefix(f"{side}_non_local."): v for k, v in p.items() if side in k}, pool
        )
        for side, x in (("student", s), ("teacher", t))
    ]
    return [feat, chan, spat, (conv1(sides[0], p, "relation") - sides[1]).norm()]


def identity(loss: FKDLoss) -> None:
    """Every adaptation passes its input on."""
    with torch.no_grad():
        for part in loss.adaptation.values():
            for layer in (part.feature, part.relation):
                layer.weight.copy_(torch.eye(layer.weight.shape[0])[:, :, None, None])
            part.channel.weight.copy_(torch.eye(part.channel.weight.shape[0]))
            part.spatial.weight.zero_()[0, 0, 1, 1] = 1.0
            for layer in (part.feature, part.relation, part.channel, part.spatial):
                layer.bias.zero_()


@pytest.mark.parametrize(("both", "feat"), [(False, 4.843270234), (True, 4.845352550)])
def test_golden_values(both: bool, feat: float) -> None:
    s, t = golden_maps()
    loss = FKDLoss(tau=0.5, alpha=2.0, beta=3.0, gamma=5.0, channel_attention=both, channels=4, num_levels=1)
    loss.double()
    identity(loss)
    terms = loss.terms([s], [t])["0"]
    # The last of the ten digits is half a unit of 1e-9, relative to values near 1. `nld` at first: sqrt of sum D^2.
    want = {"feat": feat, "chan": 0.162332169, "spat": 0.910189326, "nld": 4.857177733}
    for key, value in want.items():
        assert terms[key].item() == pytest.approx(value, rel=1e-8), key
    total = 2 * feat + 3 * (want["chan"] + want["spat"]) + 5 * want["nld"]
    assert loss([s], [t], golden_context())["0"].item() == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_against_the_published_form(dtype, both) -> None:
    s, t = (pyramid(CHANNELS, k, dtype=dtype, levels=LEVELS) for k in (1, 2))
    weights = dict(alpha=0.3, beta=0.5, gamma=0.7)
    loss = FKDLoss(**weights, tau=0.4, channel_attention=both, channels=CHANNELS, num_levels=4)
    randomise(loss)
    if dtype == torch.float64:
        loss.double()
    mine = [x.clone().requires_grad_() for x in s]
    truth = [x.double().requires_grad_() for x in s]
    copies = {k: v.detach().double().requires_grad_() for k, v in loss.named_parameters()}
    got, total = loss(mine, t, context()), 0
    for i, x in enumerate(truth):
        prefix = f"adaptation.{i}."
        p = {k.removeprefix(prefix): v for k, v in copies.items() if k.startswith(prefix)}
        feat, chan, spat, nld = published_fkd(x, t[i].double(), p, POOLS[i], 0.4, both)
        want = 0.3 * feat + 0.5 * (chan + spat) + 0.7 * nld
        assert got[str(i)].item() == pytest.approx(want.item(), rel=TOLERANCES[dtype].value)
        total = total + (i + 1) * want
    sum((i + 1) * v for i, v in enumerate(got.values())).backward()
    total.backward()
    # At one position of two images the normalisation's slope cancels to nothing but rounding: levels 0 to 2.
    for a, b in list(zip(mine, truth, strict=True))[:3]:
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient, "student maps")
    for name, p in loss.named_parameters():
        if ".3." in name or name.endswith("non_local.out.bias"):
            continue  # a bias before a normalisation: no gradient but rounding
        # Gradients behind a normalisation are small differences of large ones, in float32 good to some 1e-4.
        assert_near(p.grad, copies[name].grad, 1e-3 if dtype != torch.float64 else 1e-10, name)


@pytest.mark.parametrize("both", [False, True])
def test_gradcheck(both) -> None:
    s, t = (pyramid(4, k, dtype=torch.float64, levels=((3, 4),)) for k in (1, 2))
    loss = FKDLoss(alpha=1.0, beta=1.0, gamma=1.0, channel_attention=both, channels=4, num_levels=1).double()
    randomise(loss)
    part = loss.adaptation["0"]
    with torch.no_grad():
        masks = published_masks(s[0], t[0], loss.tau, both)

    def held(x: Tensor, *_: Tensor) -> Tensor:
        """Finite differences would move the masks, which have no gradient: feat with the masks held, and the rest."""
        feat = ((t[0] - F.conv2d(x, part.feature.weight, part.feature.bias)).square() * masks).sum().sqrt()
        terms = loss.terms([x], t)["0"]
        return feat + terms["chan"] + terms["spat"] + terms["nld"]

    x = s[0].requires_grad_()
    gradcheck(held, x, part.teacher_non_local.norm.weight, part.student_non_local.theta.weight)
    mine = torch.autograd.grad(loss([x], t, context())["0"], x)[0]
    assert_near(mine, torch.autograd.grad(held(x), x)[0], 1e-10, "masks without a gradient")


def published_masks(s: Tensor, t: Tensor, tau: float, both: bool) -> Tensor:
    spatial, channel = ((a + b) / 2 for a, b in zip(attention(s, tau), attention(t, tau), strict=True))
    return spatial[:, None] * channel[:, :, None, None] if both else spatial[:, None].expand_as(s)


def test_non_local_block_is_the_identity_at_first_and_only_its_scale_is_trained_then() -> None:
    s, t = pyramid(6, 1), pyramid(6, 2)
    loss = FKDLoss(channels=6, num_levels=3)
    for i, part in enumerate(loss.adaptation.values()):
        for block in (part.student_non_local, part.teacher_non_local):
            assert torch.equal(block(s[i]), s[i])
    sum(loss(s, t, context()).values()).backward()
    for name, p in loss.named_parameters():
        still = "non_local" in name and ".norm." not in name
        assert (p.grad.abs().max() == 0) == still, name


def test_sizes_of_the_blocks_go_by_pyramid_index() -> None:
    loss = FKDLoss(levels=(1, 3), channels=256, num_levels=4)
    blocks = {k: p.teacher_non_local for k, p in loss.adaptation.items()}
    assert {k: (b.pool, b.theta.out_channels) for k, b in blocks.items()} == {"1": (4, 64), "3": (2, 128)}
    first = FKDLoss(channels=256, num_levels=1).adaptation["0"].student_non_local
    assert (first.pool, first.theta.out_channels) == (8, 64)
    assert first.norm.weight.abs().max() == first.norm.bias.abs().max() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (7, 7), (8, 9)])
def test_pool_is_capped_at_the_smaller_side(size) -> None:
    block = NonLocal(4, 2, pool=8).double()
    randomise(block)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    got = block(x)
    want = published_non_local(x, dict(block.named_parameters()), min(8, *size))
    assert got.isfinite().all()
    assert_near(got, want, 1e-9, "block")


def test_both_sides_are_trained_the_teachers_maps_are_not() -> None:
    s, t = [x.requires_grad_() for x in pyramid(4, 1)], pyramid(6, 2)
    loss = FKDLoss(preset="retinanet")
    loss.bind([4] * 3, [6] * 3)
    assert list(loss.align) == ["0", "1", "2"]
    randomise(loss)
    sum(loss(s, t, context()).values()).backward()
    assert all(x.grad.abs().max() > 0 for x in s)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    for part in loss.adaptation.values():
        for block in (part.student_non_local, part.teacher_non_local):
            assert all(layer.weight.grad.abs().max() > 0 for layer in (block.theta, block.phi, block.g))
    assert all(x.grad is None for x in t)


@pytest.mark.parametrize("maps", ["equal", "constant", "zero"])
def test_finite_gradient_where_norms_vanish(maps) -> None:
    t = pyramid(5, 1)
    if maps != "equal":
        t = [torch.full_like(x, 0.0 if maps == "zero" else 3.0) for x in t]
    s = [x.clone().requires_grad_() for x in t]
    loss = FKDLoss(channels=5, num_levels=3)
    identity(loss)
    values = loss(s, t, context())
    # A softmax of equal entries and means of equal maps: the same operations on both sides, so the same bits. Only the
    # adaptations, sums over channels, may round.
    assert all(v.item() < 1e-6 for v in values.values())
    sum(values.values()).backward()
    assert all(x.grad.isfinite().all() for x in s)
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_zero_is_zero_where_nothing_rounds() -> None:
    t = pyramid(5, 1, dtype=torch.float64)
    loss = FKDLoss(channels=5, num_levels=3).double()
    identity(loss)
    s = [x.clone().requires_grad_() for x in t]
    values = loss(s, t, context())
    assert all(v.item() == 0 for v in values.values())
    sum(values.values()).backward()
    assert all(x.grad.abs().max() == 0 for x in s)


def test_norms_of_a_batch_taken_twice_grow_by_the_root_of_two() -> None:
    s, t = pyramid(5, 1, dtype=torch.float64), pyramid(5, 2, dtype=torch.float64)
    loss = FKDLoss(channels=5, num_levels=3).double()
    randomise(loss)
    once = loss(s, t, context())
    twice = loss([torch.cat([x, x]) for x in s], [torch.cat([x, x]) for x in t], context(4))
    for key, value in once.items():
        assert twice[key].item() == pytest.approx(math.sqrt(2) * value.item(), rel=1e-12)


def test_autocast_and_large_half_maps() -> None:
    s, t = ([x.mul(1e4 / 3).clamp(-6e4, 6e4).half() for x in pyramid(16, k)] for k in (1, 2))
    loss = FKDLoss(channels=16, num_levels=3)
    randomise(loss)
    mine = [x.clone().requires_grad_() for x in s]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(mine, t, context())
    want = loss([x.float() for x in s], [x.float() for x in t], context())
    for key, value in want.items():
        assert got[key].isfinite()
        assert got[key].item() == pytest.approx(value.item(), rel=1e-5)
    sum(got.values()).backward()
    assert all(x.grad.dtype == torch.float16 and x.grad.isfinite().all() for x in mine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_running_statistics_follow_whatever_dtype_they_are_kept_in(dtype) -> None:
    s, t = pyramid(4, 1), pyramid(4, 2)
    plain, other = (FKDLoss(channels=4, num_levels=3) for _ in range(2))
    randomise(plain)
    other.load_state_dict(plain.state_dict())
    other.to(dtype)
    values = [loss(s, t, context()) for loss in (plain, other)]
    for key, value in values[0].items():
        assert values[1][key].item() == pytest.approx(value.item(), rel=2e-2)  # weights of 10 bits
    norms = [loss.adaptation["0"].teacher_non_local.norm for loss in (plain, other)]
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked == 1
    assert norms[1].running_var.dtype == dtype
    assert not torch.equal(norms[0].running_var, torch.ones(4))
    assert_near(norms[1].running_var, norms[0].running_var, 2e-2, "running variance")
    plain.eval()
    again = [plain(s, t, context())["0"] for _ in range(2)]
    assert torch.equal(*again)
    assert norms[0].num_batches_tracked == 1


def test_presets_and_what_is_given_beside_them() -> None:
    one, two = FKDLoss(preset="retinanet"), FKDLoss(preset="faster_rcnn")
    assert (one.tau, one.alpha, one.beta, one.gamma) == (0.5, 4.2e-4, 2.4e-2, 4.2e-4)
    assert one.channel_attention
    assert (two.alpha, two.beta, two.gamma) == (7e-5, 4e-3, 7e-5)
    assert two.levels == (0, 1, 2, 3)
    assert not two.channel_attention
    mixed = FKDLoss(preset="faster_rcnn", tau=0.1, channel_attention=True, levels=(1,))
    assert (mixed.tau, mixed.channel_attention, mixed.levels, mixed.alpha) == (0.1, True, (1,), 7e-5)
    assert not FKDLoss(preset="retinanet", channel_attention=False).channel_attention
    assert (FKDLoss().alpha, FKDLoss().channel_attention) == (4.2e-4, True)


def test_bad_input() -> None:
    for tau in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="FKDLoss: tau must be a finite number > 0"):
            FKDLoss(tau=tau)
    with pytest.raises(ValueError, match="FKDLoss: gamma must be a finite number"):
        FKDLoss(gamma=float("inf"))
    with pytest.raises(TypeError, match="channel_attention must be True or False, got 1"):
        FKDLoss(channel_attention=1)
    with pytest.raises(ValueError, match="unknown preset 'yolo'"):
        FKDLoss(preset="yolo")
    s, t = pyramid(4, 1), pyramid(4, 2)
    with pytest.raises(
        RuntimeError, match=r"no parameters yet for 4 student and 4 teacher channels; call\s+bind"
    ):
        FKDLoss()(s, t, context())
    loss = FKDLoss(channels=4, num_levels=3)
    with pytest.raises(ValueError, match=r"bound to \(student, teacher\) channels \(4, 4\), got \(5, 4\)"):
        loss(pyramid(5, 1), t, context())
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        loss(s, [x.clone().requires_grad_() for x in t], context())
    with pytest.raises(ValueError, match=r"levels=\(4,\), but the pyramid has 3 levels"):
        FKDLoss(levels=(4,)).bind([4] * 3, [4] * 3)
    one = [torch.randn(1, 4, 1, 1)]
    single = FKDLoss(channels=4, num_levels=1)
    with pytest.raises(
        ValueError, match=r"level 0: .* needs N H W > 1, got maps \(1, 4, 1, 1\); leave this level out"
    ):
        single(one, one, context(1))
    assert single.eval()(one, one, context(1))["0"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_the_same_loss(dtype) -> None:
    pytest.importorskip("triton", minversion="3.6", reason="needs triton >= 3.6 (Linux)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    levels = ((4, 6), (2, 3))
    losses = [FKDLoss(channels=5, num_levels=2, backend=b) for b in ("reference", "triton")]
    randomise(losses[0])
    losses[1].load_state_dict(losses[0].state_dict())
    results = []
    for loss in losses:
        s = [x.to(device).requires_grad_() for x in pyramid(5, 1, dtype=dtype, levels=levels)]
        t = [x.to(device) for x in pyramid(5, 2, dtype=dtype, levels=levels)]
        values = loss.to(device)(s, t, context())
        results.append((values, torch.autograd.grad(sum(values.values()), s)))
    for key, value in results[0][0].items():
        assert results[1][0][key].item() == pytest.approx(value.item(), rel=1e-5)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        assert_near(a, b, TOLERANCES[dtype].gradient, "gradient")
