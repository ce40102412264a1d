"""Deep copies of a distiller (an EMA, a snapshot) share its teacher and leave it where it is."""

from __future__ import annotations

import copy

import torch

import ikd_fast.mmdet  # noqa: F401
from tests.mmdet.conftest import retinanet, with_ikd

from mmdet.registry import MODELS
from mmengine.model import ExponentialMovingAverage


def places(net) -> set[tuple[str, torch.dtype]]:
    return {(p.device.type, p.dtype) for p in net.parameters()}


def test_an_ema_on_another_device_and_a_cast_copy_leave_the_teacher() -> None:
    model = MODELS.build(with_ikd(dict(model=retinanet()))["model"])
    teacher = model.ikd.teacher
    ema = ExponentialMovingAverage(model, device="meta").module
    half = copy.deepcopy(model).half()
    assert ema.ikd.teacher is half.ikd.teacher is half.ikd.victim.teacher is teacher
    assert places(ema) == {("meta", torch.float32)}
    assert places(half) == {("cpu", torch.float16)}
    assert places(model) == places(teacher.net) == {("cpu", torch.float32)}
    model.double()
    assert places(model) == places(teacher.net) == {("cpu", torch.float64)}
