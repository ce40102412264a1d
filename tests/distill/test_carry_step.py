"""Mode ``carry`` inside a step: one forward for features and gradient, what it may read, and what it refuses early."""

from __future__ import annotations

import pytest
import torch

from ikd_fast import IKD, AdaptiveFreqAug, AdvFeatureLoss, FGDLoss, OnlineDIFGSM
from ikd_fast.attack import View
from ikd_fast.distill import FrozenTeacher
from ikd_fast.pixels import PixelUnits
from tests.distill.nets import Net, batch, class_loss


def build(teacher=None, victim=None, **kwargs) -> IKD:
    torch.manual_seed(0)
    student, own = Net(), Net(10)
    teacher = own if teacher is None else teacher
    settings = dict(
        features="neck", losses=[FGDLoss(levels=[0])], units=PixelUnits(value_range=(0, 1)), task_loss=class_loss, beta=1.0,
        victim=victim or (lambda x, y: class_loss(teacher, x, y)), attack=OnlineDIFGSM("carry"), calibrate=0,
    )  # fmt: skip
    return IKD(student, teacher, **{**settings, **kwargs})


def steps(ikd: IKD, epochs: int, **kwargs) -> list:
    images, targets = batch()
    return [
        ikd.step(images, targets, image_ids=[5, 6, 7], epoch=epoch, step=epoch, **kwargs)
        for epoch in range(epochs)
    ]


@pytest.mark.parametrize(
    ("attack", "forwards"),
    [
        # Clean and adversarial; a first visit has its gradient from a forward of its own.
        (dict(mode="carry"), [3, 2, 2]),
        (dict(mode="carry", objective="feature"), [3, 2, 2]),
        (dict(mode="carry", fresh=True), [3, 3, 3]),
        (dict(mode="carry", refresh=1), [3, 2, 2]),
        (dict(mode="single"), [3, 3, 3]),
    ],
)
def test_the_teacher_runs_no_more_than_it_must(attack: dict, forwards: list[int]) -> None:
    ikd = build(attack=OnlineDIFGSM(**attack))
    for epoch, count in enumerate(forwards):
        ikd.teacher.net.forwards = 0
        images, targets = batch()
        ikd.step(images, targets, image_ids=[5, 6, 7], epoch=epoch)
        assert ikd.teacher.net.forwards == count


@pytest.mark.parametrize(
    "objective", ["cls", "feature", lambda maps, _batch: maps[0].flatten(1).square().sum(1)]
)
def test_distilled_maps_are_the_teachers_of_the_adversarial_images(objective) -> None:
    ikd = build(attack=OnlineDIFGSM("carry", objective=objective), losses=[FGDLoss(levels=[0])])
    seen = {}

    class Watching(AdvFeatureLoss):
        def forward(self, student, teacher, ctx):
            seen["teacher"] = teacher
            return super().forward(student, teacher, ctx)

    ikd.adv_loss = Watching()
    crafted: list = []
    ikd.attack = _Spy(ikd.attack, crafted)
    for epoch in range(3):
        images, targets = batch()
        ikd.step(images, targets, image_ids=[5, 6, 7], epoch=epoch)
        for one, other in zip(seen["teacher"], ikd.teacher.features(crafted[-1].images, "neck"), strict=True):
            assert not one.requires_grad
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class _Spy:
    def __init__(self, attack: OnlineDIFGSM, made: list) -> None:
        self._attack, self._made = attack, made

    def __getattr__(self, name: str):
        return getattr(self._attack, name)

    def __call__(self, *args, **kwargs):
        self._made.append(self._attack(*args, **kwargs))
        return self._made[-1]


def test_noise_is_no_part_of_what_the_feature_objective_compares_with() -> None:
    """The same geometry with and without noise: equal objectives, visit by visit."""
    noisy = AdaptiveFreqAug(crop_prob=0.0, noise_prob=1.0, area_threshold=1e9)
    plain = AdaptiveFreqAug(crop_prob=0.0, noise_prob=0.0)
    found = []
    for augment in (noisy, plain):
        outs = steps(build(augment=augment, attack=OnlineDIFGSM("carry", objective="feature")), 3)
        assert (float(outs[0].logs["aug/noise_frac"]) > 0) is (augment is noisy)
        found.append([float(out.logs["attack/objective"]) for out in outs])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_views_and_plan_lead_back_to_one_perturbation() -> None:
    """Mirrored by the loader, cropped by the plan: what is kept stays on its pixels, so the objective keeps rising."""
    augment = AdaptiveFreqAug(crop_ratio=0.3, crop_align=8, hflip_prob=0.5)
    ikd = build(augment=augment, attack=OnlineDIFGSM("carry", eps=4))
    images, targets = batch()
    first = last = None
    for epoch in range(12):
        mirrored = bool(epoch % 2)
        views = [View.identity((64, 64)).flip() if mirrored else View.identity((64, 64)) for _ in images]
        given = images.flip(-1) if mirrored else images
        moved = [
            {**t, "boxes": torch.stack([64 - t["boxes"][:, 2], t["boxes"][:, 1], 64 - t["boxes"][:, 0], t["boxes"][:, 3]], 1)}
            if mirrored
            else t
            for t in targets
        ]  # fmt: skip
        out = ikd.step(given, moved, image_ids=[5, 6, 7], epoch=epoch, views=views)
        last = float(out.logs["attack/objective"])
        first = last if first is None else first
        assert float(out.logs["attack/linf"]) <= 4 + 1e-3
        assert float(out.logs["attack/memory_hit"]) == float(epoch > 0)
    assert last > first


def test_a_step_without_attacked_images_has_gradients_for_all_parameters() -> None:
    ikd = build(attack=OnlineDIFGSM("carry", fraction=0.0), adv_loss=AdvFeatureLoss())
    (out,) = steps(ikd, 1)
    assert "kd/adv" not in out.terms
    assert (float(out.logs["attack/images"]), float(out.logs["attack/gradients"])) == (0, 0)
    out.total.backward()
    assert all(p.grad is not None for p in ikd.adv_loss.parameters())


def test_what_cannot_share_a_forward_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="features is the callable.*Write features= as a module path"):
        build(
            features=lambda net, x: net.extract(x),
            task_loss=lambda net, x, y: (class_loss(net, x, y), net.extract(x)),
        )
    torch.manual_seed(0)
    net = Net(10)
    ikd = build(FrozenTeacher(net, engine=dict(fold_bn=True)), lambda x, y: class_loss(net, x, y))
    with pytest.raises(ValueError, match="the loss asks the FrozenTeacher and not its net"):
        steps(ikd, 1)

    def one_by_one(x, y):
        return torch.stack([class_loss(net, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])

    with pytest.raises(ValueError, match="maps and|one forward of the teacher"):
        steps(build(net, one_by_one), 1)
    for attack in (OnlineDIFGSM("carry", fresh=True), OnlineDIFGSM("single")):
        steps(build(net, one_by_one, attack=attack), 2)


def test_views_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(ValueError, match="views must say where each image lies"):
        steps(build(), 1, views=[View.identity((32, 32))] * 3)
