"""Heads whose class loss needs more than boxes: an epoch, a semantic map, crowds, a train_cfg."""

from __future__ import annotations

import copy

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast import OnlineDIFGSM
from ikd_fast.attack import AttackBatch
from ikd_fast.attack.diversity import draw_diversity
from ikd_fast.distill import FrozenTeacher
from ikd_fast.mmdet import MMDetVictim
from ikd_fast.mmdet.attack_scope import random_samplers
from ikd_fast.mmdet.build import build_detector, model_config, without_init
from ikd_fast.mmdet.samples import from_targets, to_targets
from ikd_fast.pixels import PixelUnits
from tests.mmdet.conftest import retinanet
from tests.mmdet.detectors import SIDE, _shrink, batch, data_batch, distiller, small

from mmengine.logging import MessageHub
from mmengine.structures import InstanceData, PixelData

UNITS = PixelUnits(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
MORE = dict(
    tood="mmdet::tood/tood_r50_fpn_1x_coco.py",
    htc="mmdet::htc/htc_r50_fpn_1x_coco.py",
    scnet="mmdet::scnet/scnet_r50_fpn_1x_coco.py",
)


def config(name: str) -> dict:
    """As :func:`tests.mmdet.detectors.small`, for families that are only teachers here."""
    model = without_init(_shrink(model_config(MORE[name]), 16, 2))
    model["backbone"].update(depth=18, base_channels=8)
    model["neck"]["in_channels"] = [8, 16, 32, 64]
    if name == "tood":
        model["bbox_head"]["norm_cfg"] = dict(type="GN", num_groups=4)
        model["bbox_head"]["stacked_convs"] = 2  # its layer attention squeezes 8 of them to one
    if name == "scnet":
        # Features relayed from the boxes' 3 x 3 are doubled, and masks are twice that.
        model["train_cfg"]["rcnn"] = [stage | dict(mask_size=12) for stage in model["train_cfg"]["rcnn"]]
        model["roi_head"]["mask_roi_extractor"]["roi_layer"]["output_size"] = 6
        model["roi_head"]["feat_relay_head"]["out_conv_channels"] = 16
    return model


def detector(name: str):
    torch.manual_seed(0)
    return build_detector(config(name)).eval()


def attacked(ids: list[int]) -> AttackBatch:
    data = data_batch(ids)
    images = torch.stack([UNITS.from_pixels(x) for x in data["inputs"]]).requires_grad_(True)
    targets = to_targets(data["data_samples"])
    return AttackBatch(images, targets, [(SIDE, SIDE)] * len(ids), 0, lambda: images, ids, 0, 0)


@pytest.fixture
def hub():
    hub = MessageHub.get_instance("victim-heads")
    hub.runtime_info.clear()
    return hub


@pytest.mark.parametrize("epoch", [None, 0, 11])
def test_a_head_that_follows_the_epoch_has_its_final_loss(hub, epoch):
    """TOOD trains its first epochs with another assigner and loss; the teacher is past them whatever the student's run says."""
    net = detector("tood")
    first = int(net.bbox_head.initial_epoch)
    attack = attacked([0, 2])
    hub.update_info("epoch", first)
    net.bbox_head.training = True
    with torch.no_grad():
        final = float(sum(net.loss(attack.images, from_targets(attack.targets, (SIDE, SIDE)))["loss_cls"]))
        hub.update_info("epoch", 0)
        warming = float(sum(net.loss(attack.images, from_targets(attack.targets, (SIDE, SIDE)))["loss_cls"]))
    net.eval()
    assert abs(final - warming) > 1e-2 * final
    del net.bbox_head.epoch
    hub.runtime_info.clear()
    if epoch is not None:
        hub.update_info("epoch", epoch)
    before = dict(hub.runtime_info)
    victim = MMDetVictim(FrozenTeacher(net))
    value = victim.keyed_cls_loss(attack)
    assert float(value.detach()) == pytest.approx(final, rel=1e-5)
    (grad,) = torch.autograd.grad(value.sum(), attack.images)
    assert float(grad.abs().max()) > 0
    with pytest.raises(KeyError):
        victim(torch.zeros(1, 3, SIDE, SIDE), [dict(labels=torch.zeros(0))])
    assert dict(hub.runtime_info) == before
    assert "epoch" not in vars(net.bbox_head)


def test_tood_is_distilled_without_a_run_that_counts_epochs(hub):
    model = distiller(small("retinanet"), config("tood"), match="resize")
    out = model(**batch(model, [0, 1]), mode="loss")
    assert float(out["attack/linf"]) == pytest.approx(8, abs=1e-3)


@pytest.mark.parametrize("name", ["htc", "scnet"])
def test_semantic_heads_are_left_their_features(name):
    """mmdet's own class losses with true masks and a true map, which the attack has not: every sampler takes all boxes."""
    net = detector(name)
    for sampler in random_samplers(net):
        sampler.num = 100_000
    attack = attacked([4])
    samples = data_batch([4], masks="bitmap")["data_samples"]
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(SIDE, SIDE), pad_shape=(SIDE, SIDE)))
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor
        sample.ignored_instances.bboxes = sample.ignored_instances.bboxes.tensor
        sample.gt_sem_seg = PixelData(sem_seg=torch.randint(0, 2, (1, SIDE, SIDE)))
    with torch.no_grad():
        losses = net.loss(attack.images, copy.deepcopy(samples))
    assert float(losses["loss_semantic_seg"]) > 0
    expected = float(sum(losses[f"s{i}.loss_cls"] for i in range(3)))
    heads = {m: (dict(m._modules), set(vars(m))) for m in net.modules()}
    ran = []
    net.roi_head.semantic_head.register_forward_hook(lambda *_: ran.append(1))
    value = MMDetVictim(FrozenTeacher(net)).keyed_cls_loss(attack)
    # The same operations on the same numbers: float32 rounding of a sum in another order.
    assert float(value.detach().sum()) == pytest.approx(expected, rel=1e-5)
    assert ran == [1]
    (grad,) = torch.autograd.grad(value.sum(), attack.images)
    assert float(grad.abs().max()) > 0
    assert {m: (dict(m._modules), set(vars(m))) for m in net.modules()} == heads


