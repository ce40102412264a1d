"""The class loss an attack climbs: mmdet's own, local to the process, drawn by keys, and nothing of the teacher moved."""

from __future__ import annotations

import copy
import random
from threading import Barrier, Event, Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ikd_fast.mmdet  # noqa: F401
from ikd_fast import OnlineDIFGSM
from ikd_fast.attack import AttackBatch
from ikd_fast.distill import FrozenTeacher
from ikd_fast.mmdet import MMDetVictim
from ikd_fast.mmdet.attack_scope import DrawKey, alone, random_samplers
from ikd_fast.mmdet.build import build_detector, without_init
from ikd_fast.mmdet.samples import from_targets, to_targets
from ikd_fast.pixels import PixelUnits
from tests.mmdet.detectors import CONFIGS, SIDE, data_batch, small

from mmdet.models.task_modules.samplers import BaseSampler

UNITS = PixelUnits(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
TWO_STAGE = ("faster_rcnn", "mask_rcnn", "cascade_dcn")


@pytest.fixture(scope="module")
def detectors():
    """Built when first asked for."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    built = {}

    def get(name: str):
        if name not in built:
            torch.manual_seed(0)
            built[name] = build_detector(without_init(small(name)))
        return built[name]

    return get


def attacked(ids: list[int], step: int = 0, epoch: int = 0, seed: int = 0) -> AttackBatch:
    data = data_batch(ids)
    images = torch.stack([UNITS.from_pixels(x) for x in data["inputs"]]).requires_grad_(True)
    targets = to_targets(data["data_samples"])
    return AttackBatch(images, targets, [(SIDE, SIDE)] * len(ids), step, lambda: images, ids, epoch, seed)


def unsampled(net) -> list[BaseSampler]:
    """Samplers that take all there is, so that nothing is left to chance."""
    samplers = random_samplers(net)
    for sampler in samplers:
        sampler.num = 100_000
    return samplers


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_mmdets_own_class_loss(detectors, name):
    """One image, samplers that take every box: the terms of ``loss()`` in its own mode of training, RPN left out."""
    net = copy.deepcopy(detectors(name)).eval()
    unsampled(net)
    batch = attacked([4])
    data = data_batch([4], masks="bitmap")
    for sample in data["data_samples"]:
        sample.set_metainfo(dict(batch_input_shape=(SIDE, SIDE), pad_shape=(SIDE, SIDE)))
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor
        sample.ignored_instances.bboxes = sample.ignored_instances.bboxes.tensor
    if hasattr(net, "bbox_head"):
        net.bbox_head.training = True
    with torch.no_grad():
        losses = net.loss(batch.images, copy.deepcopy(data["data_samples"]))
    terms = {"cascade_dcn": ["s0.loss_cls", "s1.loss_cls", "s2.loss_cls"]}.get(name, ["loss_cls"])
    flat = [v for term in terms for v in (losses[term] if isinstance(losses[term], list) else [losses[term]])]
    net.eval()
    victim = MMDetVictim(FrozenTeacher(net))
    got = victim.keyed_cls_loss(batch)
    # The same operations on the same numbers: float32 rounding of a sum in another order.
    assert float(got.detach().sum()) == pytest.approx(float(sum(flat)), rel=1e-5)
    if name in TWO_STAGE:
        with_rpn = MMDetVictim(FrozenTeacher(net), include_rpn=True).keyed_cls_loss(batch)
        rpn = float(sum(losses["loss_rpn_cls"]))
        assert rpn > 0
        assert float(with_rpn.detach().sum()) == pytest.approx(float(sum(flat)) + rpn, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_teacher_is_left_as_it_was(detectors, name):
    net = detectors(name)
    teacher = FrozenTeacher(net)
    before = teacher.fingerprint()
    attributes = {m: set(vars(m)) for m in net.modules()}
    modes = {m: m.training for m in net.modules()}
    heads = {m: dict(m._modules) for m in net.modules()}
    live = []
    hooks = [
        m.register_forward_hook(lambda m, *_: live.append(m.training))
        for m in net.modules()
        if not list(m.children())
    ]
    for mask_head in [m for n, m in net.named_modules() if n.endswith("mask_head")]:
        hooks.append(mask_head.register_forward_pre_hook(lambda *_: pytest.fail("the mask head ran")))
    MMDetVictim(teacher).keyed_cls_loss(attacked([0, 1])).sum().backward()
    with pytest.raises(KeyError):
        MMDetVictim(teacher)(torch.zeros(1, 3, SIDE, SIDE), [dict(labels=torch.zeros(0))])
    for hook in hooks:
        hook.remove()
    assert live
    assert not any(live)  # norms, dropout and every other leaf ran in eval
    assert teacher.fingerprint() == before
    assert {m: set(vars(m)) for m in net.modules()} == attributes
    assert {m: m.training for m in net.modules()} == modes
    assert {m: dict(m._modules) for m in net.modules()} == heads
    assert all("sample" not in vars(s) for s in random_samplers(net))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_has_its_gradient_in_any_company(detectors, name):
    """Alone, or third of four: the same direction, for R-CNNs the same gradient."""
    victim = MMDetVictim(FrozenTeacher(detectors(name)))
    alone_, company = attacked([5]), attacked([1, 0, 5, 2])
    (a,) = torch.autograd.grad(victim.keyed_cls_loss(alone_).sum(), alone_.images)
    (b,) = torch.autograd.grad(victim.keyed_cls_loss(company).sum(), company.images)
    a, b = a[0], b[2]
    if name not in TWO_STAGE:  # one positive normaliser for the batch
        a, b = a / a.norm(), b / b.norm()
    # Convolutions of batches of 1 and 4 sum in other orders: some 100 units of 2^-24 through the layers.
    assert float((a - b).abs().max()) <= 1e-4 * float(a.abs().max())


@pytest.mark.parametrize("name", ["faster_rcnn", "cascade_dcn"])
def test_sampled_boxes_follow_the_key_alone(detectors, monkeypatch, name):
    seen: list[tuple] = []
    original = BaseSampler.sample

    def spy(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        seen.append((id(self), tuple(result.pos_inds.tolist()), tuple(result.neg_inds.tolist())))
        return result

    monkeypatch.setattr(BaseSampler, "sample", spy)

    def draws(ids, which, *, include_rpn=False, **key):
        seen.clear()
        victim = MMDetVictim(FrozenTeacher(detectors(name)), include_rpn=include_rpn)
        with torch.no_grad():
            victim.keyed_cls_loss(attacked(ids, **key))
        samplers = len(seen) // len(ids)
        return seen[which * samplers : (which + 1) * samplers]

    stages = 3 if name == "cascade_dcn" else 1
    reference = draws([5], 0)
    assert len(reference) == stages
    assert all(len(neg) > 0 for _, _, neg in reference)
    torch.manual_seed(99)
    assert draws([1, 0, 5], 2) == reference
    assert draws([5], 0, include_rpn=True)[1:] == reference  # the RPN's sampler has its own key
    for other in (dict(step=1), dict(epoch=1), dict(seed=1)):
        assert draws([5], 0, **other) != reference
    if stages > 1:
        chosen = [set(neg) for _, _, neg in reference]
        assert chosen[0] != chosen[1]


def test_draws_differ_between_images_and_samplers():
    """Every part of the key counts, and each of the three generators follows it."""

    def drawn(key: DrawKey, slot: int) -> tuple[int, int, int]:
        with key.generators(slot, torch.device("cpu")):
            return int(torch.randint(2**40, ())), int(np.random.randint(2**40)), random.getrandbits(40)  # noqa: NPY002

    keys = [
        (DrawKey(seed, epoch, image, step), slot)
        for seed in range(2) for epoch in range(2) for image in range(3) for step in range(3) for slot in range(3)
    ]  # fmt: skip
    numbers = [drawn(*key) for key in keys]
    for column in zip(*numbers, strict=True):
        assert len(set(column)) == len(keys)
    assert numbers == [drawn(*key) for key in keys]


@pytest.mark.parametrize("name", ["retinanet", "cascade_dcn"])
def test_an_attack_leaves_the_global_generators_alone(detectors, name):
    victim = MMDetVictim(FrozenTeacher(detectors(name)), include_rpn=True)
    batch = attacked([0, 1])
    images = batch.images.detach()
    attack = OnlineDIFGSM("iterative", steps=2, mean=UNITS.mean, std=UNITS.std)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = attack(victim, images, batch.targets, image_ids=[0, 1], epoch=0)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    again = attack(victim, images, batch.targets, image_ids=[0, 1], epoch=0)
    assert torch.equal(first.images, again.images)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["fcos", "gfl", "atss", "retinanet", "cascade_dcn"])
def test_no_rank_is_asked_for_anything(detectors, monkeypatch, process_group, name):
    called = []

    def collective(*args, **kwargs):
        called.append(1)
        raise AssertionError("a collective was called")

    monkeypatch.setattr(dist, "all_reduce", collective)
    net, batch = detectors(name), attacked([0, 1])
    if name in ("fcos", "gfl", "atss"):
        samples = from_targets(batch.targets, (SIDE, SIDE))
        with pytest.raises(AssertionError, match="a collective was called"):
            net.loss(batch.images, samples)
        called.clear()
    value = MMDetVictim(FrozenTeacher(net)).keyed_cls_loss(batch)
    assert bool(value.isfinite().all())
    assert not called
    assert dist.all_reduce is collective
    assert dist.is_initialized()
    assert dist.get_world_size() == 1


def test_a_head_that_does_not_ask_gets_an_error_and_not_a_hang(process_group):
    from mmengine.dist import get_world_size

    other = []
    with alone():
        assert not dist.is_initialized()
        assert get_world_size() == 1
        thread = Thread(target=lambda: other.append(dist.is_initialized()))
        thread.start()
        thread.join()
        for name in ("all_reduce", "broadcast", "barrier"):
            with pytest.raises(
                RuntimeError, match=f"torch.distributed.{name} during an attack.*is_initialized"
            ):
                getattr(dist, name)(torch.zeros(1))
    assert other == [True]  # the process group is gone for the attacking thread only
    assert dist.is_initialized()
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    assert dist.is_initialized()


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_threads_are_alone_at_once(process_group, first_out):
    """Whichever leaves first, the other stays alone, a thread that is outside is served, and all is put back."""
    plain = {name: getattr(dist, name) for name in ("is_initialized", "get_world_size", "all_reduce")}
    inside, left = Barrier(2), Event()
    seen = {}

    def attacker(me):
        with alone():
            inside.wait(10)
            if me != first_out:
                assert left.wait(10)
            with alone():  # nothing changes within
                pass
            seen[me, "inside"] = dist.is_initialized()
        seen[me, "after"] = dist.is_initialized()
        dist.all_reduce(torch.ones(1))
        seen[me, "done"] = True
        left.set()

    threads = [Thread(target=attacker, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {(me, k): k != "inside" for me in (0, 1) for k in ("inside", "after", "done")}
    assert all(getattr(dist, name) is value for name, value in plain.items())


def test_plain_callables_and_unkeyed_calls_still_work(detectors):
    net = detectors("faster_rcnn")
    victim = MMDetVictim(FrozenTeacher(net))
    batch = attacked([0, 1])
    with torch.no_grad():
        value = victim(batch.images, batch.targets)
        assert value.shape == (2,)
        assert torch.equal(value, victim(batch.images, batch.targets))
    attack = OnlineDIFGSM("single", mean=UNITS.mean, std=UNITS.std)
    out = attack(
        lambda x, y: victim(x, y).sum(), batch.images.detach(), batch.targets, image_ids=[0, 1], epoch=0
    )
    assert out.objective[0].dim() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_features_and_loss_from_one_forward(detectors, monkeypatch, name):
    """What ``carry`` differentiates: the loss, its gradient and the maps are those of separate forwards, from one."""
    net = detectors(name)
    teacher = FrozenTeacher(net, call=lambda model, images: model.extract_feat(images))
    victim, batch = MMDetVictim(teacher), attacked([4, 7])
    expected = victim.keyed_cls_loss(batch)
    (slope,) = torch.autograd.grad(expected.sum(), batch.images)
    with torch.no_grad():
        plain = net.extract_feat(batch.images)
    calls = []
    forward = type(net.backbone).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(net.backbone), "forward", counted)
    maps, value = victim.joint(batch, lambda: teacher.watch(batch.images, ["neck"])[0])
    assert len(calls) == 1
    (joint_slope,) = torch.autograd.grad(value.sum(), batch.images)
    for one, other in zip(maps, plain, strict=True):
        assert torch.equal(one, other)
    # A two-stage loss goes image by image through convolutions that are then run on another batch size.
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert float((joint_slope - slope).norm() / slope.norm()) < 1e-4
    assert "extract_feat" not in vars(net)


def test_a_forward_without_features_is_refused(detectors):
    teacher = FrozenTeacher(detectors("retinanet"))
    with pytest.raises(RuntimeError, match="expected one extract_feat of RetinaNet.*got 0"):
        MMDetVictim(teacher).joint(attacked([4]), list)
