"""sign_step against its formula in float64: per-channel units, padding, pixels beyond the range, NaN, registration, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import sign_step
from ikd_fast.kernels.ops import sign_step as op
from ikd_fast.kernels.reference import sign_step as reference
from tests.tolerances import DTYPES

SHAPE = (3, 3, 11, 19)
FRAMES = torch.tensor([[11, 19], [7, 19], [11, 12]])
# Powers of two and small multiples: exact in every dtype, so that results are equal to the formula's and not only close.
STEP, RADIUS = [0.25, 0.5, 1.0], [0.75, 1.5, 2.0]
LIMITS = {"radius": RADIUS, "low": [-2.0, -1.5, -3.0], "high": [2.0, 2.5, 3.0]}


def values(seed: int, dtype=torch.float32, layout: str = "contiguous") -> Tensor:
    """Multiples of 1/8 up to 4, also beyond every range."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randint(-32, 33, SHAPE, generator=g) / 8).to(dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.zeros(3, 3, 11, 38, dtype=dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def by_formula(delta: Tensor, direction: Tensor | None, images: Tensor, step, frames, moves=None) -> Tensor:
    """Element by element of the docstring, in float64."""
    delta, x = delta.double(), images.double()
    low, high, radius = (
        torch.tensor(LIMITS[k], dtype=torch.float64).view(3, 1, 1) for k in ("low", "high", "radius")
    )
    if direction is not None:
        sign = (direction > 0).double() - (direction < 0).double()
        if moves is not None:
            sign = sign * moves.view(-1, 1, 1, 1)
        delta = delta + torch.tensor(step, dtype=torch.float64).view(-1, 1, 1) * sign
    delta = delta.minimum(radius).maximum(-radius)
    total = (x + delta).maximum(low.minimum(x)).minimum(high.maximum(x)) - x
    for row, (h, w) in zip(total, frames.tolist(), strict=True):
        row[:, h:] = 0
        row[:, :, w:] = 0
    return total


@pytest.mark.parametrize("piece", [1, 100, 1 << 17])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(monkeypatch, dtype, layout, piece) -> None:
    monkeypatch.setattr(reference, "PIECE", piece)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    delta, direction, x = values(0, work, layout), values(1, dtype, layout), values(2, dtype, layout)
    before = delta.clone(), direction.clone(), x.clone()
    out = sign_step(delta, direction, x, STEP, **LIMITS, frames=FRAMES)
    assert out.dtype == work
    assert torch.equal(out.double(), by_formula(delta, direction, x, STEP, FRAMES))
    down = sign_step(delta, direction, x, -1.0, **LIMITS)
    whole = torch.tensor([SHAPE[2:]] * 3)
    assert torch.equal(down.double(), by_formula(delta, direction, x, [-1.0], whole))
    kept = sign_step(delta, None, x, 9.0, **LIMITS, frames=FRAMES)
    assert torch.equal(kept.double(), by_formula(delta, None, x, 0.0, FRAMES))
    assert all(torch.equal(a, b) for a, b in zip(before, (delta, direction, x), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_does_not_move_may_hold_anything(layout) -> None:
    delta, direction, x = (values(i, layout=layout) for i in range(3))
    direction[1] = float("nan")
    direction[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    moves = torch.tensor([True, False, True])
    out = sign_step(delta, direction, x, STEP, **LIMITS, frames=FRAMES, moves=moves)
    assert torch.equal(out.double(), by_formula(delta, direction, x, STEP, FRAMES, moves))
    assert torch.equal(out[1], sign_step(delta, None, x, 0.0, **LIMITS, frames=FRAMES)[1])


def test_a_pixel_beyond_the_range_may_come_back_but_go_no_further() -> None:
    x = torch.tensor([300.0, 300.0, -20.0, -20.0]).view(1, 1, 1, 4)
    d = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 1, 4)
    out = sign_step(torch.zeros_like(x), d, x, 2.0, radius=8, low=0, high=255)
    assert out.flatten().tolist() == [0.0, -2.0, 2.0, 0.0]


def test_opcheck() -> None:
    units = (STEP, RADIUS, LIMITS["low"], LIMITS["high"], "auto")
    for layout in ("contiguous", "channels_last"):
        delta, direction, x = (values(i, layout=layout) for i in range(3))
        torch.library.opcheck(
            op._op, (delta, direction, x, torch.tensor([True, False, True]), FRAMES, *units)
        )
        torch.library.opcheck(op._op, (delta, None, x, None, None, *units))


def test_compiled_equals_eager() -> None:
    def function(delta, direction, x, moves):
        return sign_step(delta * 0.5, direction, x, STEP, **LIMITS, frames=FRAMES, moves=moves) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = (values(0), values(1), values(2), torch.tensor([True, False, True]))
    assert torch.equal(function(*inputs), compiled(*inputs))


def test_an_empty_batch() -> None:
    none = values(0)[:0]
    assert sign_step(none, none, none, 1.0, **LIMITS).shape == (0, *SHAPE[1:])


Z = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": Z.half()}, TypeError, r"delta: expected float32 or float64 .*got torch.float16"),
        ({"delta": Z[0]}, TypeError, r"delta: expected .*\[N, C, H, W\], got torch.float32 \[3, 4, 5\]"),
        ({"direction": Z[:1]}, ValueError, r"direction: expected \[2, 3, 4, 5\] on cpu .*\[1, 3, 4, 5\]"),
        ({"images": Z.to("meta")}, ValueError, r"images: expected .* on cpu as delta, got .* on meta"),
        (
            {"images": Z.double()},
            TypeError,
            r"images: expected .* with a torch.float32 delta, got torch.float64",
        ),
        ({"direction": Z.long()}, TypeError, r"direction: expected .*got torch.int64"),
        (
            {"direction": Z.clone().requires_grad_()},
            ValueError,
            r"direction requires a gradient.*direction.detach",
        ),
        ({"moves": torch.ones(2)}, ValueError, r"moves: expected torch.bool \[2\] on cpu, got torch.float32"),
        ({"moves": torch.ones(3, dtype=torch.bool)}, ValueError, r"moves: .*\[3\]"),
        ({"frames": torch.tensor([[4, 5]])}, ValueError, r"frames: expected torch.int64 \[2, 2\]"),
        ({"frames": torch.tensor([[4, 5], [5, 5]])}, ValueError, r"frames\[1\]: .*4x5, got 5x5"),
        ({"step": float("nan")}, ValueError, r"step: expected a finite number, .*got nan"),
        ({"radius": [1.0, 2.0]}, ValueError, r"radius: .* each of 3 channels, got \[1\.0, 2\.0\]"),
        ({"radius": -1.0}, ValueError, r"channel 0: expected radius >= 0 .*radius=-1\.0"),
        ({"low": [0.0, 2.0, 0.0]}, ValueError, r"channel 1: .*low=2\.0, high=1\.0"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of .* got 'cuda'"),
    ],
)
def test_errors(change, error, message) -> None:
    usual = {"delta": Z, "direction": Z, "images": Z, "step": 1.0, "radius": 1.0, "low": 0.0, "high": 1.0}
    with pytest.raises(error, match=message):
        sign_step(**{**usual, **change})
