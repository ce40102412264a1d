"""MGDLoss against the published form with the mask given; initialisation, gradients, keys, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ikd_fast.kernels import keyed_mask
from ikd_fast.losses import MGDLoss
from tests.losses.setups import context, pyramid, randomise
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck


def published_mgd(s, t, mask, layers, alpha):
    """``layers``: weight, bias, weight, bias of the two 3x3 convolutions."""
    y = F.relu(F.conv2d(s * mask, layers[0], layers[1], padding=1))
    return alpha * (F.conv2d(y, layers[2], layers[3], padding=1) - t).square().sum() / len(s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_against_the_published_form(dtype) -> None:
    s, t, ctx = pyramid(7, 1, dtype=dtype), pyramid(7, 2, dtype=dtype), context()
    loss = MGDLoss(alpha=3e-4, mask_ratio=0.5, channels=7, num_levels=3)
    randomise(loss)
    if dtype == torch.float64:
        loss.double()
    mine = [x.clone().requires_grad_() for x in s]
    got = loss(mine, t, ctx)
    truth = [x.double().requires_grad_() for x in s]
    copies = {k: v.detach().double().requires_grad_() for k, v in loss.named_parameters()}
    upstream = torch.randn(3, dtype=torch.float64).tolist()
    total = 0
    for i, x in enumerate(truth):
        layers = [copies[f"generation.{i}.{k}"] for k in ("0.weight", "0.bias", "2.weight", "2.bias")]
        h, w = x.shape[2:]
        mask = keyed_mask(ctx.image_ids, h, w, ratio=0.5, level=i, seed=2, epoch=1, dtype=torch.float64)
        want = published_mgd(x, t[i].double(), mask, layers, 3e-4)
        assert got[str(i)].item() == pytest.approx(want.item(), rel=TOLERANCES[dtype].value)
        total = total + upstream[i] * want
    sum(u * v for u, v in zip(upstream, got.values(), strict=True)).backward()
    total.backward()
    for a, b in zip(mine, truth, strict=True):
        assert_near(a.grad, b.grad, TOLERANCES[dtype].gradient, "student maps")
    for name, p in loss.named_parameters():
        assert_near(p.grad, copies[name].grad, 1e-4 if dtype != torch.float64 else 1e-11, name)


def test_gradcheck() -> None:
    s, t = (pyramid(3, k, dtype=torch.float64, levels=((3, 4),)) for k in (1, 2))
    loss = MGDLoss(alpha=1.0, channels=3, num_levels=1).double()
    ctx = context()
    gradcheck(lambda s: loss([s], t, ctx)["0"], s[0].requires_grad_())


def test_ratio_ends() -> None:
    s, t, ctx = pyramid(5, 1), pyramid(5, 2), context()
    open_, shut = (MGDLoss(alpha=1.0, mask_ratio=r, channels=5, num_levels=3) for r in (0.0, 1.0))
    shut.load_state_dict(open_.state_dict())
    layers = list(open_.generation["0"].parameters())
    want = published_mgd(s[0], t[0], torch.ones(()), layers, 1.0)
    assert open_(s, t, ctx)["0"].item() == pytest.approx(want.item(), rel=1e-6)
    want = published_mgd(torch.zeros_like(s[0]), t[0], torch.ones(()), layers, 1.0)
    assert shut(s, t, ctx)["0"].item() == pytest.approx(want.item(), rel=1e-6)


def test_loss_of_an_image_depends_on_its_own_key_alone() -> None:
    s, t = pyramid(5, 1, n=3), pyramid(5, 2, n=3)
    loss = MGDLoss(alpha=1.0, channels=5, num_levels=3)
    whole = sum(loss(s, t, context(3)).values())
    ids = context(3).image_ids
    alone = [
        sum(
            loss(
                [x[i : i + 1] for x in s], [x[i : i + 1] for x in t], context(1, image_ids=[ids[i]])
            ).values()
        )
        for i in range(3)
    ]
    assert whole.item() == pytest.approx(sum(alone).item() / 3, rel=1e-5)
    again = sum(loss(s, t, context(3, step=9)).values())
    assert torch.equal(whole, again)
    for change in ({"epoch": 5}, {"seed": 5}, {"image_ids": [1, 2, 3]}):
        assert not torch.equal(whole, sum(loss(s, t, context(3, **change)).values()))


def test_gradients_reach_student_align_and_generation_not_the_teacher() -> None:
    s, t = [x.requires_grad_() for x in pyramid(4, 1)], pyramid(6, 2)
    loss = MGDLoss(preset="retinanet")
    loss.bind([4] * 3, [6] * 3)
    sum(loss(s, t, context()).values()).backward()
    assert all(x.grad.abs().max() > 0 for x in s)
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())
    assert {n.split(".")[0] for n, _ in loss.named_parameters()} == {"align", "generation"}
    assert all(x.grad is None for x in t)


def test_layers_as_published() -> None:
    loss = MGDLoss(channels=[8, 8], teacher_channels=[8, 16])
    first, act, last = loss.generation["1"]
    assert isinstance(act, torch.nn.ReLU)
    for layer in (first, last):
        assert layer.weight.shape == (16, 16, 3, 3)
        assert layer.padding == (1, 1)
        assert layer.bias.shape == (16,)
    assert list(loss.align) == ["1"]


def test_autocast_and_large_half_maps() -> None:
    s, t = ([x.mul(100).half() for x in pyramid(64, k)] for k in (1, 2))
    loss = MGDLoss(channels=64, num_levels=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(s, t, context())
    want = loss([x.float() for x in s], [x.float() for x in t], context())
    for key, value in want.items():
        assert value.item() > 65504 * 2e-5  # sum before the weight exceeds fp16
        assert got[key].item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), "half"])
def test_mask_ratio_errors(ratio) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        MGDLoss(mask_ratio=ratio)


def test_one_id_an_image() -> None:
    loss = MGDLoss(channels=4, num_levels=3)
    with pytest.raises(ValueError, match="one image id for each of the 2 images, got 1"):
        loss(pyramid(4, 1), pyramid(4, 2), context(image_ids=[1]))


def test_half_maps_some_of_them_aligned() -> None:
    s = [*pyramid(4, 1, dtype=torch.bfloat16)[:2], pyramid(6, 1, dtype=torch.bfloat16)[2]]
    t = [*pyramid(6, 2, dtype=torch.bfloat16)[:2], pyramid(6, 2)[2]]  # teacher levels of two dtypes
    loss = MGDLoss(alpha=1.0, channels=[4, 4, 6], teacher_channels=[6, 6, 6])
    mine = [x.clone().requires_grad_() for x in s]
    got = loss(mine, t, context())
    want = loss([x.float() for x in s], [x.float() for x in t], context())
    for key, value in want.items():
        assert got[key].item() == pytest.approx(value.item(), rel=1e-6)
    sum(got.values()).backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.abs().max() > 0 for x in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_the_same_loss(dtype) -> None:
    pytest.importorskip("triton", minversion="3.6", reason="needs triton >= 3.6 (Linux)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses = [MGDLoss(alpha=1.0, channels=5, num_levels=3, backend=b) for b in ("reference", "triton")]
    losses[1].load_state_dict(losses[0].state_dict())
    results = []
    for loss in losses:
        s = [x.to(device).requires_grad_() for x in pyramid(5, 1, dtype=dtype)]
        t = [x.to(device) for x in pyramid(5, 2, dtype=dtype)]
        values = loss.to(device)(s, t, context())
        results.append((values, torch.autograd.grad(sum(values.values()), [*s, *loss.parameters()])))
    for key, value in results[0][0].items():
        assert results[1][0][key].item() == pytest.approx(value.item(), rel=1e-5)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        assert_near(a, b, TOLERANCES[a.dtype].gradient, "gradient")


def test_backend_is_checked_when_the_loss_is_made() -> None:
    with pytest.raises(ValueError, match="MGDLoss: backend must be one of 'auto', 'triton', 'reference'"):
        MGDLoss(backend="cuda")
