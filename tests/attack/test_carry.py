"""Mode ``carry``: what is kept, what moves it, and what it costs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from ikd_fast.attack import OnlineDIFGSM
from ikd_fast.attack.memory import PerturbationMemory, View
from ikd_fast.pixels import PixelUnits

GREY = 1 / 255
SIZE = (12, 17)


class Linear:
    """Loss ``sum(w * x)`` with w painted on the canonical images: the gradient's sign is known for every view."""

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.seen = weights, 0
        self.views: list[View] = []

    def __call__(self, images: Tensor, _targets: object) -> Tensor:
        self.seen += 1
        rows = [painted(w, v, images.shape[-2:]) for w, v in zip(self.weights, self.views, strict=True)]
        return (images * torch.stack(rows).to(images.dtype)).flatten(1).sum(1)


def painted(image: Tensor, view: View, frame: tuple[int, int]) -> Tensor:
    """A canonical image in a view of scale 1, by slicing; zeros on the padding."""
    h, w = view.size
    y0 = int(-view.offset[0]) if view.scale[0] > 0 else int(view.offset[0]) - h
    x0 = int(-view.offset[1]) if view.scale[1] > 0 else int(view.offset[1]) - w
    part = image[:, y0 : y0 + h, x0 : x0 + w]
    part = part.flip([d for d, s in ((1, view.scale[0]), (2, view.scale[1])) if s < 0])
    out = image.new_zeros(image.shape[0], *frame)
    out[:, :h, :w] = part
    return out


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(n, 3, *SIZE, generator=g)
    return 0.2 + 0.6 * torch.rand(n, 3, *SIZE, generator=g), weights


def moved(views: list[View], canonical: Tensor) -> Tensor:
    frame = max(v.size[0] for v in views), max(v.size[1] for v in views)
    return torch.stack([painted(x, v, frame) for x, v in zip(canonical, views, strict=True)])


WHOLE = View.identity(SIZE)
CHAIN = (
    WHOLE,
    WHOLE.crop((3, 1, 17, 11)),
    WHOLE.flip(),
    WHOLE.crop((0, 2, 13, 12)).flip(),
    WHOLE.flip(horizontal=False, vertical=True),
    WHOLE,
)


def test_every_view_pushes_the_canonical_pixels_it_shows() -> None:
    """With a linear loss the ascent's end is known: eps * sign(w) wherever an image was shown often enough."""
    canonical, weights = batch()
    victim = Linear(weights)
    attack = OnlineDIFGSM("carry", eps=8, step_size=4, value_range=(0, 1))
    for epoch, view in enumerate(CHAIN):
        victim.views = [view] * 3
        images = moved(victim.views, canonical)
        out = attack(
            victim, images, image_ids=[1, 2, 3], epoch=epoch, sizes=[view.size] * 3, views=victim.views
        )
        expected = 8 * GREY * moved(victim.views, weights).sign()
        # The first step goes to the corner of the ball, and no later view moves it away.
        torch.testing.assert_close(out.delta, expected, atol=1e-6, rtol=0)


def test_a_part_shown_late_starts_at_random_and_catches_up() -> None:
    canonical, weights = batch(1)
    victim = Linear(weights)
    attack = OnlineDIFGSM("carry", eps=8, step_size=4, value_range=(0, 1))
    half = WHOLE.crop((0, 0, 8, 12))
    for epoch, view in enumerate((half, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE)):
        victim.views = [view]
        images = moved([view], canonical)
        out = attack(victim, images, image_ids=[5], epoch=epoch, sizes=[view.size], views=[view])
        right = (out.delta / GREY * weights.sign())[..., 8:] if view is WHOLE else None
        if epoch == 1:
            # Not seen before: what it started from, levels of 4 in -8..8 without a preference.
            assert set((right.round()).flatten().tolist()) == {-8.0, -4.0, 0.0, 4.0, 8.0}
            assert abs(float(right.mean())) < 1.0
    assert bool((right.round() == 8).all())


def test_no_step_leaves_the_ball_or_the_range_and_padding_stays() -> None:
    canonical, weights = batch()
    canonical[0, :, :4] = 0.0
    canonical[1, :, :4] = 1.0
    victim, sizes = Linear(weights), [(12, 17), (10, 15), (12, 9)]
    victim.views = [WHOLE.crop((0, 0, w, h)) for h, w in sizes]
    attack = OnlineDIFGSM("carry", value_range=(0, 1))
    images = moved(victim.views, canonical)
    for epoch in range(3):
        out = attack(victim, images, image_ids=[1, 2, 3], epoch=epoch, sizes=sizes, views=victim.views)
        assert float(out.delta.abs().max()) <= 8 * GREY + 1e-6
        assert float(out.images.min()) >= 0
        assert float(out.images.max()) <= 1
        for i, (h, w) in enumerate(sizes):
            assert torch.equal(out.images[i, :, h:], images[i, :, h:])
            assert torch.equal(out.images[i, :, :, w:], images[i, :, :, w:])