def crowd(boxes: list[list[float]]) -> InstanceData:
    return InstanceData(bboxes=torch.tensor(boxes), labels=torch.zeros(len(boxes), dtype=torch.long))


def test_crowds_are_ignored_by_the_attack_as_in_training():
    """A detector that ignores anchors in crowds: the loss is its own, and half the image in a crowd changes it."""
    model = small("faster_rcnn")
    model["train_cfg"]["rcnn"]["assigner"]["ignore_iof_thr"] = 0.5
    torch.manual_seed(0)
    net = build_detector(without_init(model)).eval()
    for sampler in random_samplers(net):
        sampler.num = 100_000
    attack = attacked([4])
    samples = data_batch([4])["data_samples"]
    samples[0].ignored_instances = crowd([[0.0, 0.0, 96.0, 48.0]])
    (target,) = to_targets(samples)
    assert target["ignored"].tolist() == [[0.0, 0.0, 96.0, 48.0]]
    samples[0].gt_instances.bboxes = samples[0].gt_instances.bboxes.tensor
    samples[0].set_metainfo(dict(batch_input_shape=(SIDE, SIDE), pad_shape=(SIDE, SIDE)))
    victim = MMDetVictim(FrozenTeacher(net))
    with torch.no_grad():
        expected = float(net.loss(attack.images, copy.deepcopy(samples))["loss_cls"])
        got = float(victim(attack.images, [target]).sum())
        without = float(victim(attack.images, [{k: v for k, v in target.items() if k != "ignored"}]).sum())
    assert got == pytest.approx(expected, rel=1e-5)
    assert abs(without - expected) > 1e-3 * expected


def test_ignored_boxes_move_with_the_pixels():
    view = draw_diversity([(96, 96)], [3], step=0, epoch=0, seed=0, prob=1.0, rate=0.5)
    ((x0, y0, w, h),) = view.windows
    assert (w, h) != (96, 96)
    boxes = torch.tensor([[0.0, 12.0, 48.0, 96.0]])
    target = dict(boxes=boxes[:0], labels=torch.zeros(0), ignored=boxes, size=(96, 96))
    (moved,) = view.targets([target])
    expected = [x0, y0 + h / 8, x0 + w / 2, y0 + h]
    assert moved["ignored"][0].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(target["ignored"], boxes)


def test_crowds_reach_the_victim_of_a_training_step():
    seen = []
    model = distiller(small("retinanet"), small("retinanet"), augment=None)
    model.ikd.attack = OnlineDIFGSM("iterative", steps=2, diversity_prob=1.0)
    original = model.ikd.victim.keyed_cls_loss
    model.ikd.victim.keyed_cls_loss = lambda b: seen.append(b.targets[0]["ignored"]) or original(b)
    data = data_batch([0, 1])
    data["data_samples"][0].ignored_instances = crowd([[0.0, 0.0, 96.0, 48.0]])
    model(**model.data_preprocessor(data, True), mode="loss")
    assert [len(x) for x in seen] == [1, 1]
    assert not torch.equal(seen[0], seen[1])  # one view a step


def test_a_teacher_without_a_train_cfg_is_refused_when_it_is_built():
    bare = {k: v for k, v in retinanet(12).items() if k != "train_cfg"}
    with pytest.raises(
        ValueError,
        match=r"no train_cfg, and without it RetinaNet has no class loss.*Write train_cfg=dict.*objective='feature'",
    ):
        distiller(retinanet(), bare)
    rcnn = small("faster_rcnn", train_cfg=None)  # which its class wants written
    with pytest.raises(ValueError, match="no train_cfg, and without it FasterRCNN has no class loss"):
        distiller(small("faster_rcnn"), rcnn)
    feature = dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", objective="feature"))
    for adv in (None, feature):
        model = distiller(retinanet(), bare, adv=adv)
        out = model(**batch(model, [0]), mode="loss")
        assert ("loss_kd/adv" in out) == (adv is not None)
    # FCOS assigns by its strides and needs none.
    fcos = {k: v for k, v in small("fcos").items() if k != "train_cfg"}
    out = distiller(small("fcos"), fcos)
    assert float(out(**batch(out, [0]), mode="loss")["attack/linf"]) == pytest.approx(8, abs=1e-3)
