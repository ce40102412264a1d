"""One step's accounting: who runs, who gets gradients, what adds up, what is left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ikd_fast import (
    IKD,
    AdaptiveFreqAug,
    AdvFeatureLoss,
    FGDLoss,
    FrozenTeacher,
    KDLoss,
    MGDLoss,
    OnlineDIFGSM,
    PixelUnits,
)
from ikd_fast.distill import Renormalize
from tests.distill.nets import Net, batch, class_loss

UNITS = PixelUnits(value_range=(0, 1))


def make(student=None, teacher=None, **kwargs):
    torch.manual_seed(0)
    student, teacher = student or Net(), teacher or Net()
    kwargs = (
        dict(
            losses=[FGDLoss(alpha=1e-2, beta=5e-3, gamma=1e-2, lambda_=1e-3)],
            attack=OnlineDIFGSM("single"),
            augment=AdaptiveFreqAug(value_range=(0, 1), noise_prob=1.0),
            victim=lambda x, y: class_loss(teacher, x, y),
            units=UNITS,
            example=torch.zeros(1, 3, 64, 64),
            task_loss=class_loss,
            beta=1e-3,
        )
        | kwargs
    )
    return IKD(student, teacher, **kwargs)


def run(ikd, epoch=0, step=0, **kwargs):
    images, targets = batch(**kwargs)
    return ikd.step(images, targets, image_ids=range(len(images)), epoch=epoch, step=step)


def test_total_is_the_sum_of_its_terms_and_each_is_what_it_says():
    ikd = make(losses=[AdvFeatureLoss(name="mimic")], augment=None).eval()
    images, targets = batch()
    out = ikd.step(images, targets, image_ids=range(3), epoch=0)
    assert sorted(out.terms) == ["kd/adv", "kd/mimic", "task/task"]
    torch.testing.assert_close(out.total, sum(out.terms.values()))
    student, teacher = ikd.student, ikd.teacher.net
    with torch.no_grad():
        torch.testing.assert_close(out.terms["task/task"], class_loss(student, images, targets))
        gap = (
            sum(
                (s - t).double().square().sum()
                for s, t in zip(student.extract(images), teacher.extract(images), strict=True)
            )
            / 3
        )
        torch.testing.assert_close(out.terms["kd/mimic"].double(), gap, rtol=1e-5, atol=0)
    x_adv = OnlineDIFGSM("single", value_range=(0, 1))(
        lambda x, y: class_loss(teacher, x, y), images, targets, image_ids=range(3), epoch=0
    ).images
    with torch.no_grad():
        gap = (
            sum(
                (s - t).double().square().sum()
                for s, t in zip(student.extract(x_adv), teacher.extract(x_adv), strict=True)
            )
            / 3
        )
    torch.testing.assert_close(out.terms["kd/adv"].double(), 1e-3 * gap, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("mode", "student_runs", "teacher_runs"), [("single", 2, 3), ("iterative", 2, 7), ("random_sign", 2, 2)]
)
def test_forwards_are_counted(mode, student_runs, teacher_runs):
    """Student: clean and adversarial. Teacher: clean, adversarial, and one per gradient."""
    ikd = make(attack=OnlineDIFGSM(mode))
    ikd.student.forwards = ikd.teacher.net.forwards = 0
    out = run(ikd)
    assert (ikd.student.forwards, ikd.teacher.net.forwards) == (student_runs, teacher_runs)
    out.total.backward()
    assert (ikd.student.forwards, ikd.teacher.net.forwards) == (student_runs, teacher_runs)


def test_no_ground_truth_on_adversarial_images_and_no_noise_in_them():
    seen = []

    def task(net, images, targets):
        seen.append(images.clone())
        return class_loss(net, images, targets)

    called = []
    ikd = make(task_loss=task, call=lambda net, x: (called.append((net, x.clone())), net(x))[1])
    images, targets = batch()
    called.clear()
    out = ikd.step(images, targets, image_ids=range(3), epoch=0)
    assert len(seen) == 1  # the task loss saw x_data only
    (x_adv,) = [x for net, x in called if net is ikd.student]
    plan = out.plan
    geo, _ = ikd.augment.apply_geometry(images, targets, plan)
    assert plan.noise_frac > 0
    assert plan.crop_frac > 0
    # x_adv stays within eps of the image before the noise; x_data does not.
    assert float((x_adv - geo).abs().max()) <= 8 / 255 + 1e-6
    assert float((seen[0] - geo).abs().max()) > 9 / 255
    # The window of clean and adversarial image is one: outside it both are padding.
    h, w = plan.out_sizes[0]
    assert float(x_adv[0, :, h:].abs().sum() + x_adv[0, :, :, w:].abs().sum()) == 0
    assert float(seen[0][0, :, h:].abs().sum()) == 0


def test_teacher_is_unchanged_ungraded_and_nowhere_in_the_state():
    ikd = make(losses=[FGDLoss(), MGDLoss()])
    before = ikd.teacher.fingerprint()
    optimizer = torch.optim.SGD(ikd.parameters(), lr=0.1)
    out = run(ikd)
    out.total.backward()
    optimizer.step()
    teacher = ikd.teacher.net
    assert ikd.teacher.fingerprint() == before
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    ours = {id(p) for p in ikd.parameters()}
    assert not ours & {id(p) for p in teacher.parameters()}
    names = list(ikd.state_dict())
    assert {n.split(".")[0] for n in names} == {"student", "losses"}
    assert [n for n in names if n.startswith("student.")] == [
        "student." + n for n in ikd.student.state_dict()
    ]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ikd.student.neck.parameters())


def test_taps_are_gone_after_an_exception():
    def fail(net, images, targets):
        net(images)
        raise RuntimeError("task failed")

    ikd = make(task_loss=fail)
    with pytest.raises(RuntimeError, match="task failed"):
        run(ikd)
    hooks = [m for m in [*ikd.student.modules(), *ikd.teacher.net.modules()] if m._forward_hooks]
    assert hooks == []


def test_adversarial_pass_leaves_running_statistics_alone():
    """Running statistics follow the clean images exactly as without an adversarial branch."""
    with_adv, without = make(augment=None), make(augment=None, attack=None)
    for ikd in (with_adv, without):
        ikd.train()
        run(ikd)
    a, b = with_adv.student.backbone[1], without.student.backbone[1]
    assert torch.equal(a.running_mean, b.running_mean)
    assert torch.equal(a.running_var, b.running_var)
    assert int(a.num_batches_tracked) == int(b.num_batches_tracked) == 1
    assert a.track_running_stats


def test_without_augment_and_attack_it_is_plain_distillation():
    ikd = make(augment=None, attack=None)
    images, targets = batch()
    out = ikd.step(images, targets, image_ids=range(3), epoch=0)
    twin = make(augment=None, attack=None)
    s, t = twin.student.extract(images), twin.teacher.net.extract(images)
    from ikd_fast import DistillContext

    ctx = DistillContext([x["boxes"] for x in targets], None, [(64, 64)] * 3, (64, 64), [0, 1, 2])
    kd = sum(twin.losses[0](s, [m.detach() for m in t], ctx).values())
    torch.testing.assert_close(out.terms["kd/fgd"], kd, rtol=1e-6, atol=0)
    assert set(out.terms) == {"task/task", "kd/fgd"}
    assert out.plan is None


@pytest.mark.parametrize(
    ("rule", "last"), [(dict(epoch=2), (1, 19)), (dict(iter=15), (1, 14)), (0.5, (0, 9))]
)
def test_stop_at_switches_everything_off_and_costs_nothing(rule, last):
    ikd = make(stop_at=rule, total_steps=20)
    epoch, step = last
    assert "kd/adv" in run(ikd, epoch=epoch, step=step).terms
    ikd.student.forwards = ikd.teacher.net.forwards = 0
    out = run(ikd, epoch=epoch + (1 if rule == dict(epoch=2) else 0), step=step + 1)
    assert "kd/adv" not in out.terms
    assert out.plan is None
    assert (ikd.student.forwards, ikd.teacher.net.forwards) == (1, 1)


def test_logs_hold_no_graph_and_no_key_that_trainers_sum():
    out = run(make())
    assert {
        "kd/fgd.0",
        "kd/fgd.1",
        "share/kd/adv",
        "share/task",
        "aug/crop_frac",
        "aug/noise_frac",
        "attack/linf",
    } <= set(out.logs)
    assert all("loss" not in key and not value.requires_grad for key, value in out.logs.items())
    assert float(out.logs["attack/linf"]) == pytest.approx(8, abs=1e-3)
    shares = sum(float(v) for k, v in out.logs.items() if k.startswith("share/"))
    assert shares == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(out.logs["kd/fgd.0"] + out.logs["kd/fgd.1"], out.terms["kd/fgd"].detach())


def test_deepcopy_shares_the_teacher():
    ikd = make()
    twin = copy.deepcopy(ikd)
    assert twin.teacher is ikd.teacher
    assert twin.student is not ikd.student


def test_moving_the_module_moves_the_teacher():
    ikd = make().double()
    assert ikd.teacher.net.head.weight.dtype == ikd.student.head.weight.dtype == torch.float64
    assert not any("teacher.net" in name for name in ikd.state_dict())


def test_a_moved_or_cast_copy_leaves_the_teacher_to_the_original():
    ikd = make()
    before, fingerprint = run(ikd), ikd.teacher.fingerprint()
    for change in (lambda m: m.half(), lambda m: m.to("meta"), lambda m: copy.deepcopy(m).double()):
        change(copy.deepcopy(ikd))
        assert ikd.teacher.fingerprint() == fingerprint
        assert {(p.dtype, p.device.type) for p in ikd.teacher.net.parameters()} == {(torch.float32, "cpu")}
    torch.testing.assert_close(run(ikd).total, before.total)
    # The original takes it along as ever, after having been copied too.
    assert next(ikd.double().teacher.net.parameters()).dtype == torch.float64


def test_a_copy_steps_while_it_has_its_teacher_and_says_so_when_it_has_not():
    ikd = make(victim=lambda x, y: x.flatten(1).square().sum(1))
    images, targets = batch()
    twin = copy.deepcopy(ikd)
    torch.testing.assert_close(run(twin).total, run(ikd).total)
    for moved in (copy.deepcopy(ikd).double(), copy.deepcopy(copy.deepcopy(ikd).double())):
        with pytest.raises(
            RuntimeError, match=r"deep copy.*another dtype \(torch.float64, the teacher's is torch.float32\)"
        ):
            run(moved)
    with pytest.raises(RuntimeError, match=r"device \(meta.*ikd.teacher.to\(device='meta'\)"):
        copy.deepcopy(ikd).to("meta").craft(None)
    ikd.double()
    with pytest.raises(RuntimeError, match="another dtype"):
        run(twin)
    twin.double()
    twin.step(images.double(), targets, image_ids=range(3), epoch=0).total.backward()


def test_a_copy_that_was_pickled_has_its_own_teacher():
    def plain():
        return IKD(Net(), Net(), losses=[AdvFeatureLoss()], example=torch.zeros(1, 3, 64, 64))

    twin = copy.deepcopy(plain())
    # Lambdas cannot be pickled.
    twin.call = twin.task_loss = twin.teacher.call = nn.Identity()
    read = pickle.loads(pickle.dumps(twin)).double()
    assert next(read.teacher.net.parameters()).dtype == torch.float64
    assert next(twin.teacher.net.parameters()).dtype == torch.float32


def test_teacher_of_another_normalisation_and_channel_order_sees_the_same_pixels():
    """A teacher that takes BGR, mean/std images gives the features of one that takes RGB 0..1."""
    torch.manual_seed(1)
    plain = Net()
    units = PixelUnits(mean=(10, 20, 30), std=(50, 60, 70))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain
            self.neck = plain.neck

        def forward(self, x):
            return self.net(units.to_pixels(x).flip(1) / 255)

    teacher = FrozenTeacher(Wrapped(), convert=Renormalize(UNITS, units, flip_channels=True))
    images, _ = batch()
    ours = teacher.features(images, "neck")
    for a, b in zip(ours, plain.extract(images), strict=True):
        # Two affine maps in float32 over values up to 255.
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_lists_of_uint8_images_are_scaled_padded_and_stacked():
    ikd = make(augment=AdaptiveFreqAug(noise_prob=0, crop_prob=0), attack=None, pad_divisor=32, losses=[])
    seen = []
    ikd.task_loss = lambda net, x, y: (seen.append(x), net(x)[0].mean())[1]
    images = [torch.full((3, 40, 50), 255, dtype=torch.uint8), torch.full((3, 33, 64), 51, dtype=torch.uint8)]
    ikd.step(images, batch(2)[1], image_ids=["a", "b"], epoch=0)
    x = seen[0]
    assert tuple(x.shape) == (2, 3, 64, 64)
    assert float(x[0, :, :40, :50].min()) == float(x[0, :, :40, :50].max()) == 1.0
    assert float(x[1, :, :33].min()) == pytest.approx(0.2)
    assert float(x[0, :, 40:].abs().sum() + x[1, :, 33:].abs().sum()) == 0


def test_callable_features_and_token_features():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 8, stride=8)

        def forward(self, x):
            return self.embed(x).flatten(2).transpose(1, 2)

    def task(net, x, y):
        tokens = net(x)
        return tokens.mean(), tokens

    ikd = make(
        Tokens(), Tokens(), features=lambda net, x: net(x), task_loss=task, losses=[AdvFeatureLoss()], augment=None,
        attack=OnlineDIFGSM("single", objective="feature"), victim=None,
    )  # fmt: skip
    images, targets = batch()
    ikd.step(images, targets, image_ids=range(3), epoch=0).total.backward()
    assert float(ikd.student.embed.weight.grad.abs().sum()) > 0


def test_own_loss_and_names_of_two_of_a_kind():
    class Mean(KDLoss):
        default_name = "mean_gap"

        def forward(self, student, teacher, ctx):
            return sum((s.mean() - t.mean()).abs() for _, s, t in self.pairs(student, teacher))

    out = run(make(losses=[Mean(), Mean(levels=[1])]))
    assert {"kd/mean_gap", "kd/mean_gap_1"} <= set(out.terms)


def test_features_at_other_modules_and_call_order():
    ikd = make(
        losses=[
            AdvFeatureLoss(source="head"),
            AdvFeatureLoss(source=["neck.lateral", "neck.down"], name="convs"),
        ],
        attack=None,
    )
    out = run(ikd)
    assert {"kd/adv_feature.0", "kd/adv_feature.1", "kd/convs.0", "kd/convs.1"} <= set(out.logs)


class ThreeLevels(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.lateral = nn.Conv2d(c, 8, 1)

    def forward(self, x):
        x = self.lateral(x)
        return x, x[..., ::2, ::2], x[..., ::4, ::4]


class HalfStride(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.lateral = nn.Conv2d(c, 8, 1)

    def forward(self, x):
        x = self.lateral(x)
        return x[..., ::2, ::2], x[..., ::4, ::4]


def test_pyramids_that_do_not_match():
    with pytest.raises(ValueError, match=r"student has 2 levels of strides \[4, 8\], teacher 3 of strides"):
        make(teacher=Net(neck=ThreeLevels))
    with pytest.raises(ValueError, match="student has 2 levels"):
        make(teacher=Net(neck=ThreeLevels), adv_loss=AdvFeatureLoss(levels=[0, 2]))
    with pytest.raises(
        ValueError, match=r"level 0 is \(16, 16\) in the student and \(8, 8\).*match='resize'"
    ):
        make(teacher=Net(neck=HalfStride))
    out = run(make(teacher=Net(neck=HalfStride), match="resize"))
    assert bool(out.total.isfinite())


def test_levels_choose_what_both_have():
    """Two levels of three in the teacher: the value is that of the pair of maps they share, by hand."""
    teacher = Net(neck=ThreeLevels)
    ikd = make(
        teacher=teacher,
        losses=[AdvFeatureLoss(name="mimic", levels=[1])],
        adv_loss=AdvFeatureLoss(levels=[0, 1]),
        augment=None,
        victim=lambda x, y: class_loss(teacher, x, y),
    ).eval()
    images, targets = batch()
    out = ikd.step(images, targets, image_ids=range(3), epoch=0)
    with torch.no_grad():
        s, t = ikd.student.extract(images)[1], teacher.extract(images)[1]
    torch.testing.assert_close(out.terms["kd/mimic"], (s - t).square().sum() / 3)
    assert [k for k in out.logs if k.startswith("kd/adv.")] == ["kd/adv.0", "kd/adv.1"]


def test_wrong_arguments_and_inputs():
    with pytest.raises(ValueError, match=r"no module 'fpn'; its children are \['backbone', 'neck', 'head'\]"):
        make(features="fpn")
    with pytest.raises(ValueError, match="attack objective 'cls' needs victim="):
        make(victim=None)
    with pytest.raises(ValueError, match="beta must be >= 0, got -1"):
        make(beta=-1)
    with pytest.raises(ValueError, match="stop_at must be dict"):
        make(stop_at=dict(steps=3))
    with pytest.raises(ValueError, match="units, attack and augment describe the images differently"):
        make(attack=OnlineDIFGSM("single", value_range=(0, 255)))
    with pytest.raises(ValueError, match="unknown loss 'FGD'"):
        make(losses=[dict(type="FGD")])
    ikd = make()
    images, targets = batch()
    with pytest.raises(ValueError, match="targets must have one entry per image: expected 3, got 2"):
        ikd.step(images, targets[:2], image_ids=range(3), epoch=0)
    with pytest.raises(ValueError, match="image_ids must have one entry per image: expected 3, got 1"):
        ikd.step(images, targets, image_ids=[1], epoch=0)
    with pytest.raises(TypeError, match=r"expected uint8 \(0..255\) or a float dtype, got torch.int64"):
        make(augment=None).step(images.long(), targets, image_ids=range(3), epoch=0)
    with pytest.raises(ValueError, match="fraction of the run: give total_steps="):
        run(make(stop_at=0.5))


def test_a_dead_teacher_is_an_error_at_start():
    teacher = Net()
    teacher.neck.lateral.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"teacher's features are not finite at levels \[0, 1\]"):
        make(teacher=teacher)


def test_images_without_boxes_and_bf16_autocast():
    ikd = make()
    images, targets = batch()
    targets[1] = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    out = ikd.step(images, targets, image_ids=range(3), epoch=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = ikd.step(images, targets, image_ids=range(3), epoch=0)
    half.total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in ikd.student.parameters() if p.grad is not None)
    # bfloat16 keeps 8 bits; its gradient signs choose another adversarial image in places.
    torch.testing.assert_close(
        half.terms["task/task"].float(), out.terms["task/task"].float(), rtol=0.02, atol=0.02
    )
    torch.testing.assert_close(
        half.terms["kd/fgd"].float(), out.terms["kd/fgd"].float(), rtol=0.05, atol=1e-4
    )


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Halves of a batch, each loss divided by 2, add up (student in eval mode, so that no statistic couples images)."""
    images, targets = batch(4)
    grads = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        ikd = make(losses=[AdvFeatureLoss()], example=torch.zeros(1, 3, 64, 64)).eval()
        for part in parts:
            out = ikd.step(images[part], targets[part], image_ids=list(range(4))[part], epoch=0)
            (out.total / len(parts)).backward()
        grads.append(ikd.student.neck.lateral.weight.grad)
    # Convolutions of another batch size add in another order, which may turn a sign of the perturbation.
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_ddp_in_one_process_survives_the_end_of_the_adversarial_branch(tmp_path):
    """The alignment of ``adv_loss`` is unused after ``stop_at``; DDP without ``find_unused_parameters`` must not mind."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wide = Net()
        wide.neck.lateral, wide.neck.down = nn.Conv2d(6, 12, 1), nn.Conv2d(12, 12, 3, stride=2, padding=1)
        wide.head = nn.Conv2d(12, 4, 1)
        ikd = make(teacher=wide, stop_at=dict(epoch=1))
        assert list(ikd.adv_loss.parameters())
        model = nn.parallel.DistributedDataParallel(ikd)
        images, targets = batch()
        for epoch in (0, 1, 2):
            model(images, targets, image_ids=range(3), epoch=epoch).total.backward()
    finally:
        dist.destroy_process_group()


def test_padding_is_zero_for_uint8_and_normalised_stacks_alike():
    units = PixelUnits(mean=(10, 20, 30), std=(50, 60, 70))
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    _, targets = batch()
    totals = []
    for images in (pixels, units.from_pixels(pixels)):
        aug = AdaptiveFreqAug(mean=units.mean, std=units.std, noise_prob=0)
        ikd = make(units=units, augment=aug, attack=None).eval()
        out = ikd.step(images, targets, image_ids=range(3), epoch=0)
        assert out.plan.crop_frac > 0
        totals.append(float(out.total))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_more_wrong_arguments():
    images, targets = batch()
    with pytest.raises(
        ValueError, match="IKD reads boxes as xyxy pixels, augment has box_format='cxcywh_norm'"
    ):
        make(augment=AdaptiveFreqAug(value_range=(0, 1), box_format="cxcywh_norm"))
    with pytest.raises(ValueError, match="different callables"):
        make(losses=[AdvFeatureLoss(source=lambda n, x: n(x)), AdvFeatureLoss(source=lambda n, x: n(x))])
    counting, plain = make(stop_at=dict(iter=5)), make(augment=None)
    with pytest.raises(ValueError, match="give step= to every ikd.step"):
        counting.step(images, targets, image_ids=range(3), epoch=0)
    with pytest.raises(ValueError, match="images is empty"):
        plain.step([], [], image_ids=[], epoch=0)
    with pytest.raises(ValueError, match="the student on cpu; write images.to"):
        plain.step(images.to("meta"), targets, image_ids=range(3), epoch=0)
    student = Net()
    student.backbone.with_cp = True
    replayed = make(student=student)
    with pytest.raises(ValueError, match=r"backbone recomputes its forward in backward \(with_cp=True\)"):
        run(replayed)


def test_features_changed_in_place_are_refused():
    net = Net()
    net.backbone[2] = nn.ReLU(inplace=True)
    with pytest.raises(RuntimeError, match="what 'backbone.1' gave was changed in place"):
        make(student=net, losses=[AdvFeatureLoss(source="backbone.1")], attack=None)


def test_inputs_that_would_pass_silently_are_named():
    images, targets = batch()
    plain = make(augment=None, attack=None)
    ids = dict(image_ids=range(3), epoch=0)
    with pytest.raises(
        ValueError, match=r"targets\[0\]: expected a dict with 'boxes'.*got keys \['bboxes', 'labels'\]"
    ):
        plain.step(images, [dict(bboxes=t["boxes"], labels=t["labels"]) for t in targets], **ids)
    with pytest.raises(ValueError, match="targets must have one entry per image: expected 3, got None"):
        plain.step(images, None, **ids)
    with pytest.raises(ValueError, match=r"targets\[1\]\['labels'\]: expected 1, one per box, got 2"):
        plain.step(images, [targets[0], targets[1] | dict(labels=torch.tensor([1, 2])), targets[2]], **ids)
    with pytest.raises(ValueError, match=r"boxes\[2\]"):
        plain.step(
            images,
            [*targets[:2], targets[2] | dict(boxes=torch.tensor([[1.0, 1.0, float("nan"), 2.0]]))],
            **ids,
        )
    with pytest.raises(ValueError, match="expected values of 0 to 1"):
        plain.step(images * 255, targets, **ids)
    with pytest.raises(ValueError, match="expected values of 0 to 1.*found nan"):
        plain.step(images * float("nan"), targets, **ids)
    with pytest.raises(ValueError, match="epoch must be in"):
        plain.step(images, targets, image_ids=range(3), epoch=-1)
    with pytest.raises(TypeError, match="epoch must be an integer, got 0.5"):
        plain.step(images, targets, image_ids=range(3), epoch=0.5)
    with pytest.raises(TypeError, match="must be an integer"):
        plain.step(images, targets, image_ids=[0.5, 1.5, 2.5], epoch=0)
    with pytest.raises(TypeError, match=r"images\[0\] must be a torch.Tensor \[C, H, W\], got ndarray"):
        plain.step(list(images.numpy()), targets, **ids)


def test_a_net_is_not_its_own_teacher():
    net = Net()
    with pytest.raises(ValueError, match=r"student and teacher share \d+ parameters.*copy.deepcopy"):
        make(student=net, teacher=net)
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(TypeError, match="attack must be an ikd_fast.OnlineDIFGSM or None, got {'type'"):
        make(attack=dict(type="OnlineDIFGSM"))


def test_one_declaration_of_the_units_is_enough():
    aug, attack = AdaptiveFreqAug(noise_prob=1.0), OnlineDIFGSM("single")
    for where in (dict(units=UNITS), dict(attack=OnlineDIFGSM("single", value_range=(0, 1)), units=None)):
        out = run(make(**(dict(augment=aug, attack=attack) | where)))
        assert out.plan.noise_frac > 0
        assert float(out.logs["attack/linf"]) == pytest.approx(8, abs=1e-3)
    assert aug.units == PixelUnits()  # the caller's object is left alone
