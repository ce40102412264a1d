"""The attack against closed forms and an independent NumPy loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ikd_fast import OnlineDIFGSM, PixelUnits
from ikd_fast.kernels.reference.philox import stable_id

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def pixels(n=2, h=12, w=14, seed=0):
    return torch.randint(0, 256, (n, 3, h, w), generator=torch.Generator().manual_seed(seed)).float()


def conv_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1))
    return net.eval().requires_grad_(False)


def per_image_loss(net):
    return lambda x, y: net(x / 255).flatten(1).square().sum(1)


class Counting:
    """A victim that counts forwards and, through a hook on its output, gradients."""

    def __init__(self, net):
        self.net, self.forwards, self.backwards = net, 0, 0

    def __call__(self, x, y):
        self.forwards += 1
        out = self.net(x / 255).flatten(1).square().sum(1)
        out.register_hook(lambda g: setattr(self, "backwards", self.backwards + 1))
        return out


@pytest.mark.parametrize(("steps", "expected"), [(1, 2.0), (3, 6.0), (4, 8.0), (7, 8.0)])
def test_linear_victim_has_a_closed_form(steps, expected):
    x = torch.full((1, 3, 4, 4), 100.0)
    w = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    attack = OnlineDIFGSM("iterative", steps=steps, diversity_prob=0, value_range=(0, 255))
    out = attack(lambda v, y: (v * w).flatten(1).sum(1), x, image_ids=[0], epoch=0)
    # A constant gradient: alpha a step in the direction of its sign, until the ball ends.
    assert torch.equal(out.delta, expected * w.sign())
    assert torch.equal(out.images, x + out.delta)


def test_range_is_kept_at_its_ends():
    x = torch.tensor([0.0, 3.0, 252.0, 255.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2).clone()
    attack = OnlineDIFGSM("iterative", diversity_prob=0, value_range=(0, 255))
    up = attack(lambda v, y: v.sum(), x, image_ids=[0], epoch=0)
    down = attack(lambda v, y: -v.sum(), x, image_ids=[0], epoch=0)
    assert up.delta[0, 0].flatten().tolist() == [8.0, 8.0, 3.0, 0.0]
    assert down.delta[0, 0].flatten().tolist() == [0.0, -3.0, -8.0, -8.0]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_iterations_equal_an_independent_numpy_loop(momentum):
    """Quadratic loss 0.5 (x - c)' A (x - c): its gradient is known, so NumPy can run the recursion by itself."""
    rng = np.random.default_rng(0)
    n = 3 * 4 * 4
    a = rng.normal(size=(n, n))
    a = a @ a.T / n
    c, x0 = rng.uniform(60, 200, n), rng.uniform(60, 200, n)
    x, g = x0.copy(), np.zeros(n)
    for _ in range(5):
        grad = a @ (x - c)
        g = momentum * g + grad / np.abs(grad).mean()
        x = np.clip(np.clip(x + 2 * np.sign(g), x0 - 8, x0 + 8), 0, 255)
    at, ct = torch.tensor(a), torch.tensor(c)

    def loss(v, y):
        d = v.flatten(1) - ct
        return 0.5 * (d @ at * d).sum(1)

    attack = OnlineDIFGSM("iterative", momentum=momentum, diversity_prob=0, value_range=(0, 255))
    out = attack(loss, torch.tensor(x0).view(1, 3, 4, 4), image_ids=[0], epoch=0)
    # float64 on both sides: only the order of additions differs.
    np.testing.assert_allclose(out.images.numpy().ravel(), x, atol=1e-9)


@pytest.mark.parametrize("mode", ["iterative", "single", "random_sign"])
@pytest.mark.parametrize("eps", [1.0, 8.0])
def test_ball_range_and_strength(mode, eps):
    net, x = conv_net(), pixels()
    attack = OnlineDIFGSM(
        mode, eps=eps, step_size=None if mode != "iterative" else eps / 4, value_range=(0, 255)
    )
    out = attack(per_image_loss(net), x, image_ids=[3, 4], epoch=0)
    # Half an ulp of 255 in float32 (1.5e-5) is all that rounding x + delta may add.
    assert float((out.images - x).abs().max()) <= eps + 1.6e-5
    assert float(out.images.min()) >= 0
    assert float(out.images.max()) <= 255
    before, after = per_image_loss(net)(x, None), per_image_loss(net)(out.images, None)
    if mode != "random_sign":
        control = OnlineDIFGSM("random_sign", eps=eps, value_range=(0, 255))(
            None, x, image_ids=[3, 4], epoch=0
        )
        noise_gain = (per_image_loss(net)(control.images, None) - before).abs()
        assert bool((after - before > 3 * noise_gain).all())