def test_units_give_equal_perturbations() -> None:
    canonical, weights = batch()
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    units = {
        "0..1": PixelUnits(value_range=(0, 1)),
        "0..255": PixelUnits(value_range=(0, 255)),
        "normalised": PixelUnits(mean=mean, std=std),
    }
    found = {}
    for name, unit in units.items():
        attack = OnlineDIFGSM("carry")
        victim = Linear(weights)
        victim.views = [WHOLE] * 3
        images = unit.from_pixels(canonical * 255)
        for epoch in range(2):
            out = attack(victim, images, image_ids=[1, 2, 3], epoch=epoch, units=unit)
        found[name] = out.delta / unit.grey_level(images)
    for delta in found.values():
        torch.testing.assert_close(delta, found["0..255"], atol=2e-4, rtol=0)


class Bowl:
    """Loss ``-sum((x - c)^2)``: gradients change sign at c, so steps turn back and forth."""

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        return -(images - self.centre[targets]).square().flatten(1).sum(1)


def test_visits_are_projected_ascent_on_the_levels() -> None:
    """Against the same ascent in float64 on unpacked numbers."""
    images, weights = batch()
    centre = images + weights.clamp(-1, 1) * 5.3 * GREY
    attack = OnlineDIFGSM("carry", eps=8, step_size=2, value_range=(0, 1))
    codes = attack.bind_memory(3)
    assert codes.levels == 9
    ids, own = [3, 4, 5], []
    for i in ids:
        start = codes.start((3, *SIZE), seed=0, id=i, epoch=0, device="cpu")
        own.append(codes.decode(codes.unpack(start, (3, *SIZE))).double())
    delta = torch.stack(own)

    def slope() -> Tensor:
        return -2 * (images.double() + delta * GREY - centre.double())

    delta = (delta + 16 * slope().sign()).clamp(-8, 8)
    for epoch in range(5):
        out = attack(Bowl(centre), images, torch.arange(3), image_ids=ids, epoch=epoch)
        torch.testing.assert_close(out.delta.double(), delta * GREY, atol=1e-6, rtol=0)
        if epoch:  # the first visit has spent its gradient on its own image
            delta = (delta + 2 * slope().sign()).clamp(-8, 8)


def test_momentum_goes_on_in_the_direction_of_the_sum() -> None:
    """mu 1 with a loss whose gradient's sign turns but whose normalised sum does not: the first push is the larger."""
    images, _ = batch(1)
    pushes = [torch.full((3, *SIZE), 3.0), torch.full((3, *SIZE), -1.0)]
    # The mean of |g| is what a push is divided by, so a few large entries set its scale.
    for push in pushes:
        push[:, 0] = 10.0 if push is pushes[0] else 30.0

    def victim(x: Tensor, push: list[Tensor]) -> Tensor:
        return (x * push[0]).flatten(1).sum(1)

    attack = OnlineDIFGSM("carry", eps=8, step_size=2, momentum=1.0, value_range=(0, 1))
    plain = OnlineDIFGSM("carry", eps=8, step_size=2, value_range=(0, 1))
    for one in (attack, plain):
        for epoch, push in enumerate((pushes[0], pushes[1], pushes[1])):
            out = one(victim, images, [push], image_ids=[1], epoch=epoch)
    velocity = attack.memory.fetch([1], [WHOLE], "cpu")[0].velocity.double()
    mean = [float(p.abs().mean()) for p in pushes]
    expected = pushes[0].double() / mean[0] + 2 * pushes[1].double() / mean[1]
    torch.testing.assert_close(velocity, expected, rtol=2e-3, atol=0)  # float16
    assert float(expected[:, 1:].min()) > 0  # the sum still points up where the last gradient points down
    assert bool((out.delta[0, :, 1:] < 8 * GREY - 1e-6).all())  # without momentum it has turned
    kept = attack(victim, images, [pushes[1]], image_ids=[1], epoch=3).delta
    torch.testing.assert_close(kept[0, :, 1:], torch.full_like(kept[0, :, 1:], 8 * GREY), atol=1e-6, rtol=0)


