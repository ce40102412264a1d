"""Every detector family is distilled by configuration alone: one full step of Algorithm 1, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.distill import StepBatch
from ikd_fast.mmdet.attack_scope import random_samplers
from ikd_fast.mmdet.build import num_classes
from ikd_fast.mmdet.samples import to_targets
from tests.mmdet.conftest import stock_config
from tests.mmdet.detectors import SIDE, batch, data_batch, distiller, small

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

# family: student, teacher, levels distilled (the fifth map of an R-CNN's neck is a pooled fourth)
FAMILIES = dict(
    retinanet=("retinanet", "retinanet", None),
    reppoints=("reppoints", "reppoints", None),
    fcos=("fcos", "fcos", None),
    gfl=("gfl", "gfl", None),
    atss=("atss", "atss", None),
    faster_rcnn=("faster_rcnn", "faster_rcnn", [0, 1, 2, 3]),
    mask_rcnn=("mask_rcnn", "cascade_dcn", [0, 1, 2, 3]),
    retinanet_from_fcos=("retinanet", "fcos", None),
)


@pytest.fixture(scope="module")
def models():
    """One distiller a family, built when first asked for."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    built = {}

    def get(family: str):
        if family not in built:
            student, teacher, levels = FAMILIES[family]
            built[family] = distiller(small(student), small(teacher), levels)
        return built[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_training_step(models, family):
    model = models(family)
    fingerprint = model.ikd.teacher.fingerprint()
    # Two steps an update: the gradients of the first are there to be seen.
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3), accumulative_counts=2)
    data = data_batch([0, 1, 2], masks="polygon" if family == "mask_rcnn" else None)
    logs = model.train_step(data, wrapper)
    losses = {k: float(v) for k, v in logs.items() if "loss" in k}
    assert all(torch.isfinite(torch.tensor(v)) for v in losses.values())
    assert {"loss_kd/fgd", "loss_kd/adv", "loss_cls"} <= set(losses)
    assert losses["loss"] == pytest.approx(sum(v for k, v in losses.items() if k != "loss"), rel=1e-5)
    assert float(logs["attack/linf"]) == pytest.approx(8, abs=1e-3)
    assert float(logs["attack/nonfinite"]) == 0
    assert 0 < float(logs["aug/crop_frac"]) < 1
    assert float(logs["aug/noise_frac"]) > 0
    assert ("loss_mask" in losses) == (family == "mask_rcnn")
    # Factors of levels without a positive box have a gradient of zero.
    still = {
        n for n, p in model.student.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0
    }
    assert not {n for n in still if ".scales." not in n}
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert model.ikd.teacher.fingerprint() == fingerprint
    assert all(p.grad is None for p in model.ikd.teacher.net.parameters())
    model.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_gradient_raises_the_teachers_class_loss(models, family):
    """Beyond what signs at random do. Assignment and proposals move with the image, so a stray image may lose a little."""
    model = models(family)
    for sampler in random_samplers(model.ikd.teacher.net):
        sampler.num = 100_000  # all boxes: what is measured is the attack and not the luck of 16 of them
    augment, model.data_preprocessor.augment = model.data_preprocessor.augment, None
    data = batch(model, list(range(6)), masks="bitmap" if family == "mask_rcnn" else None)
    model.data_preprocessor.augment = augment
    targets = to_targets(data["data_samples"])
    sizes = [t["size"] for t in targets]
    step = StepBatch(data["inputs"], data["geo"], targets, sizes, data["image_keys"], 0, 0)
    adversarial = model.ikd.craft(step)
    assert float(adversarial.delta.abs().max()) > 0
    convert, victim = model.ikd.teacher.convert, model.ikd.victim

    def each(images):
        with torch.no_grad():
            images = images if convert is None else convert(images, sizes)
            return torch.stack(
                [victim(images[i : i + 1], targets[i : i + 1]).sum() for i in range(len(images))]
            )

    clean, attacked = each(step.geo), each(adversarial.images)
    sign = torch.randn(step.geo.shape, generator=torch.Generator().manual_seed(0)).sign()
    control = each(step.geo + sign * model.ikd.units.grey_level(step.geo) * 8)
    assert int((attacked > clean).sum()) >= 5
    assert float((attacked - clean).mean()) > 2 * float((control - clean).mean())


def test_class_counts_of_every_head(models):
    for family in FAMILIES:
        model = models(family)
        assert (num_classes(model.student), num_classes(model.ikd.teacher.net)) == (2, 2), family


@pytest.mark.parametrize("name", ["retinanet", "reppoints"])
def test_inheriting_neck_and_head(name):
    model = distiller(small(name), small(name), init_student=True)
    student, teacher = model.student, model.ikd.teacher.net
    own = {k: v.clone() for k, v in student.state_dict().items() if k.startswith("backbone.")}
    model.init_weights()
    state = student.state_dict()
    for key, value in teacher.state_dict().items():
        if not key.startswith("backbone."):
            assert torch.equal(state[key], value), key
    assert any(not torch.equal(own[k], teacher.state_dict()[k]) for k in own)
    other = distiller(small(name), small(name, channels=32), init_student=True)
    with pytest.raises(
        ValueError, match=r"init_student=True needs the same neck and head in both nets; \d+ weights differ"
    ):
        other.init_weights()


