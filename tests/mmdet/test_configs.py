"""The demo's configs build and make a step; those of the paper have tests of their own, in tests/configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ikd_fast.configs
from tests.mmdet.conftest import sample_of

from mmdet.registry import MODELS
from mmengine.config import Config

HOME = Path(next(iter(ikd_fast.configs.__path__)))
CONFIGS = sorted(p.name for p in (HOME / "demo").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_and_makes_a_step(name):
    """On 64-pixel images."""
    model = Config.fromfile(HOME / "demo" / name).model
    net = MODELS.build(model).train()
    samples = [sample_of(i, [[4.0, 4, 44, 50]], (64, 64)) for i in range(2)]
    data = dict(
        inputs=[torch.full((3, 64, 64), 90 + 20 * i, dtype=torch.uint8) for i in range(2)],
        data_samples=samples,
    )
    if "adv" in model and model.adv.attack.type == "OfflineImages":
        data["inputs"] = [torch.cat([x, x + 8]) for x in data["inputs"]]
    if hasattr(net, "set_progress"):
        net.set_progress(0, 0)
        net.set_total_steps(100)
    data = net.data_preprocessor(data, True)
    losses = net(**data, mode="loss")
    total, _ = net.parse_losses(losses)
    total.backward()
    assert bool(total.isfinite())
    expected = {"loss_cls", "loss_bbox"}
    if "losses" in model:
        expected |= {"loss_kd/fgd"} | ({"loss_kd/adv"} if model.get("adv") else set())
    assert {k for k in losses if "loss" in k} == expected
