"""What only a GPU can show: the same numbers as on the CPU, and no host sync of ours in a step."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from ikd_fast import (
    IKD,
    ACMLoss,
    AdaptiveFreqAug,
    AdvFeatureLoss,
    CWDLoss,
    DistillContext,
    FGDLoss,
    FKDLoss,
    L1Loss,
    L2Loss,
    MGDLoss,
    NADLoss,
    OnlineDIFGSM,
    PixelUnits,
    PKDLoss,
    SSIMLoss,
)
from ikd_fast.kernels.reference.philox import Stream, normal, philox4x32_blocks
from tests.distill.nets import Net, batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KEY = dict(seed=2**40 + 7, id=2**63 + 11, epoch=3)


@contextmanager
def no_sync():
    """Any device-to-host wait inside raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_philox_words_are_equal_bit_for_bit():
    blocks = torch.arange(10_000)
    args = (KEY["id"], Stream.NOISE, KEY["epoch"], KEY["seed"])
    assert torch.equal(philox4x32_blocks(blocks, *args), philox4x32_blocks(blocks.cuda(), *args).cpu())


def test_normals_agree():
    a = normal(100_003, stream=Stream.NOISE, **KEY)
    b = normal(100_003, stream=Stream.NOISE, device="cuda", **KEY).cpu()
    # log and cos differ by an ulp or two between the two maths libraries.
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_augmentation_gives_the_cpu_image_without_a_sync():
    aug = AdaptiveFreqAug(noise_prob=1.0, hflip_prob=0.5)
    images = [torch.randint(0, 256, (3, 90, 121 + i), dtype=torch.uint8) for i in range(6)]
    targets = [
        dict(boxes=torch.tensor([[5.0, 5.0, 25.0 + 10 * i, 25.0]]), labels=torch.tensor([0]))
        for i in range(6)
    ]
    plan = aug.plan_for(images, targets, range(6), 0)
    expected, _ = aug.apply(images, targets, plan)
    on_device = [image.cuda() for image in images]
    aug.apply(on_device, targets, plan)
    with no_sync():
        found, _ = aug.apply(on_device, targets, plan)
    for a, b in zip(expected, found, strict=True):
        # A normal that differs by 1e-5 may round to the other grey level.
        assert int((a.int() - b.cpu().int()).abs().max()) <= 1


@pytest.mark.parametrize(
    "loss",
    [
        FGDLoss(preset="retinanet"),
        MGDLoss(),
        AdvFeatureLoss(),
        AdvFeatureLoss(form="norm"),
        CWDLoss(),
        FKDLoss(),
        SSIMLoss(),
        PKDLoss(),
        L2Loss(),
        L1Loss(),
        NADLoss(weight=1.0),
        ACMLoss(),
    ],
    ids=lambda loss: f"{type(loss).__name__} {getattr(loss, 'form', '')}".strip(),
)
def test_losses_agree_with_the_cpu_and_do_not_sync(loss, monkeypatch):
    # MGD's and FKD's convolutions in float32 proper.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    shapes = [(2, 16, 25, 42), (2, 16, 13, 21)]
    s, t = [torch.randn(x) for x in shapes], [torch.randn(x) for x in shapes]
    boxes = [torch.tensor([[10.0, 20.0, 90.0, 80.0], [0.0, 0.0, 8.0, 8.0]]), torch.zeros(0, 4)]
    loss.bind([16, 16], [16, 16])

    def value(device):
        module = loss.to(device)
        ctx = DistillContext(
            [b.to(device) for b in boxes], None, [(200, 330), (190, 336)], (200, 336), [1, 2]
        )
        maps = [x.to(device).detach().requires_grad_(True) for x in s]
        fixed = [x.to(device) for x in t]
        out = module(maps, fixed, ctx)
        if device == "cuda":
            with no_sync():
                out = module(maps, fixed, ctx)
        total = sum(out.values())
        return total, torch.autograd.grad(total, maps)

    (a, ga), (b, gb) = value("cpu"), value("cuda")
    # float32 sums of 1e4 terms in another order.
    torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-6)
    for x, y in zip(ga, gb, strict=True):
        torch.testing.assert_close(y.cpu(), x, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["single", "iterative", "random_sign"])
def test_a_whole_step_does_not_sync(mode):
    torch.manual_seed(0)
    student, teacher = Net().cuda(), Net().cuda()

    def class_loss(net, images, targets):
        labels = torch.stack([t["labels"][0] for t in targets])
        return sum(F.cross_entropy(level.flatten(2).mean(2), labels) for level in net(images))

    ikd = IKD(
        student,
        teacher,
        losses=[FGDLoss(preset="retinanet"), MGDLoss()],
        attack=OnlineDIFGSM(mode, diversity_prob=0.5),
        augment=AdaptiveFreqAug(value_range=(0, 1), noise_prob=1.0),
        units=PixelUnits(value_range=(0, 1)),
        victim=lambda x, y: class_loss(teacher, x, y),
        task_loss=class_loss,
        example=torch.zeros(1, 3, 64, 64),
    )
    images, targets = batch()
    images = images.cuda()
    ikd.step(images, targets, image_ids=range(3), epoch=0).total.backward()
    with no_sync():
        out = ikd.step(images, targets, image_ids=range(3), epoch=1)
        out.total.backward()
    assert bool(out.total.isfinite())


def test_perturbation_is_that_of_the_cpu():
    torch.manual_seed(0)
    net = Net().eval()
    images, _ = batch()

    def run(device):
        victim = net.to(device)
        attack = OnlineDIFGSM("single", value_range=(0, 1))
        return attack(
            lambda x, y: victim(x)[0].square().sum(), images.to(device), image_ids=range(3), epoch=0
        ).images.cpu()

    # Signs of gradients near zero may turn: convolutions add in another order.
    assert float(((run("cpu") - run("cuda")).abs() > 1e-5).float().mean()) < 0.01
