"""Values of an independent float64 implementation, given to nine or ten digits in the specification."""

from __future__ import annotations

import pytest

from ikd_fast.kernels import channel_kl, fgd_attention, fgd_masks
from ikd_fast.losses import AdvFeatureLoss, FGDLoss
from tests.losses.published import golden_context, golden_maps

# Half a unit of the last printed digit, relative to values near 1.
PRINTED = 1e-8


@pytest.mark.parametrize(
    ("form", "tau", "expected"),
    [
        ("sum_per_image", 1.0, 11.796087766),
        ("l1", 1.0, 41.985340190),
        ("norm", 1.0, 4.857177733),
        ("norm_per_image", 1.0, 3.434535773),
        ("mean", 1.0, 11.796087766 / (4 * 6 * 8)),
        ("cwd", 1.0, 0.0238854130),
        ("cwd", 4.0, 0.0285187677),
    ],
)
def test_adversarial_feature_loss(form: str, tau: float, expected: float) -> None:
    s, t = golden_maps()
    loss = AdvFeatureLoss(form=form, tau=tau)
    assert float(loss([s], [t], golden_context())["0"]) == pytest.approx(expected, rel=PRINTED)
    weighted = AdvFeatureLoss(form=form, tau=tau, weight=2.5)
    assert float(weighted([s], [t], golden_context())["0"]) == pytest.approx(2.5 * expected, rel=PRINTED)


def test_channel_kl_is_cross_entropy_less_the_teachers_entropy() -> None:
    s, t = golden_maps()
    for tau, cross_entropy in ((1.0, 3.6872566843), (4.0, 61.7214128133)):
        p = (t / tau).flatten(2).softmax(-1)
        entropy = -(p * p.log()).sum() * tau**2 / 8
        kl = channel_kl([s], [t], tau).sum() * tau**2 / 8
        assert float(kl + entropy) == pytest.approx(cross_entropy, rel=PRINTED)


def test_fgd_attention() -> None:
    _, t = golden_maps()
    spatial, channel = fgd_attention(t, 0.5)
    assert spatial[0, 0, :3].tolist() == pytest.approx([0.768322757, 0.883667789, 1.053927224], rel=PRINTED)
    assert channel[0].tolist() == pytest.approx([1.01674863, 0.95628766, 1.05412382, 0.97283989], rel=PRINTED)


def test_fgd_masks() -> None:
    ctx = golden_context()
    [(foreground, background)] = fgd_masks(ctx.boxes, ctx.image_sizes, [(6, 8)])
    assert (foreground > 0).sum((1, 2)).tolist() == [38, 9]
    assert (background > 0).sum((1, 2)).tolist() == [10, 39]
    assert foreground.sum((1, 2)).tolist() == pytest.approx([1.61111111, 1.0], abs=1e-6)
    assert background.sum((1, 2)).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert foreground[0, 0, 0] == 1 / 16
    # Box 2 lies over cells 3..8 by 1..6; column 8 and row 6 are outside, its area is 36 all the same.
    assert foreground[0, 5, 7].item() == pytest.approx(1 / 36)
    assert foreground[1, 1:4, 2:5].unique().tolist() == pytest.approx([1 / 9])


def test_fgd_terms_and_total() -> None:
    s, t = golden_maps()
    ctx = golden_context()
    loss = FGDLoss(preset="retinanet", channels=4, num_levels=1).double()
    terms = loss.terms([s], [t], ctx)["0"]
    # Masks are float32 (1/area of a float32 box): 6e-8 relative.
    expected = {"fg": 0.31150004, "bg": 0.26016284, "mask": 4.81309811, "rela": 11.79608777}
    for key, value in expected.items():
        assert terms[key].item() == pytest.approx(value, rel=5e-8), key
    assert loss([s], [t], ctx)["0"].item() == pytest.approx(0.00290711096, rel=5e-8)
