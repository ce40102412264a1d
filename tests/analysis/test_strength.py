"""Strength rows against hand-computed values on a linear victim."""

from __future__ import annotations

import pytest
import torch

from ikd_fast import OnlineDIFGSM, PixelUnits
from ikd_fast.analysis import attack_strength, strength_table


class Linear:
    """Features 2x, class loss mean of x: every number of a row has a closed form."""

    def features(self, images):
        return [2 * images, images[..., ::2, ::2]]

    def cls_loss(self, images, targets):
        return images.flatten(1).mean(1)


def rows_of(attacks, value=100.0, evaluate=None):
    x = torch.full((2, 3, 8, 8), value)
    batches = lambda: [(x, None, [0, 1]), (x[:1], None, [2])]  # noqa: E731
    return attack_strength(
        Linear(), batches, attacks, units=PixelUnits(value_range=(0, 255)), evaluate=evaluate
    )


def test_rows_of_a_linear_victim():
    attacks = {
        "control": OnlineDIFGSM("random_sign"),
        "single": OnlineDIFGSM("single"),
        "iterative": OnlineDIFGSM("iterative", diversity_prob=0),
    }
    clean, control, single, iterative = rows_of(attacks)
    assert (clean.name, clean.class_loss, clean.feature_change, clean.linf, clean.gradient_evals) == (
        "clean",
        100,
        0,
        0,
        0,
    )
    # The gradient is positive everywhere: five steps of 2 reach +8, and so does one of 16 from anywhere in U(-8, 8).
    assert iterative.class_loss == pytest.approx(108)
    assert iterative.feature_change == pytest.approx(0.08)
    assert (iterative.linf, iterative.mean_abs, iterative.gradient_evals) == (8, 8, 5)
    assert single.class_loss == pytest.approx(108)
    assert single.gradient_evals == 1
    # Random signs: mean 0 over 192 values an image, standard error 8 / sqrt(192) = 0.58.
    assert control.class_loss == pytest.approx(100, abs=1.8)
    assert (control.linf, control.mean_abs, control.gradient_evals) == (8, 8, 0)
    assert all(row.seconds >= 0 for row in (clean, control, single, iterative))


def test_evaluate_sees_the_perturbed_images_in_order():
    seen = []

    def evaluate(perturbed):
        images = list(perturbed)
        seen.append([tuple(x.shape) for x in images])
        return {"top": float(max(x.max() for x in images))}

    clean, control, attacked = rows_of({"up": OnlineDIFGSM("iterative", diversity_prob=0)}, evaluate=evaluate)
    assert seen == [[(2, 3, 8, 8), (1, 3, 8, 8)]] * 3
    assert control.name == "random sign, eps 8"  # added, since none was asked for
    assert (clean.metrics, attacked.metrics) == ({"top": 100.0}, {"top": 108.0})
    lines = strength_table([clean, attacked]).splitlines()
    assert lines[0].startswith("| images | class loss | top |")
    assert lines[3].startswith("| up | 108.000 | 108.000 | 0.080 | 8.00 | 8.00 | 5 |")
    assert len({line.count("|") for line in lines}) == 1


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="batches\\(\\) yielded nothing"):
        attack_strength(Linear(), list, {}, units=PixelUnits(value_range=(0, 255)))
