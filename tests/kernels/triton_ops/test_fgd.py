"""FGD's kernels against the float64 reference: dtypes, layouts, odd sizes, boxes, extreme values, launches, bytes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import fgd_sums
from ikd_fast.kernels.reference import fgd as reference
from ikd_fast.kernels.triton_ops import fgd as kernels
from ikd_fast.kernels.triton_ops.launch import trace
from tests.tolerances import TOLERANCES, assert_near

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = {
    "one": [(1, 1, 1, 1)],
    "odd": [(2, 3, 5, 7), (2, 19, 11, 13), (2, 5, 1, 1)],  # 143 positions: two programs
    "aligned": [(2, 8, 12, 16), (2, 40, 4, 4)],
}
PAPER = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
LAUNCHES = ["fgd_forward", "fgd_reduce", "fgd_combine"], ["fgd_backward", "fgd_weights"]


class Problem(NamedTuple):
    student: list[Tensor]
    teacher: list[Tensor]
    student_weight: list[Tensor]
    teacher_weight: list[Tensor]
    boxes: Tensor
    counts: list[int]
    sizes: list[int]
    temperature: float


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        n, c, h, w = x.shape
        wide = x.new_full((n, c + 1, h, 2 * w), 77.0)
        wide[:, 1:, :, ::2] = x
        return wide[:, 1:, :, ::2]
    return x


def random_boxes(count: int, g: torch.Generator) -> Tensor:
    """In an image of 96x120; some across its border, some of no area."""
    a, b = (torch.rand(count, 2, generator=g) * 1.2 - 0.1 for _ in range(2))
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1) * torch.tensor([120.0, 96, 120, 96])
    boxes[1::5, 2:] = boxes[1::5, :2]
    return boxes


def problem(
    shapes, dtype, device, layouts=("contiguous", "contiguous"), counts=(3, 0), scale=1.0, tau=0.7
) -> Problem:
    g = torch.Generator().manual_seed(0)
    maps = [
        [laid_out((scale * torch.randn(x, generator=g)).to(device, dtype), layout) for x in shapes]
        for layout in layouts
    ]
    weights = [[torch.randn(x[1], generator=g).to(device) / scale for x in shapes] for _ in range(2)]
    counts = list(counts[: shapes[0][0]])
    boxes = torch.cat([random_boxes(count, g) for count in (0, *counts)]).to(device)
    return Problem(*maps, *weights, boxes, counts, [96, 120, 90, 100][: 2 * len(counts)], tau)


def in_double(p: Problem) -> Problem:
    return Problem(*([x.double() for x in group] for group in p[:4]), *p[4:])


def run(room, p: Problem, upstream=None):
    out = room.forward(*p)
    if upstream is None:
        g = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=g).to(x.device) for x in out[:2]]
    upstream = [x.to(out[0].dtype) for x in upstream]
    grads, weights = room.backward(*upstream, *p[:4], *out[1:], p.temperature)
    return out, grads, weights


def check(p: Problem, value=2e-6, weight=1e-4) -> None:
    (out, grads, weights), (out64, grads64, weights64) = run(kernels, p), run(reference, in_double(p))
    names = ("terms", "vectors", "maps", "factors", "scalars")
    for name, a, b in zip(names, out, out64, strict=True):
        for i, (row, want) in enumerate(zip(a, b, strict=True)):
            # Differences of attentions and of maps: on the scale of what is subtracted.
            floor = (
                1.0 if (name, i) in (("terms", 2), ("vectors", 2), ("factors", 1), ("scalars", 8)) else 0.0
            )
            assert row.shape == want.shape
            error, scale = float((row.double() - want).abs().max()), max(float(want.abs().max()), floor)
            assert error <= value * scale, (name, i, error, scale)
    tolerance = TOLERANCES[p.student[0].dtype].gradient
    for a, b, s in zip(grads, grads64, p.student, strict=True):
        assert a.dtype == s.dtype
        assert_near(a, b, tolerance, "student")
    if any(x.shape[2] * x.shape[3] > 1 for x in p.student):
        # Small differences of scores: rounding is that of the scores.
        assert_near(weights, weights64, weight, "weights")
    else:
        assert torch.equal(weights, torch.zeros_like(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
def test_contiguous(shapes, dtype, device) -> None:
    check(problem(SHAPES[shapes], dtype, device))


@pytest.mark.parametrize(
    ("layouts", "dtype"),
    [
        (("channels_last", "channels_last"), torch.bfloat16),
        (("channels_last", "channels_last"), torch.float32),
        (("strided", "contiguous"), torch.float32),
        (("transposed", "contiguous"), torch.bfloat16),
        (("contiguous", "channels_last"), torch.bfloat16),
        (("channels_last", "strided"), torch.float16),
    ],
    ids=str,
)
def test_layouts(layouts, dtype, device) -> None:
    p = problem([(2, 8, 12, 16), (2, 5, 3, 3)], dtype, device, layouts)
    check(p)
    grads = run(kernels, p)[1]
    for grad, s in zip(grads, p.student, strict=True):
        if layouts[0] != "strided":
            assert grad.stride() == s.stride()


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (20, 1), (300, 17)], ids=str)
def test_boxes_are_placed_as_by_the_reference(counts, device) -> None:
    p = problem([(2, 2, 13, 21), (2, 2, 7, 11)], torch.float32, device, counts=counts)
    # The same division, floor, ceil and reciprocal in float32: equal weights, not close ones.
    assert torch.equal(kernels.forward(*p)[2][4], reference.forward(*p)[2][4])
    check(p)


@pytest.mark.parametrize(
    "bad", [[float("nan"), 0, 8, 8], [0, 0, float("inf"), 8], [24, 8, 8, 24], [8, 24, 24, 8]], ids=str
)
def test_a_bad_box_makes_its_images_foreground_nan_and_nothing_else(bad, device) -> None:
    p = problem([(2, 2, 3, 5)], torch.float32, device, counts=(18, 2))
    p.boxes[17] = torch.tensor(bad, device=device)
    terms, vectors, maps, factors, scalars = kernels.forward(*p)
    assert terms[0].isnan().tolist() == [[True, False]]
    assert float(terms[1, 0, 0]) == 0.0
    assert all(bool(x.isfinite().all()) for x in (terms[1:], vectors, factors, scalars))
    assert bool(maps[4, :15].isnan().all())
    assert bool(maps[4, 15:].isfinite().all())


def test_teacher_may_be_of_another_dtype(device) -> None:
    p = problem([(2, 8, 4, 4)], torch.bfloat16, device)
    check(p._replace(teacher=[x.float() for x in p.teacher]))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, device) -> None:
    # an empty level beside one that is not
    p = problem([shape, (shape[0], 2, 2, 2)], torch.float32, device)
    out, grads, weights = run(kernels, p)
    assert torch.equal(out[0][:, 0], torch.zeros(4, shape[0], device=device))
    assert [g.shape for g in grads] == [x.shape for x in p.student]
    assert torch.equal(weights[:, : shape[1]], torch.zeros(2, shape[1], device=device))
    alone = run(kernels, Problem(*(group[1:] for group in p[:4]), *p[4:]))
    n = shape[0] * shape[1]
    assert torch.equal(out[0][:, 1], alone[0][0][:, 0])
    assert torch.equal(out[1][:, n:], alone[0][1])
    # upstream gradients are drawn for another shape: only finiteness is common
    assert bool(grads[1].isfinite().all())


def test_extreme_values(device) -> None:
    # 1e4 squared overflows fp16. Exponents reach 1e4 / tau: their rounding is 2^-24 times that.
    p = problem([(1, 8, 5, 9)], torch.float16, device, counts=(3,), scale=1e4)
    p.student[0].clamp_(-6e4, 6e4)
    p.teacher[0].clamp_(-6e4, 6e4)
    upstream = [torch.full(shape, 1e-6, device=device) for shape in ((4, 1, 1), (3, 8))]
    out, grads, weights = run(kernels, p, upstream)
    want, grads64, _ = run(reference, in_double(p), upstream)
    for i, name in enumerate(("foreground", "background", "attention", "square")):
        assert float(out[0][i]) == pytest.approx(float(want[0][i]), rel=3e-3, abs=1e-3), name
    assert_near(out[1], want[1], 1e-4, "vectors")
    assert_near(grads[0], grads64[0], 3e-3, "student")
    assert bool(weights.isfinite().all())


def test_equal_maps_have_no_gradient_of_the_attentions_and_zeros_none_at_all(device) -> None:
    p = problem([(1, 4, 3, 5)], torch.float32, device, counts=(2,))
    p.student[0][:, :, 1] = 0.0
    p = p._replace(teacher=[p.student[0].clone()])
    out = kernels.forward(*p)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    upstream = torch.ones_like(out[0]), torch.zeros_like(out[1])
    grads, _ = kernels.backward(*upstream, *p[:4], *out[1:], p.temperature)
    assert torch.equal(grads[0], torch.zeros_like(grads[0]))
    # sign(0) = 0: where S is zero, the attentions give nothing though they differ
    p = p._replace(teacher=[p.student[0] + 1.0])
    out = kernels.forward(*p)
    upstream[0][[0, 1, 3]] = 0.0
    grads, _ = kernels.backward(*upstream, *p[:4], *out[1:], p.temperature)
    assert float(grads[0][:, :, 1].abs().max()) == 0.0
    assert float(grads[0].abs().max()) > 0.0


def test_rooms_share_what_they_save(device) -> None:
    p = problem([(2, 8, 4, 6), (2, 5, 3, 3)], torch.float32, device)
    ours, theirs = kernels.forward(*p), reference.forward(*p)
    upstream = [torch.ones_like(x) for x in ours[:2]]
    grads, weights = kernels.backward(*upstream, *p[:4], *theirs[1:], p.temperature)
    grads_too, weights_too = reference.backward(*upstream, *p[:4], *ours[1:], p.temperature)
    for a, b in zip((*grads, weights), (*grads_too, weights_too), strict=True):
        assert_near(a, b, 1e-4)


def test_repeats_give_the_same_bits(device) -> None:
    p = problem(SHAPES["odd"], torch.float32, device)
    (out, grads, weights), (again, grads_again, weights_again) = run(kernels, p), run(kernels, p)
    for a, b in zip((*out, *grads, weights), (*again, *grads_again, weights_again), strict=True):
        assert torch.equal(a, b)


def on_meta(images: int, levels: int, boxes: int, dtype=torch.bfloat16) -> Problem:
    maps = [torch.empty(images, 256, h, w, dtype=dtype, device="meta") for h, w in PAPER[:levels]]
    weights = [torch.empty(256, device="meta") for _ in maps]
    flat = torch.empty(images * boxes, 4, device="meta")
    return Problem(maps, maps, weights, weights, flat, [boxes] * images, [800, 1344] * images, 0.5)


@pytest.mark.parametrize("boxes", [0, 300])
@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("images", [1, 16])
def test_launches_do_not_grow_with_levels_images_or_boxes(images, levels, boxes) -> None:
    p = on_meta(images, levels, boxes)
    with trace(run=False) as forward:
        out = kernels.forward(*p)
    with trace(run=False) as backward:
        kernels.backward(*out[:2], *p[:4], *out[1:], p.temperature)
    assert (forward.names, backward.names) == LAUNCHES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("images", [2, 16])
def test_extra_memory_is_below_that_of_the_maps(images, dtype) -> None:
    p = on_meta(images, 5, 20, dtype)
    with trace(run=False) as record:
        run(kernels, p)
    maps = sum(2 * x.numel() * x.element_size() for x in p.student)
    # Everything ever allocated, the gradient (0.5) and buffers freed before the other direction included.
    assert record.bytes <= 0.61 * maps  # performance.md's bound is 1.1


def test_operation_by_name_runs_the_kernels(device) -> None:
    p = problem([(2, 8, 4, 6), (2, 5, 3, 3)], torch.float32, device)
    sizes = [(96, 120), (90, 100)]
    results = []
    for backend in ("triton", "reference"):
        inputs = [x.clone().requires_grad_() for x in (*p.student, *p.student_weight, *p.teacher_weight)]
        with trace() as record:
            sums = fgd_sums(
                inputs[:2],
                p.teacher,
                p.boxes.split(p.counts),
                sizes,
                inputs[2:4],
                inputs[4:],
                p.temperature,
                backend=backend,
            )
            grads = torch.autograd.grad(sums.terms.sum() + sums.vectors.sum(), inputs)
        assert record.names == (LAUNCHES[0] + LAUNCHES[1] if backend == "triton" else [])
        results.append((sums.terms.detach(), sums.vectors.detach(), *grads))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1e-4)


def test_an_image_beyond_32_bit_offsets_is_refused_before_any_launch() -> None:
    p = on_meta(1, 1, 0)._replace(student=[torch.empty(1, 2**9, 2**11, 2**11, device="meta")])
    with (
        trace(run=False) as record,
        pytest.raises(
            ValueError, match=r"fgd_sums: level 0 has 2147483648 elements; expected fewer than 2\*\*31"
        ),
    ):
        kernels.forward(*p)
    assert record.launches == []