class Counting(Linear):
    """Counts the gradients that really pass."""

    gradients = 0

    def __call__(self, images: Tensor, targets: object) -> Tensor:
        value = super().__call__(images, targets)
        if images.requires_grad:
            images.register_hook(self._count)
        return value

    def _count(self, gradient: Tensor) -> Tensor:
        self.gradients += 1
        return gradient


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(mode="single"), [1, 1, 1, 1]),
        (dict(mode="iterative", diversity_prob=0.0), [5, 5, 5, 5]),
        (dict(mode="random_sign"), [0, 0, 0, 0]),
        (dict(mode="carry"), [1, 1, 1, 1]),
        (dict(mode="carry", fresh=True), [1, 1, 1, 1]),
        (dict(mode="carry", refresh=2), [1, 1, 0, 0]),
        (dict(mode="carry", fresh=True, refresh=1), [1, 0, 0, 0]),
    ],
)
def test_gradients_are_counted_as_they_pass(settings: dict, expected: list[int]) -> None:
    canonical, weights = batch()
    victim = Counting(weights)
    victim.views = [WHOLE] * 3
    attack = OnlineDIFGSM(**settings, value_range=(0, 1))
    for epoch, count in enumerate(expected):
        victim.gradients = 0
        out = attack(victim, canonical, image_ids=[1, 2, 3], epoch=epoch)
        assert (out.gradient_evals, victim.gradients) == (count, count)


def test_mixed_batches_spend_gradients_on_those_that_are_due() -> None:
    canonical, weights = batch(4)
    victim = Counting(weights)
    attack = OnlineDIFGSM("carry", refresh=1, value_range=(0, 1))

    def visit(rows: list[int], epoch: int):
        victim.views, victim.weights = [WHOLE] * len(rows), weights[rows]
        return attack(_Some(victim, rows), canonical[rows], image_ids=rows, epoch=epoch)

    visit([0, 1], 0)
    out = visit([0, 1, 2, 3], 1)
    assert out.gradient_evals == 0.5  # two of four images have one each
    assert out.memory_hits == 2
    assert visit([3, 2, 1, 0], 2).gradient_evals == 0


class _Some:
    """A victim made for a batch, which the attack asks for some of its images."""

    def __init__(self, victim: Linear, rows: list[int]) -> None:
        self.victim, self.weights = victim, victim.weights

    def select(self, rows: list[int]) -> _Some:
        twin = _Some.__new__(_Some)
        twin.victim, twin.weights = self.victim, self.weights[list(rows)]
        return twin

    def cls_loss(self, images: Tensor, targets: object) -> Tensor:
        self.victim.weights, self.victim.views = self.weights, [WHOLE] * len(images)
        return self.victim(images, targets)


@pytest.mark.parametrize(
    "settings", [{}, dict(fresh=True), dict(momentum=0.5), dict(memory=dict(stride=2, bits=8))]
)
def test_batch_and_order_do_not_matter(settings: dict) -> None:
    """Four images together, and one by one in another order: equal bits."""
    images, weights = batch(4)
    targets = torch.arange(4)
    centre = images + weights.clamp(-1, 1) * 5.3 * GREY

    def victim(x: Tensor, y: Tensor) -> Tensor:
        return -(x - centre[y]).square().flatten(1).sum(1)

    together = OnlineDIFGSM("carry", value_range=(0, 1), **settings)
    alone = OnlineDIFGSM("carry", value_range=(0, 1), **settings)
    for epoch in range(3):
        out = together(victim, images, targets, image_ids=[7, 8, 9, 10], epoch=epoch)
        for i in (2, 0, 3, 1):
            one = alone(victim, images[i : i + 1], targets[i : i + 1], image_ids=[7 + i], epoch=epoch)
            assert torch.equal(one.images[0], out.images[i])


def test_fraction_draws_by_key() -> None:
    images, weights = batch(3)
    images, weights = images.repeat(40, 1, 1, 1), weights.repeat(40, 1, 1, 1)
    ids = list(range(100, 220))
    attack = OnlineDIFGSM("single", fraction=0.3, value_range=(0, 1))

    def victim(x: Tensor, w: Tensor) -> Tensor:
        return (x * w).flatten(1).sum(1)

    out = attack(victim, images, weights, image_ids=ids, epoch=0)
    # Binomial(120, 0.3): mean 36, standard deviation 5.
    assert 21 <= len(out.rows) <= 51
    assert len(out.images) == len(out.rows)
    torch.testing.assert_close(out.delta, 8 * GREY * weights[out.rows].sign(), atol=1e-6, rtol=0)
    some = attack(victim, images[:50], weights[:50], image_ids=ids[:50], epoch=0)
    assert some.rows == [i for i in out.rows if i < 50]
    assert attack(victim, images, weights, image_ids=ids, epoch=1).rows != out.rows
    nobody = OnlineDIFGSM("carry", fraction=0.0, value_range=(0, 1))(
        victim, images, weights, image_ids=ids, epoch=0
    )
    assert (nobody.rows, len(nobody.images), nobody.gradient_evals) == ([], 0, 0)