def test_the_teacher_sees_its_own_normalisation_channels_and_padding():
    """RGB student of mean/std, padded to 32; BGR teacher of pixel values less a mean, padded to 48: by hand from the pixels."""
    teacher = small("fcos")
    teacher["data_preprocessor"]["pad_size_divisor"] = 48
    model = distiller(small("retinanet"), teacher, augment=None)
    assert model.data_preprocessor.pad_size_divisor == 96
    data = data_batch([0, 1])
    data["inputs"][1] = data["inputs"][1][:, :70, :50]
    sample = data["data_samples"][1]
    sample.set_metainfo(dict(img_shape=(70, 50)))
    sample.gt_instances = sample.gt_instances[:0]
    pixels = [x.clone() for x in data["inputs"]]
    seen = []
    hook = model.ikd.teacher.net.backbone.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach())
    )
    ready = model.data_preprocessor(data, True)
    model(**ready, mode="loss")
    hook.remove()
    mean = torch.tensor([102.9801, 115.9465, 122.7717]).view(3, 1, 1)
    expected = torch.zeros(2, 3, 96, 96)
    for row, image in zip(expected, pixels, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image.float() - mean  # loaded as BGR
    clean = [x for x in seen if x.shape == expected.shape and float((x - expected).abs().max()) < 1e-2]
    # The KD losses' pass; float32 of 255 less a mean, there and back: some 1e-5 of 255.
    assert len(clean) == 1
    attacked = [x for x in seen if x is not clean[0]]
    assert len(attacked) == 2  # the attack's gradient and the adversarial branch
    for x in attacked:
        # 8 grey levels, in the teacher's own units of one grey level.
        assert float((x - expected).abs().max()) <= 8 + 1e-2
        assert not x[1, :, 70:].any()
        assert not x[1, :, :, 50:].any()


def test_a_teacher_that_recomputes_its_backbone_can_be_attacked(models):
    """``with_cp`` in a teacher's config: checkpointing has no gradient for images alone, so the teacher goes without."""
    teacher = small("retinanet")
    teacher["backbone"]["with_cp"] = True
    student = small("retinanet")
    student["backbone"].update(with_cp=True, norm_eval=True)
    model = distiller(student, teacher)
    out = model(**batch(model, [0, 1]), mode="loss")
    plain = distiller(small("retinanet"), small("retinanet"))
    plain.student.load_state_dict(model.student.state_dict())
    plain.ikd.teacher.net.load_state_dict(model.ikd.teacher.net.state_dict())
    plain.student.backbone.norm_eval = True
    plain.train()
    expected = plain(**batch(plain, [0, 1]), mode="loss")
    for key in ("loss_cls", "loss_kd/adv"):
        assert float(out[key].detach()) == pytest.approx(float(expected[key].detach()), rel=1e-4)
    sum(v for k, v in out.items() if "loss" in k).backward()
    assert all(p.grad is not None for p in model.student.backbone.parameters())


def test_mask_targets_of_a_student_follow_the_crop(models):
    """Polygons and bitmaps of the same boxes give the same mask loss after the adaptive crop."""
    model = models("mask_rcnn")
    values = []
    for kind in ("polygon", "bitmap"):
        twin = copy.deepcopy(model)
        data = batch(twin, [0, 2], masks=kind)
        assert all(s.img_shape != (SIDE, SIDE) for s in data["data_samples"])
        torch.manual_seed(3)
        values.append(float(twin.student.loss(data["inputs"], data["data_samples"])["loss_mask"].detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_teachers_that_do_not_fit_say_so():
    retina, mask = small("retinanet"), small("mask_rcnn")
    with pytest.raises(
        ValueError,
        match=r"another stride\): student of strides \[8, 16, 32, 64, 128\], teacher of strides \[4, 8, 16, 32, 64\]. Tap .*"
        r"teacher_features=\[...\].*levels=\[...\].*match='resize'",
    ):
        distiller(retina, mask)
    with pytest.raises(
        ValueError,
        match=r"student has 5 levels of strides \[8, 16, 32, 64, 128\], teacher 4 of strides \[8, 16, 32, 64\]",
    ):
        distiller(small("retinanet"), fewer_levels())
    # What the messages tell the user to write.
    distiller(small("retinanet"), fewer_levels(), [0, 1, 2, 3])
    paths = [f"neck.fpn_convs.{i}.conv" for i in range(4)]
    model = distiller(retina, mask, features=paths[:3], teacher_features=paths[1:])
    out = model(**batch(model, [0]), mode="loss")
    assert float(out["loss_kd/fgd"].detach()) > 0
    three = small("retinanet")
    three["bbox_head"]["num_classes"] = 3
    with pytest.raises(ValueError, match="the student has 3 classes, the teacher 2: objective 'cls' attacks"):
        distiller(three, small("cascade_dcn"), match="resize")


def fewer_levels() -> dict:
    model = small("retinanet")
    model["neck"]["num_outs"] = 4
    model["bbox_head"]["anchor_generator"]["strides"] = [8, 16, 32, 64]
    return ConfigDict(model).to_dict()


def test_mask_rcnn_under_a_cascade_on_polygons_of_a_file(coco_root):
    """mmdet's own loader, the attack on proposals too; the model's weights are the plain student's."""
    student = small("mask_rcnn", classes=1)
    model = distiller(
        student, small("cascade_dcn", classes=1), losses=[dict(type="FGDLoss", preset="mask_rcnn")], include_rpn=True,
        adv=dict(beta=2.5e-7, attack=dict(type="OnlineDIFGSM", mode="single"), loss=dict(type="AdvFeatureLoss")),
    )  # fmt: skip
    loader = Config(stock_config(coco_root, masks=True)).train_dataloader
    data = next(iter(Runner.build_dataloader(loader, seed=0)))
    log = model.train_step(data, OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3)))
    assert {"loss_mask", "loss_rpn_cls", "loss_kd/fgd", "loss_kd/adv", "acc"} <= set(log)
    assert all(bool(v.isfinite()) for v in log.values())
    plain = MODELS.build(ConfigDict(student))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("kd.")}
    plain.load_state_dict(state, strict=True)