def test_uint8_range_unit_range_and_normalised_images_get_the_same_perturbation():
    net, x = conv_net(), pixels()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    scales = {
        "255": (dict(value_range=(0, 255)), x, lambda v: v),
        "1": (dict(value_range=(0, 1)), x / 255, lambda v: v * 255),
        "norm": (dict(mean=MEAN, std=STD), (x - mean) / std, lambda v: v * std + mean),
    }
    deltas = {}
    for name, (units, images, to_pixels) in scales.items():
        for mode in ("iterative", "single"):
            attack = OnlineDIFGSM(mode, diversity_prob=1, **units)
            out = attack(
                lambda v, y, f=to_pixels: per_image_loss(net)(f(v), y), images, image_ids=[0, 1], epoch=2
            )
            deltas[name, mode] = to_pixels(out.images) - x
    for mode in ("iterative", "single"):
        for name in ("1", "norm"):
            # Float rounding may turn the sign of a gradient that is nearly zero: at most 1 value in 200 here.
            differs = (deltas[name, mode] - deltas["255", mode]).abs() > 1e-3
            assert float(differs.float().mean()) < 0.005


@pytest.mark.parametrize("mode", ["iterative", "single"])
def test_zero_gradient_gives_the_clean_image(mode):
    x = pixels(2)
    attack = OnlineDIFGSM(mode, diversity_prob=0, value_range=(0, 255))
    out = attack(lambda v, y: torch.stack([v[0].sum() * 0, v[1].sum()]), x, image_ids=[0, 1], epoch=0)
    assert torch.equal(out.images[0], x[0])
    assert float(out.delta[1].abs().max()) > 1


def test_nonfinite_gradient_is_counted_and_spreads_nowhere():
    x = pixels(2)
    attack = OnlineDIFGSM("iterative", diversity_prob=0, value_range=(0, 255))
    out = attack(
        lambda v, y: torch.stack([(v[0] - v[0].detach()).sqrt().sum(), v[1].sum()]),
        x,
        image_ids=[0, 1],
        epoch=0,
    )
    assert out.nonfinite.tolist() == [True, False]
    assert bool(out.images.isfinite().all())
    assert torch.equal(out.images[0], x[0])
    assert float(out.delta[1].max()) == 8


@pytest.mark.parametrize(("mode", "evals"), [("iterative", 5), ("single", 1), ("random_sign", 0)])
def test_gradients_are_counted_truthfully(mode, evals):
    victim = Counting(conv_net())
    out = OnlineDIFGSM(mode, value_range=(0, 255))(victim, pixels(), image_ids=[0, 1], epoch=0)
    assert (out.gradient_evals, victim.forwards, victim.backwards) == (evals, evals, evals)


@pytest.mark.parametrize("mode", ["iterative", "single", "random_sign"])
def test_an_image_gets_the_same_delta_in_any_batch(mode):
    net, x = conv_net(), pixels(5)
    attack = OnlineDIFGSM(mode, value_range=(0, 255), seed=9)
    together = attack(per_image_loss(net), x, image_ids=list("abcde"), epoch=4)
    alone = torch.cat(
        [attack(per_image_loss(net), x[i : i + 1], image_ids=["abcde"[i]], epoch=4).images for i in range(5)]
    )
    swapped = attack(per_image_loss(net), x.flip(0), image_ids=list("edcba"), epoch=4).images.flip(0)
    # Convolutions of another batch size add in another order: a sign at the noise level may differ.
    assert float((together.images != alone).float().mean()) < 0.005
    assert float((together.images != swapped).float().mean()) < 0.005
    if mode != "iterative":
        other_epoch = attack(per_image_loss(net), x, image_ids=list("abcde"), epoch=5)
        assert float((together.images != other_epoch.images).float().mean()) > 0.05


