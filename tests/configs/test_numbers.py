"""What the paper-scale configs say, against the paper's section 4 and the published configurations."""

from __future__ import annotations

import pytest
import torch

from ikd_fast.losses import build_loss
from ikd_fast.mmdet.distiller import build_attack
from ikd_fast.mmdet.preprocessor import build_augment
from ikd_fast.pixels import PixelUnits
from tests.configs.reduced import IKD, distilled, family, load, losses_of

pytestmark = pytest.mark.configs

# Family: (lr FGD, lr MGD), beta, levels of the adversarial branch, FGD's alpha, beta, gamma, lambda, MGD's alpha and ratio,
# whether the student starts from the teacher's neck and head, whether masks are trained.
PUBLISHED = {
    "retinanet": ((0.01, 0.01), 1e-5, None, (1e-3, 5e-4, 5e-4, 5e-6), (2e-5, 0.65), True, False),
    "reppoints": ((0.01, 0.02), 1e-5, None, (1.6e-3, 8e-4, 8e-4, 8e-6), (2e-5, 0.65), True, False),
    "mask-rcnn": ((0.02, 0.02), 2.5e-7, (0, 1, 2, 3), (5e-5, 2.5e-5, 5e-5, 5e-7), (5e-7, 0.45), False, True),
    # IKD has no run of these two: beta and levels are Mask R-CNN's and RetinaNet's.
    "faster-rcnn": ((0.02, 0.02), 2.5e-7, (0, 1, 2, 3), (), (), False, False),
    "gfl": ((0.01, 0.01), 1e-5, None, (), (), False, False),
}
EPOCHS = {"gfl": (12, [8, 11])}  # the others: 24, [16, 22]
CONV = "neck.fpn_convs.{i}.conv"
FPN = (0, 1, 2, 3)
ONE_STAGE = (0.5, 4.2e-4, 2.4e-2, 4.2e-4, True, None, CONV)
TWO_STAGE = (0.5, 7e-5, 4e-3, 7e-5, False, FPN, CONV)
# The losses of other papers, as their configurations have them, then the levels and where the maps come from (None: the neck).
OTHERS = {
    # tau, weight: mmdetection-distiller (RetinaNet), mmrazor (Faster R-CNN, GFL); RepPoints and Mask R-CNN have none of their own.
    "cwd": {
        "retinanet": (1.0, 5.0, FPN, CONV), "reppoints": (1.0, 5.0, FPN, CONV), "faster-rcnn": (1.0, 10.0, None, None),
        "mask-rcnn": (1.0, 10.0, None, None), "gfl": (1.0, 5.0, None, "bbox_head.gfl_cls"),
    },
    # tau, alpha, beta, gamma, channel_attention: mmrazor's two-stage numbers; six times them for one stage.
    "fkd": {"retinanet": ONE_STAGE, "reppoints": ONE_STAGE, "faster-rcnn": TWO_STAGE, "mask-rcnn": TWO_STAGE},
    # weight, window, sigma: the paper.
    "ssim": dict.fromkeys(("retinanet", "reppoints", "faster-rcnn"), (4.0, 11, 1.5, None, None)),
    # weight: mmrazor.
    "pkd": {"retinanet": (10.0, FPN, None), "reppoints": (10.0, FPN, None), "faster-rcnn": (6.0, FPN, None)},
}  # fmt: skip
ATTRIBUTES = {
    "cwd": ("tau", "weight"), "fkd": ("tau", "alpha", "beta", "gamma", "channel_attention"),
    "ssim": ("weight", "window", "sigma"), "pkd": ("weight",),
}  # fmt: skip
BETAS = {"0.625e-7": 0.625e-7, "1.25e-7": 1.25e-7, "5e-7": 5e-7}
# Table 2: which parts are on.
PARTS = {
    "fgd_noflip": "", "fgd_hfc_noflip": "noise", "fgd_crop_noflip": "crop", "fgd_crop-hfc_noflip": "crop noise",
    "fgd_adv_noflip": "adv", "fgd_ikd_noflip": "crop noise adv",
}  # fmt: skip


def transforms(config) -> list[str]:
    return [transform.type for transform in config.train_dataloader.dataset.pipeline]


@pytest.mark.parametrize("name", IKD)
def test_schedule_data_and_optimizer(name):
    config = load(name)
    lr_fgd, lr_mgd = PUBLISHED[family(name)][0]
    epochs, milestones = EPOCHS.get(family(name), (24, [16, 22]))
    assert config.train_cfg.max_epochs == epochs
    warmup, steps = config.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end, warmup.by_epoch) == ("LinearLR", 0.001, 500, False)
    assert (steps.milestones, steps.gamma) == (milestones, 0.1)
    assert config.train_dataloader.batch_size == 2
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.momentum, optimizer.weight_decay) == ("SGD", 0.9, 1e-4)
    if distilled(config):
        assert optimizer.lr == (lr_mgd if "_mgd_" in name else lr_fgd)
        assert config.optim_wrapper.clip_grad == dict(max_norm=35, norm_type=2)
    assert ("RandomFlip" in transforms(config)) is ("noflip" not in name)
    if "copypaste" not in name:
        (loaded,) = [t for t in config.train_dataloader.dataset.pipeline if t.type == "LoadAnnotations"]
        assert loaded.get("with_mask", False) is PUBLISHED[family(name)][6]