def test_a_gradient_that_is_not_finite_leaves_the_record() -> None:
    canonical, weights = batch()
    victim = Linear(weights)
    victim.views = [WHOLE] * 3
    attack = OnlineDIFGSM("carry", value_range=(0, 1))

    def sick(x: Tensor, targets: object) -> Tensor:
        return victim(x, targets) * torch.tensor([1.0, float("inf"), 0.0])

    first = attack(sick, canonical, image_ids=[1, 2, 3], epoch=0)
    assert first.nonfinite.tolist() == [False, True, False]
    # No gradient at all: no adversarial example, and not a random start passed off as one.
    assert not bool(first.delta[1:].any())
    attack(victim, canonical, image_ids=[1, 2, 3], epoch=1)
    before = attack(victim, canonical, image_ids=[1, 2, 3], epoch=2).delta
    attack(sick, canonical, image_ids=[1, 2, 3], epoch=3)
    after = attack(victim, canonical, image_ids=[1, 2, 3], epoch=4).delta
    torch.testing.assert_close(
        after[1:],
        before[1:] + 4 * GREY * weights[1:].sign() * (before[1:].abs() < 7.9 * GREY),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        (
            lambda x, y: x.flatten(1).sum(1) * float("nan"),
            r"loss is NaN, expected a number; images with ids \[11, 12, 13\]",
        ),
        (lambda x, y: x.detach().flatten(1).sum(1), "does not depend on the images"),
        (lambda x, y: torch.zeros(3, requires_grad=True), "does not depend on the images"),
        (
            lambda x, y: x.sum(1),
            r"must be \[N\] = \[3\] or a scalar, one value an image or their sum, got shape \[3, 12, 17\]",
        ),
        (lambda x, y: x[:2].flatten(1).sum(1), r"must be \[N\] = \[3\] or a scalar"),
    ],
)
@pytest.mark.parametrize("mode", ["single", "iterative", "carry"])
def test_wrong_victims(mode: str, victim, message: str) -> None:
    images, _ = batch()
    with pytest.raises(ValueError, match=message):
        OnlineDIFGSM(mode, value_range=(0, 1))(victim, images, image_ids=[11, 12, 13], epoch=0)


