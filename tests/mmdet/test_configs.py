"""Every shipped config builds, and says the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ikd_fast.configs
from tests.mmdet.conftest import sample_of

from mmdet.registry import MODELS
from mmengine.config import Config

HOME = Path(next(iter(ikd_fast.configs.__path__)))
CONFIGS = sorted(str(p.relative_to(HOME)) for folder in ("demo", "ikd") for p in (HOME / folder).glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_and_makes_a_step(name):
    """At reduced size: 64-pixel images; a teacher whose checkpoint is on the net gets random weights here."""
    config = Config.fromfile(HOME / name)
    model = config.model
    if str(model.get("teacher_ckpt", "")).startswith("https://"):
        model.update(teacher_ckpt=None, allow_random_teacher=True, init_student=False)
    student = model.student if model.type == "IKDDistiller" else model
    student.backbone.init_cfg = None
    net = MODELS.build(model).train()
    samples = [sample_of(i, [[4.0, 4, 44, 50]], (64, 64)) for i in range(2)]
    data = dict(
        inputs=[torch.full((3, 64, 64), 90 + 20 * i, dtype=torch.uint8) for i in range(2)],
        data_samples=samples,
    )
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


def test_paper_scale_numbers():
    config = Config.fromfile(HOME / "ikd/retinanet_x101-64x4d_r50_fgd_ikd_2x_coco.py")
    assert config.model.adv.beta == 1e-5
    assert config.model.stop_at == dict(epoch=16)
    assert config.train_cfg.max_epochs == 24
    assert config.optim_wrapper.optimizer.lr == 0.01
    assert config.optim_wrapper.clip_grad == dict(max_norm=35, norm_type=2)
    assert [s.milestones for s in config.param_scheduler if "milestones" in s] == [[16, 22]]
    assert config.train_dataloader.batch_size == 2
    assert config.model.losses[0].preset == "retinanet"  # its numbers are tested with the losses
