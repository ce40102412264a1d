"""FGD's attentions, masks and sums against hand-computed cells and the published form in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import fgd_attention, fgd_context, fgd_masks, fgd_relation, fgd_sums
from ikd_fast.kernels.ops import fgd as ops
from ikd_fast.kernels.reference import fgd as reference
from ikd_fast.kernels.reference import fgd_masks as masks_module
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
    monkeypatch.setattr(masks_module, "_MASK_BUDGET", 1)
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
FIELDS = ("foreground", "background", "attention", "square", "student_context", "teacher_context", "channel")


def level_sums(s, t, boxes, sizes, ws, wt, tau=0.5, **options) -> tuple[Tensor, ...]:
    """The seven sums of a pyramid of one level."""
    sums = fgd_sums([s], [t], boxes, sizes, [ws], [wt], tau, **options)
    return tuple(getattr(sums, name)[0] for name in FIELDS)


def published_sums(s, t, boxes, sizes, ws, wt, tau) -> tuple[Tensor, ...]:
    """The same sums of float64 maps, every intermediate map made."""
    n, _, h, w = s.shape
    foreground, background = published.masks(boxes, sizes, h, w)
    (spatial_s, channel_s), (spatial_t, channel_t) = (published.attention(x, tau) for x in (s, t))
    d2 = (s - t).square() * spatial_t.detach()[:, None] * channel_t.detach()[..., None, None]
    shares = [
        (x * v[None, :, None, None]).sum(1).flatten(1).softmax(1).view(n, 1, h, w)
        for x, v in ((s, ws), (t, wt))
    ]
    return (
        (d2 * foreground[:, None]).sum((1, 2, 3)),
        (d2 * background[:, None]).sum((1, 2, 3)),
        (channel_s - channel_t).abs().sum(1) + (spatial_s - spatial_t).abs().sum((1, 2)),
        (s - t).square().sum((1, 2, 3)),
        (s * shares[0]).sum((2, 3)),
        (t * shares[1]).sum((2, 3)),
        (s - t).sum((2, 3)),
    )


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
    got = level_sums(mine[0], t, boxes, sizes, *mine[1:], 0.7)
    truth = [x.detach().double().requires_grad_() for x in mine]
    S, T = truth[0], t.double()
    want = published_sums(S, T, boxes, sizes, *truth[1:], 0.7)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in want]
    # Areas of boxes are float32 whatever the maps: weights are good to 2^-24.
    value = max(TOLERANCES[dtype].value, 2e-7)
    for name, a, b in zip(FIELDS, got, want, strict=True):
        assert a.dtype == work
        # Sums of signed terms are compared on the scale of what was summed.
        scale = float(((S - T).abs().sum((2, 3)) if name == "channel" else b.abs()).detach().max())
        if name == "attention":
            scale = max(scale, float(c + h * w))
        assert float((a.detach().double() - b.detach()).abs().max()) <= value * scale, name
    torch.autograd.backward(got, [u.to(work) for u in upstream])
    torch.autograd.backward(want, upstream)
    gradient = max(TOLERANCES[dtype].gradient, 1e-6)
    for name, a, b in zip(("student", "student weight", "teacher weight"), mine, truth, strict=True):
        assert a.grad.dtype == a.dtype
        if h * w == 1 and name != "student":
            assert a.grad.abs().max() == 0  # a softmax over one position
        else:
            # A weight's gradient is made of small differences of scores: rounding is that of the scores.
            of_weights = 1e-4 if name != "student" and work == torch.float32 else 0.0
            assert_near(a.grad, b.grad, max(gradient, of_weights), name)


def problem(shapes=((2, 3, 2, 3), (2, 4, 1, 1)), dtype=torch.float64, seed=6):
    """Student, teacher, boxes, sizes and weights of a pyramid; the first and the last two groups require gradients."""
    g = torch.Generator().manual_seed(seed)
    s, t = ([torch.randn(x, generator=g, dtype=dtype) for x in shapes] for _ in range(2))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    ws, wt = ([torch.randn(x[1], generator=g, dtype=work) for x in shapes] for _ in range(2))
    for x in (*s, *ws, *wt):
        x.requires_grad_()
    return (
        s,
        t,
        [random_boxes(3, 40, 40, seed=i) for i in range(shapes[0][0])],
        [(40, 40)] * shapes[0][0],
        ws,
        wt,
    )


def flat(function, s, t, boxes, sizes, ws, wt):
    """``function`` of its differentiable tensors alone."""
    k = len(s)
    return lambda *x: tuple(function(x[:k], t, boxes, sizes, x[k : 2 * k], x[2 * k :])[:2]), (*s, *ws, *wt)


def test_gradcheck() -> None:
    function, tensors = flat(fgd_sums, *problem())
    gradcheck(function, *tensors)


@pytest.mark.slow
def test_compiled_equals_eager_in_values_and_gradients() -> None:
    function, tensors = flat(fgd_sums, *problem(dtype=torch.float32))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = [torch.randn_like(x) for x in function(*tensors)]
    for a, b in zip(function(*tensors), compiled(*tensors), strict=True):
        assert torch.equal(a, b)
    grads = (torch.autograd.grad(f(*tensors), tensors, upstream) for f in (function, compiled))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operations_are_registered_soundly() -> None:
    s, t, boxes, sizes, ws, wt = problem(dtype=torch.float32)
    counts = [len(b) for b in boxes]
    torch.library.opcheck(
        ops._op, (s, t, ws, wt, torch.cat(boxes), counts, [v for size in sizes for v in size], 0.5, "auto")
    )
    with torch.no_grad():
        out = ops._op(s, t, ws, wt, torch.cat(boxes), counts, [40] * 4, 0.5, "auto")
        arguments = (*(torch.ones_like(x) for x in out[:2]), s, t, ws, wt, *out[1:], 0.5, "auto")
        torch.library.opcheck(ops._op_backward, arguments)


def test_a_second_derivative_is_refused() -> None:
    function, tensors = flat(fgd_sums, *problem())
    (grad,) = torch.autograd.grad(function(*tensors)[0].sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    s, t, boxes, sizes, ws, wt = problem()
    s = [x.detach() for x in s]
    sums = fgd_sums(s, t, boxes, sizes, ws, wt)
    sums.vectors.square().sum().backward()
    assert all(x.grad is None for x in (*s, *t))
    assert ws[0].grad.abs().max() > 0
    assert not fgd_sums(
        s, t, boxes, sizes, [w.detach() for w in ws], [w.detach() for w in wt]
    ).terms.requires_grad


def test_levels_and_images_do_not_mix() -> None:
    s, t, boxes, sizes, ws, wt = problem(((2, 5, 6, 7), (2, 3, 4, 4)))
    whole = fgd_sums(s, t, boxes, sizes, ws, wt)
    for i in range(2):
        for level in range(2):
            one = fgd_sums(
                [s[level][i : i + 1]], [t[level][i : i + 1]], boxes[i : i + 1], sizes[:1], ws[level : level + 1],
                wt[level : level + 1],
            )  # fmt: skip
            for name in FIELDS:
                assert torch.equal(getattr(whole, name)[level][i], getattr(one, name)[0][0]), (name, level, i)


@pytest.mark.parametrize("budget", [1, 1000])
def test_blocks_of_positions_change_rounding_alone(monkeypatch, budget) -> None:
    results = []
    for value in (reference._BLOCK_BUDGET, budget):
        monkeypatch.setattr(reference, "_BLOCK_BUDGET", value)
        function, tensors = flat(fgd_sums, *problem(((2, 5, 20, 31),)))
        out = function(*tensors)
        results.append((*out, *torch.autograd.grad([x.sum() for x in out], tensors)))
    for a, b in zip(*results, strict=True):
        assert_near(a.detach(), b.detach(), 1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape) -> None:
    n, c = shape[:2]
    s, w = torch.zeros(shape, requires_grad=True), torch.ones(c)
    sums = fgd_sums([s], [torch.zeros(shape)], [torch.zeros(0, 4)] * n, [(8, 8)] * n, [w], [w])
    assert torch.equal(sums.terms, torch.zeros(4, 1, n))
    assert torch.equal(sums.vectors, torch.zeros(3, n * c))
    (sums.terms.sum() + sums.vectors.sum()).backward()
    assert s.grad.shape == shape


def test_a_bad_box_makes_its_images_foreground_nan_and_nothing_else() -> None:
    s, t, boxes, sizes, ws, wt = problem(((2, 3, 5, 6),), dtype=torch.float32)
    boxes[0][1, 2] = float("nan")
    sums = fgd_sums(s, t, boxes, sizes, ws, wt)
    assert torch.equal(sums.foreground.isnan(), torch.tensor([[True, False]]))
    assert sums.terms[1:].isfinite().all()
    assert sums.vectors.isfinite().all()


def test_teacher_may_be_of_another_dtype() -> None:
    for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        s, t, boxes, sizes, ws, wt = problem(((2, 3, 5, 6),), dtype=torch.float64)
        ws, wt = ([x.detach() for x in w] for w in (ws, wt))
        mine, fixed = [x.detach().to(student).requires_grad_() for x in s], [x.to(teacher) for x in t]
        got = fgd_sums(mine, fixed, boxes, sizes, ws, wt)
        want = fgd_sums([x.double() for x in mine], [x.double() for x in fixed], boxes, sizes, ws, wt)
        assert_value(got.terms, want.terms, torch.float32)
        got.terms.sum().backward()
        assert mine[0].grad.dtype == student


def test_relation_equals_the_materialised_maps() -> None:
    g = torch.Generator().manual_seed(5)
    s, t = (torch.randn(2, 6, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    add_s, add_t = (torch.randn(2, 6, generator=g, dtype=torch.float64) for _ in range(2))
    w = torch.zeros(6, dtype=torch.float64)
    sums = fgd_sums([s], [t], [torch.zeros(0, 4)] * 2, [(8, 8)] * 2, [w], [w])
    want = ((s + add_s[..., None, None]) - (t + add_t[..., None, None])).square().sum((1, 2, 3))
    assert_value(fgd_relation(sums.square[0], sums.channel[0], add_s - add_t, 20), want, torch.float64)


def test_context_of_equal_scores_is_the_mean() -> None:
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    assert_value(fgd_context(x, torch.zeros(5, dtype=torch.float64)), x.mean((2, 3)), torch.float64)


def test_autocast_changes_nothing() -> None:
    results = []
    for enabled in (False, True):
        function, tensors = flat(fgd_sums, *problem(((2, 16, 9, 11),), dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = function(*tensors)
            results.append((*out, *torch.autograd.grad([x.sum() for x in out], tensors)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_layouts(layout) -> None:
    def laid_out(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.detach().to(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.detach().mT.contiguous().mT
        wide = x.new_zeros(*x.shape[:3], 2 * x.shape[3])
        wide[..., ::2] = x.detach()
        return wide[..., ::2]

    args = problem(((2, 16, 9, 11),), dtype=torch.float32)
    function, tensors = flat(fgd_sums, *args)
    want = torch.autograd.grad([x.square().sum() for x in function(*tensors)], tensors)
    s, t = [laid_out(args[0][0]).requires_grad_()], [laid_out(args[1][0])]
    function, tensors = flat(fgd_sums, s, t, *args[2:])
    got = torch.autograd.grad([x.square().sum() for x in function(*tensors)], tensors)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 2e-5)
    if layout != "strided":
        assert got[0].stride() == s[0].stride()


def test_sum_errors() -> None:
    x, w, none = torch.zeros(1, 4, 2, 2), torch.zeros(4), [torch.zeros(0, 4)]

    def call(s=(x,), t=(x,), boxes=none, sizes=((8, 8),), ws=(w,), wt=(w,), tau=0.5, **options):
        return fgd_sums(s, t, boxes, sizes, ws, wt, tau, **options)

    for changes, message in [
        ({"tau": 0.0}, "temperature must be a finite number > 0, got 0"),
        ({"wt": (w, w)}, "expected teacher_weight for 1 levels, got 2"),
        (
            {"ws": (torch.zeros(3),)},
            r"level 0: expected a floating-point student_weight \[4\] on cpu, got .* \(3,\)",
        ),
        ({"t": (x.clone().requires_grad_(),)}, r"map\.detach\(\)"),
        (
            {"t": (torch.zeros(1, 4, 2, 3),)},
            r"equal shape, got student \(1, 4, 2, 2\) and teacher \(1, 4, 2, 3\)",
        ),
        ({"boxes": []}, "boxes and a size for each of 1 images, got 0 and 1"),
        ({"boxes": [torch.zeros(4)]}, r"image 0: expected boxes \[n,4\] xyxy, got \(4,\)"),
        ({"boxes": [torch.zeros(1, 4, device="meta")]}, "image 0: expected boxes on cpu, got meta"),
        ({"sizes": [(0, 8)]}, r"image 0: expected a size \(h, w\) >= 1, got \(0, 8\)"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'reference', got 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**changes)
    with pytest.raises(TypeError, match="expected a floating-point student map .* got torch.int64"):
        call(s=(x.long(),))
