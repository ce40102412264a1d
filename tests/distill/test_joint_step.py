"""A step with the student's images joined is the step with two forwards."""

from __future__ import annotations

import pytest
import torch

from ikd_fast import IKD, AdvFeatureLoss, OnlineDIFGSM, PixelUnits
from tests.distill.engine_nets import Backbone, trained
from tests.distill.test_joint import Task


def ikd(joint, task=None, **attack):
    torch.manual_seed(0)
    student, teacher = trained(Backbone(), 1).double(), trained(Backbone(), 2).double()
    return IKD(
        student,
        teacher,
        features="block",
        losses=[AdvFeatureLoss()],
        attack=OnlineDIFGSM(**{"mode": "single", "objective": "feature", **attack}),
        beta=1.0,
        task_loss=task or Task(),
        units=PixelUnits(value_range=(0, 1)),
        example=torch.zeros(1, 3, 32, 32).double(),
        joint_student=joint,
        stop_at=dict(epoch=5),
    )


def step(model, epoch=0):
    passes = []
    handle = model.student.register_forward_hook(lambda *_: passes.append(1))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    out = model.step(images, torch.tensor([0.1, 0.2, 0.3]).double(), image_ids=[1, 2, 3], epoch=epoch)
    out.total.backward()
    handle.remove()
    return out, [p.grad.clone() for p in model.student.parameters()], len(passes)


@pytest.mark.parametrize(
    "attack", [{}, dict(fraction=0.5), dict(mode="carry")], ids=["single", "fraction", "carry"]
)
def test_terms_and_gradients_are_those_of_two_forwards(attack):
    two, gradients, passes = step(ikd(False, **attack))
    one, ours, joined = step(ikd(True, **attack))
    assert passes == joined + 1
    assert list(one.terms) == list(two.terms)
    assert one.logs.keys() == two.logs.keys()
    for key, value in two.terms.items():
        # float64; convolutions may add in another order for another batch size.
        torch.testing.assert_close(one.terms[key], value, rtol=1e-10, atol=0)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_an_adversarial_branch_there_is_nothing_to_join():
    out, _, passes = step(ikd(True), epoch=5)
    assert passes == 1
    assert "kd/adv" not in out.terms


def test_what_it_needs():
    with pytest.raises(
        TypeError, match=r"needs a task_loss with from_features\(student, features, targets\)"
    ):
        ikd(True, task=lambda s, x, y: s(x)[1].mean())
    live = ikd(True)
    live.student.train()
    with pytest.raises(ValueError, match=r"needs frozen norms; stem.1 \(BatchNorm2d\)"):
        step(live)