def test_a_loss_that_is_no_tensor() -> None:
    images, _ = batch()
    with pytest.raises(TypeError, match="must be a Tensor.*got dict"):
        OnlineDIFGSM("single", value_range=(0, 1))(
            lambda x, y: {"cls": x.sum()}, images, image_ids=[1, 2, 3], epoch=0
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mode="carry", memory=dict(bits=2), step_size=2), "step"),
        (dict(mode="carry", memory=dict(max_bytes="1GB")), "max_bytes must be a number of bytes"),
        (dict(mode="single", memory=dict(bits=4)), "memory is for mode 'carry', got it with mode 'single'"),
        (dict(mode="carry", memory=dict(bits=3)), r"bits must be one of \[8, 4, 2\], got 3"),
        (dict(mode="carry", memory=dict(bit=4)), "memory has no setting"),
        (dict(mode="carry", diversity_prob=0.5), "expected diversity_prob=0, got 0.5"),
        (dict(mode="carry", random_start=False), "expected random_start=True, got False"),
        (dict(mode="carry", refresh=0), "refresh is a number of visits >= 1"),
        (dict(mode="single", refresh=5), "refresh is a number of visits >= 1"),
        (dict(mode="single", fresh=True), "fresh is for mode 'carry'"),
        (dict(mode="single", fraction=1.5), "fraction must be in 0..1"),
        (dict(mode="carry", steps=3), "mode 'carry' spends 1 gradients, got steps=3"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineDIFGSM(**settings)


def test_wrong_views_and_memories() -> None:
    images, weights = batch()
    victim = Linear(weights)
    victim.views = [WHOLE] * 3
    memory = PerturbationMemory()
    attack = OnlineDIFGSM("carry", memory=memory, value_range=(0, 1))
    with pytest.raises(ValueError, match="views must have one entry per image: expected 3, got 1"):
        attack(victim, images, image_ids=[1, 2, 3], epoch=0, views=[WHOLE])
    with pytest.raises(ValueError, match=r"views\[0\] is of an image of \(12, 9\).*the image has \(12, 17\)"):
        attack(victim, images, image_ids=[1, 2, 3], epoch=0, views=[WHOLE.crop((0, 0, 9, 12)), WHOLE, WHOLE])
    attack(victim, images, image_ids=[1, 2, 3], epoch=0)
    other = OnlineDIFGSM("carry", eps=4, memory=memory, value_range=(0, 1))
    with pytest.raises(
        ValueError, match=r"made for other settings \(eps: 8.0 there, 4.0 now; step: 4.0 there, 2.0 now\)"
    ):
        other(victim, images, image_ids=[1, 2, 3], epoch=0)
    with pytest.raises(ValueError, match="for images of 3 channels, got 1"):
        attack(victim, images[:, :1], image_ids=[1, 2, 3], epoch=1)


def test_a_resized_image_starts_again_and_is_counted() -> None:
    images, weights = batch()
    victim = Linear(weights)
    victim.views = [WHOLE] * 3
    attack = OnlineDIFGSM("carry", value_range=(0, 1))
    attack(victim, images, image_ids=[1, 2, 3], epoch=0)
    victim.weights = weights[:, :, :10]
    victim.views = [View.identity((10, 17))] * 3
    out = attack(victim, images[:, :, :10], image_ids=[1, 2, 3], epoch=1)
    assert (out.gradient_evals, out.memory_hits) == (1, 0)
    counted = attack.memory.counters
    assert (counted["unknown"], counted["resized"], counted["hits"]) == (3, 3, 0)


def test_ids_name_images_so_they_are_required() -> None:
    images, weights = batch()
    with pytest.raises(ValueError, match="expected image_ids, got None"):
        OnlineDIFGSM("carry", seed=None, value_range=(0, 1))(Linear(weights), images)


def test_half_images_with_large_gradients_are_attacked() -> None:
    """The sum of |g| of 3 x 224 x 224 ones is beyond float16."""
    images = torch.full((1, 3, 224, 224), 0.5, dtype=torch.float16)
    attack = OnlineDIFGSM("carry", value_range=(0, 1))
    out = attack(lambda x, y: x.flatten(1).float().sum(1), images, image_ids=[1], epoch=0)
    assert not bool(out.nonfinite.any())
    assert float(out.delta.min()) == pytest.approx(8 / 255, rel=1e-2)


def test_a_first_gradient_that_failed_is_made_up_for() -> None:
    """The feature objective has no gradient at the clean image, so what is kept must not be it."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    images, _ = batch(1)
    broken = [True]

    def sick(maps: list[Tensor], _batch: object) -> Tensor:
        return maps[0].flatten(1).square().sum(1) * (float("inf") if broken[0] else 1.0)

    attack = OnlineDIFGSM("carry", objective=sick, value_range=(0, 1))
    first = attack(net, images, image_ids=[1], epoch=0)
    assert not bool(first.delta.any())
    broken[0] = False
    attack(net, images, image_ids=[1], epoch=1)
    assert float(attack(net, images, image_ids=[1], epoch=2).delta.abs().max()) == pytest.approx(
        8 * GREY, rel=1e-4
    )


def test_momentum_does_not_see_the_padding() -> None:
    images, weights = batch(1)
    found = []
    for pad in (0, 9):
        frame = torch.nn.functional.pad(images, (0, pad, 0, pad))
        attack = OnlineDIFGSM("carry", momentum=0.9, value_range=(0, 1))
        victim = Linear(weights)
        victim.views = [WHOLE]
        for epoch in range(3):
            attack(victim, frame, image_ids=[1], epoch=epoch, sizes=[SIZE])
        found.append(attack.memory.fetch([1], [WHOLE], "cpu")[0].velocity)
    assert torch.equal(*found)


def test_copies_and_pickles_hold_no_records() -> None:
    images, weights = batch()
    victim = Linear(weights)
    victim.views = [WHOLE] * 3
    attack = OnlineDIFGSM("carry", value_range=(0, 1))
    attack(victim, images, image_ids=[1, 2, 3], epoch=0)
    for twin in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert len(twin.memory.store) == 0
        assert twin(victim, images, image_ids=[1, 2, 3], epoch=0).memory_hits == 0
    assert len(pickle.dumps(attack)) < 10_000
    assert attack(victim, images, image_ids=[1, 2, 3], epoch=1).memory_hits == 3
