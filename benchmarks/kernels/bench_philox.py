"""Noise for one image of 3x800x1333: keyed by Philox, keyed by a seeded generator, and ``torch.randn`` without keys."""

from __future__ import annotations

import pytest
import torch

from ikd_fast.kernels.reference.add_noise import noise_field

SHAPE = (3, 800, 1333)
COUNT = 3 * 800 * 1333
KEY = dict(seed=0, id=42, epoch=3)

FORMS = {
    "keyed_philox": lambda: noise_field(SHAPE, **KEY),
    "keyed_generator": lambda: noise_field(SHAPE, **KEY, rng="torch"),
    "torch_randn": lambda: torch.randn(SHAPE),
}


@pytest.mark.parametrize("form", FORMS)
def test_noise(benchmark, form: str) -> None:
    make = FORMS[form]
    noise = make().double()
    assert tuple(noise.shape) == SHAPE
    # five standard errors of the mean and of the variance of COUNT normals
    assert abs(noise.mean()) < 5 / COUNT**0.5
    assert abs(noise.var() - 1) < 5 * (2 / COUNT) ** 0.5
    if form.startswith("keyed"):
        assert torch.equal(noise, make().double())
    benchmark.group = "standard normals, 3x800x1333, CPU"
    benchmark.pedantic(make, rounds=15, warmup_rounds=3)
