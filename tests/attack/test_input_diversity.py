"""Input diversity: pixels against torch's resize, boxes against pixels, gradient against the adjoint."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ikd_fast.attack import DiversityDraw, draw_diversity
from ikd_fast.kernels import input_diversity
from ikd_fast.kernels.reference.philox import Stream, draw


@pytest.mark.parametrize(
    ("frame", "window"),
    [
        ((24, 32), (3, 2, 28, 21)),
        ((24, 32), (0, 0, 31, 23)),
        ((17, 19), (1, 4, 15, 13)),
        ((24, 32), (31, 23, 1, 1)),
    ],
)
def test_pixels_equal_interpolate(frame, window):
    x = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (h, w), (x0, y0, nw, nh) = frame, window
    out = input_diversity(x, torch.tensor([frame]), torch.tensor([window]), torch.tensor(0.25))
    expected = x.clone()
    expected[..., :h, :w] = 0.25
    resized = F.interpolate(x[..., :h, :w], size=(nh, nw), mode="bilinear", align_corners=False)
    expected[..., y0 : y0 + nh, x0 : x0 + nw] = resized
    # Same formula in float64; grid_sample normalises coordinates on the way: a few 1e-15 of a pixel, times 24.
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_whole_frame_is_left_bit_for_bit():
    x = torch.rand(3, 3, 9, 11)
    view = DiversityDraw(((9, 11), (8, 7), (9, 11)), ((0, 0, 11, 9), (0, 0, 7, 8), (1, 1, 9, 7)))
    out = view.images(x, torch.zeros(()))
    assert view.active == [2]
    assert torch.equal(out[:2], x[:2])
    assert not torch.equal(out[2], x[2])


def test_adjoint_by_gradcheck():
    x = torch.rand(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    frames, windows = torch.tensor([[6, 7], [5, 6]]), torch.tensor([[1, 0, 5, 5], [0, 1, 6, 4]])
    assert torch.autograd.gradcheck(
        lambda v: input_diversity(v, frames, windows, torch.zeros(())), (x,), atol=1e-9
    )
    # Linear map: <T x, y> = <x, T' y> with fill 0.
    y = torch.rand(2, 2, 6, 7, dtype=torch.float64)
    out = input_diversity(x, frames, windows, torch.zeros(()))
    (adjoint,) = torch.autograd.grad(out, x, y)
    assert float((out * y).sum()) == pytest.approx(float((x * adjoint).sum()), rel=1e-12)


def test_boxes_move_with_pixels():
    """A bright rectangle and its box stay together: the box of the moved pixels is the moved box."""
    x = torch.zeros(1, 1, 64, 96)
    x[..., 10:30, 20:60] = 1
    view = DiversityDraw(((64, 96),), ((5, 3, 48, 32),))
    moved = view.images(x, torch.zeros(()))
    (target,) = view.targets([dict(boxes=torch.tensor([[20.0, 10.0, 60.0, 30.0]]), labels=torch.tensor([0]))])
    assert target["boxes"].tolist() == [[15.0, 8.0, 35.0, 18.0]]
    ys, xs = torch.nonzero(moved[0, 0] > 0.5, as_tuple=True)
    assert [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] == [15, 8, 35, 18]


def test_draws_by_hand_and_their_range():
    sizes, ids = [(100, 200)] * 200, list(range(200))
    view = draw_diversity(sizes, ids, step=2, epoch=1, seed=3, prob=0.5, rate=0.9)
    gate, u, oy, ox = draw(3, 0, 1, Stream.DIVERSITY, 2)
    if gate < 0.5:
        w, h = int((0.9 + 0.1 * u) * 200 + 0.5), int((0.9 + 0.1 * u) * 100 + 0.5)
        assert view.windows[0] == (int(ox * (201 - w)), int(oy * (101 - h)), w, h)
    else:
        assert view.windows[0] == (0, 0, 200, 100)
    active = [view.windows[i] for i in view.active]
    # Binomial(200, 0.5): 4 sigma is 28.
    assert 72 <= len(active) <= 128
    for x0, y0, w, h in active:
        assert 180 <= w <= 200
        assert abs(h / w - 0.5) <= 0.5 / w + 0.5 / w
        assert 0 <= x0 <= 200 - w
        assert 0 <= y0 <= 100 - h
    assert len({w for *_, w, _ in active}) > 10


def test_one_draw_per_batch_when_asked():
    view = draw_diversity(
        [(100, 200)] * 4, [7, 8, 9, 10], step=0, epoch=0, seed=0, prob=1.0, rate=0.5, per_batch=True
    )
    assert len(set(view.windows)) == 1
    other = draw_diversity([(100, 200)] * 4, [7, 8, 9, 10], step=0, epoch=0, seed=0, prob=1.0, rate=0.5)
    assert len(set(other.windows)) == 4


def test_other_targets_pass_through():
    view = DiversityDraw(((8, 8),), ((1, 1, 4, 4),))
    labels = torch.tensor([3])
    assert view.targets(labels) is labels
    assert view.targets([{"size": (8, 8)}]) == [{"size": (8, 8)}]
