"""What the start-up banner and its facts say, against runs that do it and nets that run for real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.distill import StopAt
from ikd_fast.mmdet import banner
from ikd_fast.mmdet.banner import render
from ikd_fast.mmdet.build import build_detector
from ikd_fast.mmdet.facts import collect, map_shapes, stop_point
from tests.mmdet.conftest import retinanet, run, stock_config, with_ikd
from tests.mmdet.detectors import small

from mmdet.registry import MODELS


def build(**changes):
    return MODELS.build(with_ikd(dict(model=retinanet()), **changes)["model"])


def log_of(work_dir: Path) -> str:
    (path,) = work_dir.glob("*/*.log")
    return path.read_text()


@pytest.mark.parametrize("kind", ["epochs", "iterations"])
def test_the_stop_point_is_the_first_iteration_without_the_branch(coco_root, tmp_path, kind) -> None:
    teacher = tmp_path / "teacher.pth"
    weights = MODELS.build(retinanet(12)).state_dict()
    torch.save(dict(state_dict=weights), teacher)
    config = with_ikd(
        stock_config(coco_root), stop_at=0.4, teacher_ckpt=str(teacher), allow_random_teacher=False
    )
    config.update(log_level="INFO", val_cfg=None, val_dataloader=None, val_evaluator=None)
    config["default_hooks"] = config["default_hooks"] | dict(checkpoint=None)
    if kind == "iterations":
        config["train_cfg"] = dict(type="IterBasedTrainLoop", max_iters=6, val_interval=1000)
        config["train_dataloader"]["sampler"] = dict(type="InfiniteSampler", shuffle=True)
    runner, logs = run(config, tmp_path / "run")
    first_without = ["loss_kd/adv" in log for log in logs].index(False)
    text = log_of(tmp_path / "run")
    assert text.count("distils RetinaNet into RetinaNet") == 1
    assert (
        f"teacher  RetinaNet, {_millions(weights)} M parameters, 1 class, {len(weights)} of {len(weights)} keys"
        in text
    )
    assert f"keys loaded from {teacher}" in text
    stop = re.search(
        r"stop +augmentation and adversarial branch off from epoch ([\d.]+).*iteration (\d+) of 6", text
    )
    assert stop is not None
    assert int(stop[2]) == first_without == 3
    assert float(stop[1]) == 1.0
    assert "run      4 x 1 rank = 4 images an update, 12 images, 3 iterations a pass" in text
    assert "levels 0 1 2 3 of 4, strides 8 16 32 64, channels 16 -> 16, no align layer" in text
    assert "backend reference" in text


def _millions(weights) -> str:
    names = [n for n in weights if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    return f"{sum(weights[n].numel() for n in names) / 1e6:.1f}"


@pytest.mark.parametrize("name", ["retinanet", "reppoints", "fcos", "cascade_dcn"])
def test_propagated_shapes_are_those_of_a_forward(name) -> None:
    net = build_detector(small(name)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        expected = [tuple(m.shape[1:]) for m in net.eval().extract_feat(torch.zeros(1, 3, 96, 160))]
    net.train()
    (found,) = map_shapes(net, ["neck"], lambda n, x: n.extract_feat(x), (96, 160))
    assert found == expected
    assert net.training
    assert net.neck.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_net_that_reads_values_is_run_instead() -> None:
    class Reads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = torch.nn.Conv2d(3, 2, 1)

        def forward(self, x):
            maps = self.neck(x)
            return maps if float(maps.sum()) < 1e30 else None

    assert map_shapes(Reads(), ["neck"], lambda n, x: n(x), (8, 4)) == [[(2, 8, 4)]]


def test_facts_of_nets_that_differ() -> None:
    """Other channels, other normalisation, one level chosen: each shows, and JSON holds it."""
    teacher = retinanet(12, mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=False, pad_size_divisor=48)
    teacher["neck"]["out_channels"] = teacher["bbox_head"]["in_channels"] = 24
    model = build(
        teacher_config=teacher,
        losses=[dict(type="MGDLoss", levels=[1], alpha=0.5)],
        adv=dict(beta=2e-5, attack=dict(type="OnlineDIFGSM", mode="iterative"), loss=dict(type="AdvFeatureLoss", form="mean")),
        augment=None,
        stop_at=None,
    )  # fmt: skip
    facts = json.loads(json.dumps(collect(model, size=(96, 192))))
    (loss,) = facts["losses"]
    assert loss["levels"] == [
        {
            "level": 1,
            "stride": 16,
            "student": [16, 6, 12],
            "teacher": [24, 6, 12],
            "align": "1x1 conv 16 -> 24",
        }
    ]
    assert loss["settings"] == {"alpha": 0.5, "mask_ratio": 0.65}
    assert [row["stride"] for row in facts["adversarial"]["loss"]["levels"]] == [8, 16, 32, 64]
    assert facts["adversarial"]["loss"]["normaliser"] == "mean over N, C, H, W"
    assert facts["adversarial"]["attack"]["teacher_gradients"] == 5
    assert facts["pixels"]["pad_divisor"] == 96
    assert facts["pixels"]["channels_turned_for_teacher"] is True
    assert (facts["teacher"]["keys_loaded"], facts["teacher"]["checkpoint"]) == (0, None)
    text = render(facts)
    assert "RANDOM weights: none of" in text
    assert (
        "converted to mean 0, 0, 0 std 1, 1, 1 for the teacher, channels turned round; padded to multiples of 96"
        in text
    )
    assert "beta 2e-05 x AdvFeatureLoss" in text
    assert "5 teacher gradients a step" in text
    assert "stop     never" in text
    assert "augment  none in the model" in text
    assert model.describe() == render(collect(model))


def test_without_an_adversarial_branch() -> None:
    student = retinanet(batch_augments=[dict(type="BatchFixedSizePad", size=(96, 96))])
    facts = collect(build(student=student, adv=None))
    assert facts["adversarial"] is None
    assert "no adversarial branch" in render(facts)
    assert "batch    augmented by BatchFixedSizePad (batch_augments)" in render(facts)
    assert "nothing to stop" in render(collect(build(adv=None, augment=None)))


@pytest.mark.parametrize(
    ("rule", "length", "expected"),
    [
        (dict(epoch=16), dict(epoch_iters=7330), (16, 117280)),
        (dict(epoch=2), dict(epoch_iters=2.5), (2, 5)),
        (dict(epoch=16), {}, (16, None)),
        (dict(iter=100), dict(epoch_iters=40), (2.5, 100)),
        (dict(iter=100), {}, (None, 100)),
        (0.5, dict(max_iters=401, epoch_iters=10), (20.1, 201)),
        (0.5, dict(max_epochs=24), (12.0, None)),
        (None, dict(max_iters=10), (None, None)),
    ],
)
def test_stop_points(rule, length, expected) -> None:
    found = stop_point(StopAt(rule), **length)
    assert (found["epoch"], found["iter"]) == expected
    if found["iter"] is not None:
        total, pass_ = length.get("max_iters"), length.get("epoch_iters", 1e9)
        stop = StopAt(rule, total_steps=total)
        active = [stop.active(epoch=int(i / pass_), step=i) for i in (found["iter"] - 1, found["iter"])]
        assert active == [True, False]


@pytest.mark.parametrize(
    ("rule", "length", "never"),
    [
        (dict(epoch=16), dict(max_epochs=12), True),
        (dict(epoch=8), dict(max_epochs=12), False),
        (dict(iter=100), dict(max_iters=100), True),
        (0.667, dict(max_epochs=24), False),
        (None, dict(max_epochs=24), False),
    ],
)
def test_a_stop_point_that_is_never_reached_is_said(rule, length, never) -> None:
    facts = dict(stop=stop_point(StopAt(rule), **length), run=length, augment={}, adversarial=None)
    assert ("NEVER REACHED" in banner.stop(facts)) == never