def test_random_start_is_uniform_in_the_ball():
    seen = []
    attack = OnlineDIFGSM("single", diversity_prob=0, value_range=(0, 255))
    x = torch.full((1, 3, 40, 41), 128.0)
    attack(lambda v, y: (seen.append((v - 128).detach()), v.sum())[1], x, image_ids=[5], epoch=0)
    start = seen[0].numpy().ravel()
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(start, "uniform", args=(-8, 16)).pvalue > 1e-3


def test_padding_is_never_touched():
    x = pixels(2)
    x[0, :, 9:] = 0
    x[0, :, :, 10:] = 0
    targets = [dict(size=(9, 10)), dict(size=(12, 14))]
    for mode in ("iterative", "single", "random_sign"):
        out = OnlineDIFGSM(mode, value_range=(0, 255), diversity_prob=1)(
            per_image_loss(conv_net()), x, targets, image_ids=[0, 1], epoch=0
        )
        assert float(out.delta[0, :, 9:].abs().sum()) == 0
        assert float(out.delta[0, :, :, 10:].abs().sum()) == 0
        assert float(out.delta[0, :, :9, :10].abs().max()) > 1


def test_feature_objective_raises_the_relative_distance():
    net, x = conv_net(), pixels()
    out = OnlineDIFGSM("iterative", objective="feature", diversity_prob=0, value_range=(0, 255))(
        net, x, image_ids=[0, 1], epoch=0
    )
    control = OnlineDIFGSM("random_sign", value_range=(0, 255))(None, x, image_ids=[0, 1], epoch=0)

    def distance(images):
        f, c = net(images).double(), net(x).double()
        return (f - c).square().flatten(1).sum(1) / c.square().flatten(1).sum(1)

    assert bool((distance(out.images) > 2 * distance(control.images)).all())
    assert out.objective[0].shape == (2,)
    assert float(out.objective[-1].mean()) > float(out.objective[0].mean())


def test_classifier_targeted_and_untargeted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 14, 5)).requires_grad_(False)
    x, y = pixels(4) / 255, torch.tensor([0, 1, 2, 3])
    victim = lambda v, t: F.cross_entropy(net(v), t, reduction="none")  # noqa: E731
    before = victim(x, y)
    up = OnlineDIFGSM("iterative", value_range=(0, 1), diversity_prob=0)(
        victim, x, y, image_ids=range(4), epoch=0
    )
    down = OnlineDIFGSM("iterative", value_range=(0, 1), diversity_prob=0, targeted=True)(
        victim, x, y, image_ids=range(4), epoch=0
    )
    assert bool((victim(up.images, y) > before).all())
    assert bool((victim(down.images, y) < before).all())


def test_custom_objective_sees_features_and_batch():
    net, x = conv_net(), pixels()
    calls = []

    def objective(features, batch):
        calls.append((len(features), batch.step, batch.images.requires_grad, batch.clean.requires_grad))
        return features[0].flatten(1).sum(1)

    out = OnlineDIFGSM("iterative", steps=2, objective=objective, value_range=(0, 255))(
        net, x, image_ids=[0, 1], epoch=0
    )
    assert calls == [(1, 0, True, False), (1, 1, True, False)]
    assert bool((net(out.images).flatten(1).sum(1) > net(x).flatten(1).sum(1)).all())


def test_inputs_are_left_alone_and_no_graph_remains():
    net, x = conv_net(), pixels().requires_grad_(False)
    copy = x.clone()
    out = OnlineDIFGSM("single", value_range=(0, 255))(per_image_loss(net), x, image_ids=[0, 1], epoch=0)
    assert torch.equal(x, copy)
    assert not out.images.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_half_precision_images_stay_half():
    net, x = conv_net(), pixels()
    out = OnlineDIFGSM("single", value_range=(0, 255))(
        per_image_loss(net), x.bfloat16(), image_ids=[0, 1], epoch=0
    )
    assert out.images.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: up to half a grey level of rounding beyond the ball at 128..255.
    assert float((out.images.float() - x.bfloat16().float()).abs().max()) <= 8.5


