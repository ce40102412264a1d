"""A detector's losses from features that are there: those of its own forward."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.distill.joint import joint_forward
from ikd_fast.mmdet.joint import DetectorTask
from ikd_fast.mmdet.settings import dense_forward, whole_forward
from tests.mmdet.detectors import batch, distiller, small


def summed(losses):
    return {
        k: sum(x.sum() for x in v) if isinstance(v, list) else v.sum()
        for k, v in losses.items()
        if "loss" in k
    }


@pytest.mark.parametrize(
    ("name", "heads", "source"),
    [("retinanet", (), "neck"), ("gfl", ("bbox_head",), "bbox_head.cls_convs.0"), ("mask_rcnn", (), "neck")],
)
def test_losses_and_gradients_are_those_of_two_forwards(name, heads, source):
    levels = [0, 1, 2, 3] if name == "mask_rcnn" else None
    masks = "bitmap" if name == "mask_rcnn" else None
    model = distiller(small(name), small(name), levels=levels).double()
    net = model.student
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    data = batch(model, [0, 1, 2], masks=masks)
    clean, samples = data["inputs"].double(), data["data_samples"]
    adv = (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3)))[:2]
    call = partial(dense_forward, heads=heads)
    task = DetectorTask(summed, call)

    def total(losses, pyramids):
        return sum(losses.values()) + sum(m.square().mean() for p in pyramids for m in p)

    def two():
        torch.manual_seed(7)  # an R-CNN samples its boxes
        losses = task(net, clean, samples)
        maps = [joint_forward(net, adv, adv[:1], [source], [], call=call).clean[0]]
        return losses, maps

    def one():
        joint = joint_forward(net, clean, adv, [], [source], call=call)
        torch.manual_seed(7)
        return task.from_features(net, joint.features, samples), joint.adversarial

    results = []
    for run in (two, one):
        net.zero_grad()
        losses, maps = run()
        total(losses, maps).backward()
        results.append((losses, [None if p.grad is None else p.grad.clone() for p in net.parameters()]))
    (expected, gradients), (found, ours) = results
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)
    for a, b in zip(ours, gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert "extract_feat" not in vars(net)


def test_features_must_come_from_extract_feat():
    with pytest.raises(
        ValueError, match=r"joint_student=True makes the student's losses from the maps of its extract_feat"
    ):
        DetectorTask(summed, whole_forward)


def test_a_step_is_that_of_two_forwards():
    outs = []
    for joint in (False, True):
        model = distiller(small("retinanet"), small("retinanet"), joint_student=joint)
        model = model.double()
        for module in model.student.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        data = batch(model, [0, 1])
        data["inputs"], data["geo"] = data["inputs"].double(), data["geo"].double()
        losses = {k: v for k, v in model(**data, mode="loss").items() if "loss" in k}
        sum(losses.values()).backward()
        outs.append((losses, [p.grad for p in model.student.parameters()]))
    (two, gradients), (one, ours) = outs
    assert list(one) == list(two)
    for key, value in two.items():
        torch.testing.assert_close(one[key], value, rtol=1e-9, atol=1e-12)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
