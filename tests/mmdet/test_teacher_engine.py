"""The engine under mmdet's detectors: pyramid, class loss and its gradient, a whole step, a carried one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ikd_fast.mmdet  # noqa: F401
from tests.distill.engine_nets import trained
from tests.mmdet.detectors import batch, distiller, small

SIGNS = 0.9


def models(name: str, engine: dict, **changes):
    """The same distiller without an engine and with one, norms of both teachers as training leaves them."""
    pair = []
    for options in (None, dict(report=None, **engine)):
        model = distiller(small(name), small(name), teacher_engine=options, **changes)
        trained(model.ikd.teacher.net)
        pair.append(model)
    return pair


def class_loss(model, inputs, targets):
    x = inputs.clone().requires_grad_(True)
    value = model.ikd.victim(x, targets).sum()
    return value.detach(), torch.autograd.grad(value, x)[0]


def noise():
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(4))


def boxes(dtype):
    box = torch.tensor([[10.0, 10.0, 60.0, 70.0]], dtype=dtype)
    return [dict(boxes=box, labels=torch.tensor([1]), size=(96, 96))] * 2


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "cascade_dcn"])
def test_the_class_loss_runs_the_folded_net(name):
    levels = [0, 1, 2, 3] if name != "retinanet" else None
    plain, folded = models(name, dict(fold_bn=True, channels_last=True), levels=levels)
    for model in (plain, folded):
        model.double()
    # Noise: on areas of one colour max-pooling has ties, which roundings break either way.
    inputs = noise().double()
    targets = boxes(torch.float64)
    (value, slope), (found, gradient) = (class_loss(m, inputs, targets) for m in (plain, folded))
    # float64: only roundings moved.
    torch.testing.assert_close(found, value, rtol=1e-10, atol=0)
    assert relative(gradient, slope) < 1e-9
    net = folded.ikd.teacher.running
    norms = [n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # Deformable convolutions are no torch convolutions: the norms behind them stay.
    assert len(norms) == (13 if name == "cascade_dcn" else 0)
    assert folded.ikd.teacher.fingerprint() == plain.ikd.teacher.fingerprint()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_direction_of_the_attack(dtype):
    plain, half = models("retinanet", dict(dtype=dtype))
    inputs, targets = noise(), boxes(torch.float32)
    (value, slope), (found, gradient) = (class_loss(m, inputs, targets) for m in (plain, half))
    assert found.dtype == gradient.dtype == torch.float32
    assert 0 < relative(found, value) < 0.02
    seen = slope != 0
    assert float((gradient.sign() == slope.sign())[seen].float().mean()) > (
        SIGNS if dtype == "bfloat16" else 0.6
    )


@pytest.mark.parametrize("attack", [dict(mode="single"), dict(mode="carry")], ids=["single", "carry"])
def test_a_step_is_that_of_the_net_as_it_is(attack):
    adv = dict(beta=1e-3, attack=dict(type="OnlineDIFGSM", **attack), loss=dict(type="AdvFeatureLoss"))
    outs = []
    for model in models("retinanet", dict(fold_bn=True, channels_last=True), adv=adv):
        data = batch(model, [0, 1])
        model.double()
        data["inputs"], data["geo"] = data["inputs"].double(), data["geo"].double()
        torch.manual_seed(1)
        outs.append(model(**data, mode="loss"))
    plain, folded = outs
    for key, value in plain.items():
        if "loss" in key:
            torch.testing.assert_close(folded[key], value, rtol=1e-6, atol=1e-12)


def test_what_the_engine_says_goes_to_the_log(monkeypatch):
    lines = []
    monkeypatch.setattr("ikd_fast.mmdet.build.print_log", lambda line, **_: lines.append(line))
    distiller(small("retinanet"), small("retinanet"), teacher_engine=dict(dtype="bfloat16"))
    assert [line for line in lines if line.startswith("ikd_fast: teacher engine (fold_bn 20 of 20, ")]
