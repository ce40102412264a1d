"""Where the maps of a detector come from: before and after a GroupNorm, and from a head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ikd_fast.mmdet  # noqa: F401
from tests.mmdet.detectors import SIDE, batch, distiller, small


def test_group_norm_of_reppoints_neck_lies_between_two_taps():
    """The neck written out: convolutions of the merged laterals are ``.conv``, their GroupNorm is what the neck returns."""
    model = distiller(small("reppoints"), small("reppoints"))
    net = model.ikd.teacher.net
    images = torch.randn(2, 3, SIDE, SIDE)
    before, after = model.ikd.teacher.pyramids(images, ["neck.fpn_convs.{i}.conv", "neck"])
    with torch.no_grad():
        c3, c4, c5 = net.backbone(images)[1:]
        laterals = []
        for part, c in zip(net.neck.lateral_convs, (c3, c4, c5), strict=True):
            laterals.append(F.group_norm(F.conv2d(c, part.conv.weight), 4, part.gn.weight, part.gn.bias))
        for i in (1, 0):
            laterals[i] = laterals[i] + F.interpolate(
                laterals[i + 1], size=laterals[i].shape[-2:], mode="nearest"
            )
        raw, out = [], []
        for i, part in enumerate(net.neck.fpn_convs):
            x = [*laterals, c5][i] if i < 4 else out[-1]
            raw.append(F.conv2d(x, part.conv.weight, padding=1, stride=1 if i < 3 else 2))
            out.append(F.group_norm(raw[-1], 4, part.gn.weight, part.gn.bias))
    assert len(before) == len(after) == 5
    for got, expected in zip(before + after, raw + out, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(float((a - b).abs().max()) > 0.01 for a, b in zip(before, after, strict=True))


def test_a_loss_gets_the_maps_its_source_names():
    """``sum D^2 / N`` by hand on either side of the GroupNorm."""
    losses = [
        dict(type="AdvFeatureLoss", name="raw", source="neck.fpn_convs.{i}.conv"),
        dict(type="AdvFeatureLoss", name="normed"),
    ]
    model = distiller(small("reppoints"), small("reppoints"), losses=losses, adv=None, augment=None)
    data = batch(model, [0, 1])
    out = model(**data, mode="loss")
    for name, path in (("raw", "conv"), ("normed", None)):
        student, teacher = (
            captured(net, path, data["inputs"]) for net in (model.student, model.ikd.teacher.net)
        )
        total = sum(float((s - t).square().sum()) / 2 for s, t in zip(student, teacher, strict=True))
        assert float(out[f"loss_kd/{name}"].detach()) == pytest.approx(total, rel=1e-5)


def captured(net, part, images):
    """What each of the neck's output convolutions (or the ``part`` of it) gives, in float64."""
    maps = []
    modules = [getattr(conv, part) if part else conv for conv in net.neck.fpn_convs]
    hooks = [m.register_forward_hook(lambda m, i, out: maps.append(out.detach().double())) for m in modules]
    with torch.no_grad():
        net.extract_feat(images)
    for hook in hooks:
        hook.remove()
    return maps


def test_taps_of_a_head():
    """A dense head may be tapped in any family; an RoI head's maps belong to boxes."""
    adv = dict(loss=dict(type="AdvFeatureLoss", source="rpn_head.rpn_conv"))
    model = distiller(small("faster_rcnn"), small("faster_rcnn"), [0, 1, 2, 3], adv=adv)
    out = model(**batch(model, [0, 1]), mode="loss")
    assert float(out["loss_kd/adv"].detach()) > 0
    retina = small("retinanet")
    with pytest.raises(ValueError, match="tap backbone, neck, rpn_head or bbox_head"):
        distiller(retina, retina, losses=[dict(type="MGDLoss", source="roi_head.bbox_head")])


def logits(net, path, inputs):
    """What a head's convolution gives in each of its calls, in float64."""
    maps = []
    hook = net.get_submodule(path).register_forward_hook(lambda m, i, out: maps.append(out.detach().double()))
    with torch.no_grad():
        net.bbox_head(net.extract_feat(inputs))
    hook.remove()
    return maps


def test_class_logits_are_a_pyramid_in_the_order_of_the_calls():
    """CWD on GFL's ``gfl_cls`` beside FGD on the neck: PyTorch's ``kl_div`` on the logits of each level, channels averaged."""
    losses = [
        dict(type="FGDLoss"),
        dict(type="CWDLoss", tau=2.0, weight=3.0, source="bbox_head.gfl_cls", levels=[0, 2, 3]),
    ]
    model = distiller(small("gfl"), small("gfl"), losses=losses, adv=None, augment=None)
    data = batch(model, [0, 1])
    out = model(**data, mode="loss")
    student, teacher = (
        logits(net, "bbox_head.gfl_cls", data["inputs"]) for net in (model.student, model.ikd.teacher.net)
    )
    assert [m.shape[1] for m in student] == [2] * 5  # classes
    assert [m.shape[2] for m in student] == [SIDE // 8, SIDE // 16, SIDE // 32, 2, 1]
    total = 0.0
    for level in (0, 2, 3):
        s, t = (F.log_softmax(m[level].flatten(2) / 2, -1).flatten(0, 1) for m in (student, teacher))
        total += 3 * 4 * float(F.kl_div(s, t, reduction="batchmean", log_target=True))
    assert float(out["loss_kd/cwd"].detach()) == pytest.approx(total, rel=1e-4)  # float32 logits
    assert float(out["loss_kd/fgd"].detach()) > 0


def test_heads_called_on_different_numbers_of_levels_are_refused():
    teacher = small("gfl")
    teacher["neck"]["num_outs"] = 4
    teacher["bbox_head"]["anchor_generator"]["strides"] = [8, 16, 32, 64]
    losses = [dict(type="CWDLoss", source="bbox_head.gfl_cls")]
    with pytest.raises(ValueError, match=r"student has 5 levels .*teacher 4 .*choose with levels=\[...\]"):
        distiller(small("gfl"), teacher, losses=losses, adv=None, augment=None)