def amp(dtype):
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_small_gradients_survive_float16(momentum):
    """A class loss over many boxes has input gradients that float16 rounds to zero."""
    net, x = conv_net(), pixels() / 255

    def victim(v, y):
        return net(v).float().flatten(1).square().sum(1) * 1e-7

    attack = OnlineDIFGSM("iterative", steps=1, momentum=momentum, diversity_prob=0, value_range=(0, 1))
    full = attack(victim, x, image_ids=[0, 1], epoch=0)
    with amp(torch.float16):
        out = attack(victim, x, image_ids=[0, 1], epoch=0)
    assert not bool(out.nonfinite.any())
    assert out.gradient_evals == 1
    # Ten bits of mantissa turn the sign of gradients that nearly cancel; unscaled, all but a few are zero.
    assert float((out.delta.sign() == full.delta.sign()).float().mean()) > 0.98


def test_a_gradient_that_overflows_by_the_scale_is_taken_with_less():
    net, x = conv_net(), pixels() / 255
    weights = torch.tensor([1.0, 4000.0])

    def victim(v, y, weights=weights):
        return net(v).flatten(1).float().sum(1) * weights

    def crafted(victim):
        with amp(torch.float16):
            return attack(victim, x, image_ids=[0, 1], epoch=0)

    attack = OnlineDIFGSM("iterative", steps=2, diversity_prob=0, value_range=(0, 1))
    out, alone = crafted(victim), crafted(lambda v, y: victim(v, y, torch.ones(2)))
    full = attack(victim, x, image_ids=[0, 1], epoch=0)
    assert not bool(out.nonfinite.any())
    assert (out.gradient_evals, alone.gradient_evals) == (6, 2)
    assert torch.equal(out.delta[0], alone.delta[0])
    assert float((out.delta.sign() == full.delta.sign()).float().mean()) > 0.98
    # What overflows without a scale too is reported, and only there.
    out = crafted(lambda v, y: victim(v, y, torch.tensor([1.0, 1e8])))
    assert out.nonfinite.tolist() == [False, True]
    assert torch.equal(out.delta[0], alone.delta[0])
    assert not bool(out.delta[1].any())