@pytest.mark.parametrize("name", [name for name in IKD if losses_of(name) in (["fgd"], ["mgd"])])
def test_method(name):
    model = load(name).model
    _, beta, levels, fgd, mgd, init, _ = PUBLISHED[family(name)]
    (loss,) = model.losses
    assert loss.source == "neck.fpn_convs.{i}.conv"
    built = build_loss(dict(loss))
    if "_mgd_" in name:
        assert (built.alpha, built.mask_ratio) == mgd
    else:
        assert (built.temperature, built.alpha, built.beta, built.gamma, built.lambda_) == (0.5, *fgd)
    assert built.levels == levels
    assert model.init_student is init
    if model.adv is None:
        assert "_ikd_" not in name
    else:
        assert "_ikd_" in name or "_adv_" in name
        tag = [part for part in name.split("_") if part.startswith("beta")]
        assert model.adv.beta == (BETAS[tag[0].removeprefix("beta")] if tag else beta)
        assert model.adv.get("loss", {}).get("levels") == levels
    active = not (model.adv is None and model.augment is None)
    assert model.stop_at == (dict(epoch=16) if active else None)


@pytest.mark.parametrize("name", [name for name in IKD if losses_of(name)[0] in OTHERS])
def test_losses_of_other_papers(name):
    (kind,) = losses_of(name)
    model = load(name).model
    (loss,) = model.losses
    built = build_loss(dict(loss))
    values = tuple(getattr(built, attribute) for attribute in ATTRIBUTES[kind])
    assert (*values, built.levels, built.source) == OTHERS[kind][family(name)]
    # As published: of the losses, FGD and MGD alone start from the teacher's neck and head.
    assert not model.get("init_student", False)
    if "_ikd_" not in name:
        assert (model.adv, model.augment, model.stop_at) == (None, None, None)
        return
    _, beta, levels, *_ = PUBLISHED[family(name)]
    assert (model.adv.beta, model.adv.get("loss", {}).get("levels")) == (beta, levels)
    assert build_attack(model.adv.attack).mode == "carry"
    assert model.augment.crop_align == 8
    assert model.stop_at == dict(epoch=EPOCHS.get(family(name), (24,))[0] * 2 // 3)


def test_the_combination_is_fgd_on_the_neck_and_cwd_on_the_class_logits():
    ours, fgd = (load(f"retinanet_x101-64x4d_r50_{part}_ikd_2x_coco") for part in ("fgd-cwd", "fgd"))
    first, second = ours.model.losses
    assert [first] == fgd.model.losses
    assert second == dict(type="CWDLoss", preset="gfl", source="bbox_head.retina_cls")
    ours.model.losses = fgd.model.losses
    assert ours.to_dict() == fgd.to_dict()


def test_the_attack_is_the_papers_when_iterative():
    model = load("retinanet_x101-64x4d_r50_fgd_ikd_2x_coco").model
    carry = build_attack(model.adv.attack)
    assert (carry.mode, carry.eps, carry.steps, carry.step_size) == ("carry", 8, 1, 4)
    assert (carry.memory.bits, carry.memory.stride, carry.memory.resolution) == (4, 2, "original")
    # As ikd_retinanet.py says: --cfg-options model.adv.attack.mode=iterative model.adv.attack.memory=None
    iterative = build_attack(model.adv.attack | dict(mode="iterative", memory=None))
    assert (iterative.eps, iterative.steps, iterative.step_size, iterative.diversity_prob) == (8, 5, 2, 0.5)


@pytest.mark.parametrize("parts", PARTS)
def test_table_2_switches_its_parts_on(parts):
    """Over 400 images of each kind: all with a large object are cropped, 30 % of the others get noise (4 sigma: 9 %)."""
    model = load(f"retinanet_x101-64x4d_r50_{parts}_2x_coco").model
    assert (model.adv is not None) is ("adv" in PARTS[parts])
    augment = build_augment(model.augment, PixelUnits(value_range=(0, 255)))
    if augment is None:
        assert "crop" not in PARTS[parts]
        assert "noise" not in PARTS[parts]
        return
    # Area 32^2 is large already; one below is small.
    boxes = [torch.tensor([[0.0, 0.0, 32.0, 32.0 if i % 2 == 0 else 31.0]]) for i in range(800)]
    plan = augment.plan(boxes, [(200, 300)] * 800, list(range(800)), 0)
    cropped = (plan.window[:, 2:] - plan.window[:, :2] < torch.tensor([300, 200])).any(1)
    noisy = plan.sigma > 0
    assert not bool((cropped[1::2]).any())
    assert not bool((noisy[::2]).any())
    assert float(cropped[::2].float().mean()) == pytest.approx(
        1.0 if "crop" in PARTS[parts] else 0.0, abs=0.01
    )
    assert float(noisy[1::2].float().mean()) == pytest.approx(
        0.3 if "noise" in PARTS[parts] else 0.0, abs=0.09
    )
    if "crop" in PARTS[parts]:
        sides = (plan.window[::2, 2:] - plan.window[::2, :2]) / torch.tensor([300, 200])
        assert 0.8 - 1 / 200 <= float(sides.min()) <= float(sides.max()) <= 1.0
