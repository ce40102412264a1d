"""What surrounds an operation in real training: checkpointing, inference tensors, another default device, mixed precision."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ikd_fast import (
    ACMLoss,
    AdaptiveFreqAug,
    AdvFeatureLoss,
    CWDLoss,
    FGDLoss,
    FKDLoss,
    L1Loss,
    L2Loss,
    MGDLoss,
    NADLoss,
    PKDLoss,
    SSIMLoss,
)
from ikd_fast.kernels import pyramid_l1, pyramid_l2
from tests.losses.setups import context, pyramid, randomise


def losses():
    fgd, mgd = FGDLoss(preset="retinanet", channels=6, num_levels=3), MGDLoss(channels=6, num_levels=3)
    fkd = FKDLoss(channels=6, num_levels=3)
    for loss in (fgd, mgd, fkd):
        randomise(loss)
    return [
        ACMLoss(),
        AdvFeatureLoss(),
        AdvFeatureLoss(form="l1", ignore_padding=True),
        CWDLoss(),
        fgd,
        fkd,
        mgd,
        NADLoss(),
        PKDLoss(),
        SSIMLoss(),
        L2Loss(),
        L1Loss(),
    ]


def gradients(loss, student, teacher, ctx, wrap=lambda f, *x: f(*x)):
    maps = [x.clone().requires_grad_() for x in student]
    total = wrap(lambda *s: torch.stack(list(loss(list(s), teacher, ctx).values())).sum(), *maps)
    return total.detach(), *torch.autograd.grad(total, maps)


@pytest.mark.parametrize("loss", losses(), ids=lambda x: x.name)
def test_activation_checkpointing_changes_nothing(loss) -> None:
    s, t, ctx = pyramid(6, 1), pyramid(6, 2), context()
    want = gradients(loss, s, t, ctx)
    got = gradients(loss, s, t, ctx, lambda f, *x: checkpoint(f, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("loss", losses(), ids=lambda x: x.name)
def test_teacher_maps_may_come_from_inference_mode(loss) -> None:
    s, ctx = pyramid(6, 1), context()
    with torch.inference_mode():
        teacher = [x + 0 for x in pyramid(6, 2)]
    assert teacher[0].is_inference()
    want = gradients(loss, s, pyramid(6, 2), ctx)
    assert all(torch.equal(a, b) for a, b in zip(want, gradients(loss, s, teacher, ctx), strict=True))


@pytest.mark.parametrize("loss", losses(), ids=lambda x: x.name)
def test_losses_do_not_follow_a_default_device(loss) -> None:
    s, t, ctx = pyramid(6, 1), pyramid(6, 2), context()
    want = gradients(loss, s, t, ctx)
    with torch.device("meta"):
        got = gradients(loss, s, t, ctx)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_augmentation_does_not_follow_a_default_device() -> None:
    images = [torch.full((3, 40, 50), 99, dtype=torch.uint8), torch.full((3, 40, 50), 7, dtype=torch.uint8)]
    boxes = [torch.tensor([[2.0, 2.0, 12.0, 12.0]]), torch.tensor([[1.0, 1.0, 45.0, 39.0]])]
    targets = [dict(boxes=b, labels=torch.tensor([0])) for b in boxes]
    aug = AdaptiveFreqAug(noise_prob=1.0)
    want, _ = aug(images, targets, image_ids=[1, 2], epoch=0)
    with torch.device("meta"):
        got, _ = aug(images, targets, image_ids=[1, 2], epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("op", [pyramid_l2, pyramid_l1])
@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 16, 190, 180)], ids=["whole", "chunked"])
def test_a_float64_side_makes_it_float64(op, shape) -> None:
    g = torch.Generator().manual_seed(0)
    s, t = torch.rand(shape, generator=g), torch.rand(shape, generator=g, dtype=torch.float64)
    out = op([s.requires_grad_()], [t])
    assert out.dtype == torch.float64
    d = s.detach().double() - t
    # float64 sums of 5e5 terms in another order
    assert out.item() == pytest.approx(float((d * d if op is pyramid_l2 else d.abs()).sum()), rel=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), s)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, (2 * d if op is pyramid_l2 else d.sign()).float())
