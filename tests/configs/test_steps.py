"""Every paper-scale config builds and makes a whole training step: forward, backward, clipping, optimizer."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from tests.configs.reduced import (
    IKD,
    build,
    distilled,
    expected_losses,
    fill,
    load,
    losses_of,
    reduce,
    shallow,
    step,
)

pytestmark = pytest.mark.configs


@pytest.mark.parametrize("name", IKD)
def test_makes_a_step(name):
    if "_cutout_" in name:
        pytest.importorskip("kornia", reason="cutout needs the kornia extra: pip install 'ikd_fast[kornia]'")
    config = reduce(load(name))
    if distilled(config) and losses_of(name) not in (["fgd"], ["mgd"]):
        shallow(config)
    net = build(config)
    fill(net)
    if distilled(config):
        fill(net.ikd.teacher.net)
        teacher = {k: v.clone() for k, v in net.ikd.teacher.net.state_dict().items() if k.startswith("neck.")}
    student = net.student if distilled(config) else net
    before = {k: p.detach().clone() for k, p in student.named_parameters() if p.requires_grad}
    logs = step(config, net)
    assert {k for k in logs if "loss" in k} - {"loss"} == expected_losses(name, config)
    assert all(math.isfinite(v) for v in logs.values()), logs
    # The scheduler's warm-up is the Runner's job: here the optimizer steps with the config's full learning rate.
    assert any(not torch.equal(p, before[k]) for k, p in student.named_parameters() if p.requires_grad)
    if distilled(config):
        after = net.ikd.teacher.net.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in teacher.items())