@pytest.mark.parametrize(
    ("dtype", "images", "slope"),
    [(None, torch.float32, 1), (None, torch.float64, 1), (None, torch.bfloat16, 1), (torch.bfloat16, torch.float32, 1),
     (torch.float16, torch.float32, 2**15), (None, torch.float16, 2**15)],
)  # fmt: skip
def test_only_float16_is_scaled(dtype, images, slope):
    """What the objective's value is given as gradient: one, as without any scaling, wherever float16 is not in it."""
    seen, net = [], conv_net()

    def victim(v, y):
        value = net(v.float() / 255).float().flatten(1).square().sum(1)
        value.register_hook(lambda g: seen.extend(g.tolist()))
        return value

    attack = OnlineDIFGSM("single", value_range=(0, 255))
    with amp(dtype):
        attack(victim, pixels().to(images), image_ids=[0, 1], epoch=0)
    assert seen == [slope, slope]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            dict(mode="fgsm"),
            r"mode must be one of \['carry', 'iterative', 'single', 'random_sign'\], got 'fgsm'",
        ),
        (dict(objective="logits"), r"objective must be one of \['cls', 'feature'\].*got 'logits'"),
        (dict(eps=-1), "eps must be in 0..255, got -1"),
        (dict(eps=300), "eps must be in 0..255, got 300"),
        (dict(mode="iterative", steps=0), "steps must be an integer >= 1, got 0"),
        (dict(mode="single", steps=10), "spends 1 gradients, got steps=10; write mode='iterative'"),
        (dict(diversity_prob=1.5), "diversity_prob must be in 0..1, got 1.5"),
        (dict(diversity_rate=0), "diversity_rate must be above 0"),
        (dict(objective="feature", random_start=False), "exactly zero gradient at the clean image"),
        (dict(value_range=(0, 1), mean=MEAN, std=STD), "value_range or mean and std, got both"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OnlineDIFGSM(**kwargs)


def test_wrong_calls():
    attack = OnlineDIFGSM("single", value_range=(0, 255))
    x, victim = pixels(), per_image_loss(conv_net())
    with pytest.raises(TypeError, match=r"floating to hold a perturbation, got torch.uint8"):
        attack(victim, x.to(torch.uint8), image_ids=[0, 1], epoch=0)
    with pytest.raises(TypeError, match="one stacked float tensor"):
        attack(victim, list(x), image_ids=[0, 1], epoch=0)
    with pytest.raises(ValueError, match="image_ids and epoch key the draws"):
        attack(victim, x)
    with pytest.raises(ValueError, match="expected 2, got 3"):
        attack(victim, x, image_ids=[0, 1, 2], epoch=0)
    with pytest.raises(ValueError, match="float images must say their scale; found"):
        OnlineDIFGSM("single")(victim, x, image_ids=[0, 1], epoch=0)
    with pytest.raises(ValueError, match="expected values of 0 to 1"):
        OnlineDIFGSM("single", value_range=(0, 1))(victim, x, image_ids=[0, 1], epoch=0)
    with pytest.raises(ValueError, match=r"sizes\[1\] must lie within the batch's 12x14, got 20x14"):
        attack(victim, x, image_ids=[0, 1], epoch=0, sizes=[(12, 14), (20, 14)])
    with pytest.raises(ValueError, match="does not depend on the images"):
        attack(lambda v, y: torch.zeros(2), x, image_ids=[0, 1], epoch=0)
    weight = torch.ones(2, requires_grad=True)
    for dtype in (torch.float32, torch.float16):  # both ways of taking the gradient
        with pytest.raises(ValueError, match="does not depend on the images"):
            attack(lambda v, y, d=dtype: (2 * weight).to(d), x, image_ids=[0, 1], epoch=0)
    with pytest.raises(ValueError, match=r"must be \[N\] = \[2\] or a scalar.*got shape \[3\]"):
        attack(lambda v, y: v.sum().expand(3), x, image_ids=[0, 1], epoch=0)


def test_units_of_the_call_win():
    x = pixels() / 255
    out = OnlineDIFGSM("random_sign")(
        None, x, image_ids=[0, 1], epoch=0, units=PixelUnits(value_range=(0, 1))
    )
    assert float(out.delta.abs().max()) == pytest.approx(8 / 255, abs=1e-7)


def test_seed_none_draws_anew_and_follows_torch_manual_seed():
    attack, x = OnlineDIFGSM("random_sign", value_range=(0, 255), seed=None), pixels()
    torch.manual_seed(0)
    a, b = attack(None, x).delta, attack(None, x).delta
    torch.manual_seed(0)
    assert torch.equal(attack(None, x).delta, a)
    assert not torch.equal(a, b)


def test_strengths_in_the_wrong_unit_are_pointed_out():
    with pytest.warns(UserWarning, match="eps is in 0..255 grey levels, got 0.0313725"):
        OnlineDIFGSM(eps=8 / 255, value_range=(0, 1))
    with pytest.raises(
        ValueError, match=r"std=\(0.229, 0.224, 0.225\), which looks like 0..1; write them times 255"
    ):
        OnlineDIFGSM(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def test_a_victim_that_draws_is_told_whose_draws_they_are():
    """``keyed_cls_loss`` goes before ``cls_loss`` and gets seed, epoch, ids and the step, with the step's own view."""
    seen = []

    class Drawing:
        def cls_loss(self, images, targets):
            raise AssertionError("keyed_cls_loss goes first")

        def keyed_cls_loss(self, batch):
            seen.append((batch.seed, batch.epoch, list(batch.image_ids), batch.step, list(batch.sizes)))
            assert batch.images.shape == batch.clean.shape
            return batch.images.flatten(1).sum(1)

    attack = OnlineDIFGSM("iterative", steps=3, seed=5, value_range=(0, 255))
    attack(Drawing(), pixels(), image_ids=[7, "a"], epoch=4)
    assert seen == [(5, 4, [7, stable_id("a")], step, [(12, 14)] * 2) for step in range(3)]
