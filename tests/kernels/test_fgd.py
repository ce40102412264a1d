"""FGD's attentions, masks and sums against hand-computed cells and the published form in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import fgd_attention, fgd_context, fgd_masks, fgd_relation, fgd_sums
from ikd_fast.kernels.reference import fgd as module
from tests.losses import published
from tests.tolerances import DTYPES, TOLERANCES, assert_near, assert_value, gradcheck


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_boxes(count: int, height: int, width: int, seed: int) -> Tensor:
    """Boxes of all sizes, some across the border and some of no area."""
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height, width, height])
    a, b = (torch.rand(count, 2, generator=g) * 1.2 - 0.1 for _ in range(2))
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1) * size
    boxes[1::5, 2:] = boxes[1::5, :2]
    return boxes


def cells(boxes: list[list[float]], size=(64, 64), hw=(8, 8)) -> Tensor:
    [(foreground, _)] = fgd_masks([torch.tensor(boxes).reshape(-1, 4)], [size], [hw])
    return foreground[0]


def filled(*spans: tuple[int, int, int, int, float]) -> Tensor:
    """An 8x8 map with ``weight`` on rows y0..y1 and columns x0..x1, both included, of every span."""
    out = torch.zeros(8, 8)
    for y0, y1, x0, x1, weight in spans:
        out[y0 : y1 + 1, x0 : x1 + 1] = weight
    return out


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        pytest.param([], filled(), id="none"),
        # Edges on cell borders: the end cell is included, 3 x 3 for a box two cells wide.
        pytest.param([[8, 16, 24, 32]], filled((2, 4, 1, 3, 1 / 9)), id="aligned"),
        pytest.param([[9, 17, 23, 31]], filled((2, 4, 1, 3, 1 / 9)), id="inside"),
        # No area: a point on a cell border covers one cell, elsewhere floor..ceil, 2 x 2.
        pytest.param([[16, 16, 16, 16]], filled((2, 2, 2, 2, 1.0)), id="point"),
        pytest.param([[12, 12, 12, 12]], filled((1, 2, 1, 2, 1 / 4)), id="point between"),
        # Up to the border: cell 8 does not exist, but counts in the area.
        pytest.param([[48, 48, 64, 64]], filled((6, 7, 6, 7, 1 / 9)), id="touches border"),
        pytest.param([[0, 0, 64, 64]], filled((0, 7, 0, 7, 1 / 81)), id="whole"),
        # Across the border: unclipped area (-2..2 is 5 wide), no wrap-around of the negative start.
        pytest.param([[-16, -16, 16, 16]], filled((0, 2, 0, 2, 1 / 25)), id="negative start"),
        pytest.param([[-40, 8, -16, 24]], filled(), id="outside left"),
        pytest.param([[72, 72, 90, 90]], filled(), id="outside right"),
        # Overlap: the smallest box stands whatever the order.
        pytest.param(
            [[8, 8, 24, 24], [0, 0, 40, 40]], filled((0, 5, 0, 5, 1 / 36), (1, 3, 1, 3, 1 / 9)), id="overlap"
        ),
        pytest.param(
            [[0, 0, 40, 40], [8, 8, 24, 24]], filled((0, 5, 0, 5, 1 / 36), (1, 3, 1, 3, 1 / 9)), id="reversed"
        ),
    ],
)
def test_mask_cells_by_hand(boxes, expected) -> None:
    assert torch.equal(cells(boxes), expected)


def test_padded_image_stretches_boxes_as_published() -> None:
    # An image of 48x32 in an input padded to 64x64, map 8x8. Published: x / 32 * 8, y / 48 * 8.
    box = [torch.tensor([[8.0, 12.0, 16.0, 24.0]])]
    [(stretched, _)] = fgd_masks(box, [(48, 32)], [(8, 8)])
    assert torch.equal(stretched[0], filled((2, 4, 2, 4, 1 / 9)))
    [(placed, _)] = fgd_masks(box, [(64, 64)], [(8, 8)])  # x / 64 * 8: columns 1..2, rows 1..3
    assert torch.equal(placed[0], filled((1, 3, 1, 2, 1 / 6)))


def test_background_weights() -> None:
    boxes = [
        torch.zeros(0, 4),
        torch.tensor([[8.0, 16.0, 24.0, 32.0]]),
        torch.tensor([[0.0, 0.0, 64.0, 64.0]]),
    ]
    [(_, background)] = fgd_masks(boxes, [(64, 64)] * 3, [(8, 8)])
    assert torch.equal(background[0], torch.full((8, 8), 1 / 64))
    assert background[1].unique().tolist() == pytest.approx([0.0, 1 / 55])
    assert torch.equal(background[2], torch.zeros(8, 8))


@pytest.mark.parametrize("count", [0, 1, 20, 300])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (13, 7), (25, 42)])
def test_masks_equal_the_loop_over_boxes(count, height, width) -> None:
    sizes = [(97, 131), (80, 131), (97, 100)]
    boxes = [
        random_boxes(count, *sizes[0], seed=1),
        random_boxes(count // 2, *sizes[1], seed=2),
        torch.zeros(0, 4),
    ]
    [mine] = fgd_masks(boxes, sizes, [(height, width)])
    for got, want in zip(mine, published.masks(boxes, sizes, height, width), strict=True):
        assert_value(got, want, torch.float32) if want.any() else assert_near(got, want, 0.0)


def test_chunks_over_boxes_change_nothing(monkeypatch) -> None:
    boxes = [random_boxes(50, 90, 120, seed=3), random_boxes(7, 90, 120, seed=4)]
    whole = fgd_masks(boxes, [(90, 120)] * 2, [(12, 15), (6, 8)])
    monkeypatch.setattr(module, "_MASK_BUDGET", 1)
    for a, b in zip(whole, fgd_masks(boxes, [(90, 120)] * 2, [(12, 15), (6, 8)]), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    "bad", [[float("nan"), 0, 8, 8], [0, 0, float("inf"), 8], [24, 8, 8, 24], [8, 24, 24, 8]]
)
def test_a_bad_box_shows_as_nan_in_its_image_alone(bad) -> None:
    good = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    [(foreground, _)] = fgd_masks([torch.cat([good, torch.tensor([bad])]), good], [(64, 64)] * 2, [(8, 8)])
    assert foreground[0].isnan().any()
    assert foreground[1].isfinite().all()


def test_mask_errors() -> None:
    with pytest.raises(ValueError, match="one image size for each of the 1 box lists, got 2"):
        fgd_masks([torch.zeros(0, 4)], [(8, 8)] * 2, [(2, 2)])
    with pytest.raises(ValueError, match=r"boxes must be \[n, 4\]"):
        fgd_masks([torch.zeros(4)], [(8, 8)], [(2, 2)])
    with pytest.raises(ValueError, match=r"sizes .* must be >= 1"):
        fgd_masks([torch.zeros(0, 4)], [(0, 8)], [(2, 2)])


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 5, 7, 3), (3, 63, 13, 9)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(shape, dtype) -> None:
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    for got, want in zip(fgd_attention(x, 0.5), published.attention(x.double(), 0.5), strict=True):
        assert_value(got, want, dtype)
        per_image = got.flatten(1).double().mean(1)
        assert_near(per_image, torch.ones_like(per_image), TOLERANCES[dtype].value)


SHAPES = [(1, 2, 1, 1), (2, 4, 6, 8), (2, 60, 13, 9), (3, 33, 7, 20)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_gradients(shape, count, dtype) -> None:
    n, c, h, w = shape
    g = torch.Generator().manual_seed(c + count)
    s, t = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    ws, wt = (torch.randn(c, generator=g, dtype=torch.float64) for _ in range(2))
    boxes, sizes = [random_boxes(count, 100, 120, seed=i) for i in range(n)], [(100, 120)] * n

    work = torch.float64 if dtype == torch.float64 else torch.float32
    mine = [s.clone().requires_grad_(), ws.to(work).requires_grad_(), wt.to(work).requires_grad_()]
    [got] = fgd_sums(mine[:1], [t], fgd_masks(boxes, sizes, [(h, w)]), mine[1:2], mine[2:], 0.7)

    truth = [x.detach().double().requires_grad_() for x in mine]
    S, T = truth[0], t.double()
    masks = published.masks(boxes, sizes, h, w)
    spatial, channel = published.attention(T, 0.7)
    spatial_s, channel_s = published.attention(S, 0.7)
    d2 = (S - T).square() * spatial[:, None] * channel[..., None, None]
    shares = [
        (x * v[None, :, None, None]).sum(1).flatten(1).softmax(1).view(n, 1, h, w)
        for x, v in ((S, truth[1]), (T, truth[2]))
    ]
    want = (
        (d2 * masks[0][:, None]).sum(),
        (d2 * masks[1][:, None]).sum(),
        (channel_s - channel).abs().sum() + (spatial_s - spatial).abs().sum(),
        (S * shares[0]).sum((2, 3)),
        (T * shares[1]).sum((2, 3)),
        (S - T).square().sum(),
        (S - T).sum((2, 3)),
    )
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in want]
    # Masks are float32 whatever the maps: their weights are good to 2^-24.
    value = max(TOLERANCES[dtype].value, 2e-7)
    for name, a, b in zip(got._fields, got, want, strict=True):
        # Sums of signed terms are compared on the scale of what was summed.
        scale = float(((S - T).abs().sum((2, 3)) if name == "channel" else b.abs()).detach().max())
        if name == "attention":
            scale = max(scale, float(n * (c + h * w)))
        assert float((a.detach().double() - b.detach()).abs().max()) <= value * scale, name
    torch.autograd.backward(got, [u.to(work) for u in upstream])
    torch.autograd.backward(want, upstream)
    gradient = max(TOLERANCES[dtype].gradient, 1e-6)
    for name, a, b in zip(("student", "student weight", "teacher weight"), mine, truth, strict=True):
        if h * w == 1 and name != "student":
            assert a.grad.abs().max() == 0  # a softmax over one position
        else:
            assert_near(a.grad, b.grad, gradient, name)


def test_relation_equals_the_materialised_maps() -> None:
    g = torch.Generator().manual_seed(5)
    s, t = (torch.randn(2, 6, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    add_s, add_t = (torch.randn(2, 6, generator=g, dtype=torch.float64) for _ in range(2))
    w = torch.zeros(6, dtype=torch.float64)
    [sums] = fgd_sums([s], [t], fgd_masks([torch.zeros(0, 4)] * 2, [(8, 8)] * 2, [(5, 4)]), [w], [w])
    want = ((s + add_s[..., None, None]) - (t + add_t[..., None, None])).square().sum()
    assert_value(fgd_relation(sums, add_s - add_t, 20), want, torch.float64)


def test_context_of_equal_scores_is_the_mean() -> None:
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    assert_value(fgd_context(x, torch.zeros(5, dtype=torch.float64)), x.mean((2, 3)), torch.float64)


def test_gradcheck() -> None:
    g = torch.Generator().manual_seed(6)
    s, t = (torch.randn(2, 3, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    ws, wt = (torch.randn(3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    masks = fgd_masks([random_boxes(3, 40, 40, seed=i) for i in range(2)], [(40, 40)] * 2, [(2, 3)])
    gradcheck(lambda s, ws, wt: tuple(fgd_sums([s], [t], masks, [ws], [wt])[0]), s.requires_grad_(), ws, wt)


def test_autocast_and_layout_change_nothing() -> None:
    g = torch.Generator().manual_seed(7)
    s, t = (torch.randn(2, 16, 9, 11, generator=g) for _ in range(2))
    w = torch.randn(16, generator=g)
    masks = fgd_masks([random_boxes(4, 72, 88, seed=i) for i in range(2)], [(72, 88)] * 2, [(9, 11)])
    want = fgd_sums([s], [t], masks, [w], [w])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(fgd_sums([s], [t], masks, [w], [w])[0], want, strict=True):
            assert torch.equal(a, b)
    last = s.to(memory_format=torch.channels_last), t.to(memory_format=torch.channels_last)
    for a, b in zip(fgd_sums(last[:1], last[1:], masks, [w], [w])[0], want, strict=True):
        assert_near(a, b, 2e-5)


def test_sum_errors() -> None:
    x, w = torch.zeros(1, 4, 2, 2), torch.zeros(4)
    masks = fgd_masks([torch.zeros(0, 4)], [(8, 8)], [(2, 2)])
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 0"):
        fgd_sums([x], [x], masks, [w], [w], 0.0)
    with pytest.raises(ValueError, match="masks and weights for 1 levels"):
        fgd_sums([x], [x], masks, [w], [w, w])
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        fgd_sums([x], [x.clone().requires_grad_()], masks, [w], [w])
