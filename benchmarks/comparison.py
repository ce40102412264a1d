"""Which side of a comparison a benchmark is, and checks that the sides do the same work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# A time budget instead of a number of rounds: slow and fast sides get comparable attention. The first calls are not timed.
TIMED = {"min_rounds": 7, "max_time": 1.0, "min_time": 1e-4, "warmup": True, "warmup_iterations": 2}


def label(
    benchmark: Any,
    group: str,
    side: str,
    *,
    peer: bool = False,
    targets: Mapping[str, float] | None = None,
    **notes: float | str,
) -> None:
    """Name this benchmark in the report.

    Args:
        group: the work; sides of one group are compared with each other.
        side: who does it.
        peer: what ours are compared with: each of ours in the group with each peer.
        targets: of ours: peer -> how many times as fast this side is meant to be.
        notes: further facts kept with the figures.
    """
    benchmark.group = group
    benchmark.extra_info.update(
        side=side, role="peer" if peer else "ours", targets=dict(targets or {}), **notes
    )


def assert_same(sides: Mapping[str, Tensor], *, atol: float, share: float = 1.0) -> None:
    """All sides have one shape, and at least ``share`` of their values lie within ``atol`` of the first side's."""
    (first, wanted), *others = sides.items()
    for name, value in others:
        assert value.shape == wanted.shape, (
            f"{name}: expected {list(wanted.shape)} as {first}, got {list(value.shape)}"
        )
        error = (value.double() - wanted.double()).abs()
        within = (error <= atol).double().mean().item()
        assert within >= share, (
            f"{name}: {within:.4%} of the values are within {atol:g} of {first}'s, expected {share:.4%}; "
            f"largest difference {error.max().item():g}"
        )


def assert_noise(noise: Tensor, sigma: float, bias: float = 0.1, slack: float = 0.01) -> None:
    """``noise`` ``[C, H, W]``, a million values or more, has mean 0 within ``bias``, a standard deviation of ``sigma``
    within the share ``slack``, and no correlation between neighbours.

    The default bounds and a correlation of 0.01 are five and more standard errors away for sigma = 20.4.
    """
    noise = noise.double()
    mean, std = noise.mean().item(), noise.std().item()
    assert abs(mean) <= bias, f"mean of the noise: expected within {bias:g} of 0, got {mean:g}"
    assert abs(std - sigma) <= slack * sigma, (
        f"sigma of the noise: expected {sigma:g} within {slack:.1%}, got {std:g}"
    )
    unit = (noise - mean) / std
    neighbours = {
        "pixels": (unit[:, :, 1:] * unit[:, :, :-1]).mean().item(),
        "rows": (unit[:, 1:] * unit[:, :-1]).mean().item(),
        "channels": (unit[1:] * unit[:-1]).mean().item(),
    }
    for name, value in neighbours.items():
        assert abs(value) < 0.01, f"neighbouring {name} of the noise are correlated: {value:g}"
