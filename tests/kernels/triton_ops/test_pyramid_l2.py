"""The pyramid kernels against the float64 reference: dtypes, layouts, odd sizes, masks, launches, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import pyramid_l1, pyramid_l2
from ikd_fast.kernels.reference import pyramid_l2 as reference
from ikd_fast.kernels.triton_ops import pyramid_l2 as kernels
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.layouts import in_layout
from tests.kernels.pairs import by_name
from tests.tolerances import assert_gradient, assert_value

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one": [(1, 1, 1, 1)],
    "odd": [(2, 3, 5, 7), (2, 7, 3, 3), (2, 5, 1, 1)],
    "aligned": [(2, 8, 16, 20), (2, 8, 8, 10), (2, 8, 4, 5)],
    "long": [(1, 19, 37, 53)],  # 37259 elements: more than one program of 16384
}


def pyramid(shapes, dtype, layout: str, device, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for n, c, h, w in shapes:
        x = torch.randn(n, c, h, w, generator=g).to(device, dtype)
        out.append(in_layout(x, layout))
    return out


def masks(shapes, device) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [(torch.rand(n, h, w, generator=g) > 0.4).to(device) for n, _, h, w in shapes]


def check(student, teacher, valid, square) -> None:
    out = kernels.forward(student, teacher, valid, square)
    s64, t64 = [x.double() for x in student], [x.double() for x in teacher]
    assert_value(out, reference.forward(s64, t64, valid, square), student[0].dtype)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=g).to(out.device)
    grads = kernels.backward(upstream, student, teacher, valid, square)
    wanted = reference.backward(upstream.double(), s64, t64, valid, square)
    for s, a, b in zip(student, grads, wanted, strict=True):
        assert a.dtype == s.dtype
        assert_gradient(a, b, s.dtype)


@pytest.mark.parametrize("square", [True, False], ids=["l2", "l1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
def test_contiguous(shapes, dtype, square, device) -> None:
    s, t = (pyramid(SHAPES[shapes], dtype, "contiguous", device, i) for i in (0, 1))
    check(s, t, [], square)
    check(s, t, masks(SHAPES[shapes], device), square)


@pytest.mark.parametrize(
    "layouts",
    [("channels_last", "channels_last"), ("strided", "contiguous"), ("contiguous", "channels_last")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", ["odd", "aligned"])
def test_layouts(shapes, dtype, layouts, device) -> None:
    s, t = (pyramid(SHAPES[shapes], dtype, layout, device, i) for i, layout in enumerate(layouts))
    check(s, t, [], True)
    check(s, t, masks(SHAPES[shapes], device), True)
    for x, grad in zip(s, kernels.backward(torch.ones(3, 2, device=device), s, t, [], True), strict=True):
        if layouts[0] != "strided" and x.shape[2:] != (1, 1):
            assert grad.stride() == x.stride()


def test_student_and_teacher_may_differ_in_dtype(device) -> None:
    shapes = SHAPES["odd"]
    s, t = (
        pyramid(shapes, torch.bfloat16, "contiguous", device, 0),
        pyramid(shapes, torch.float32, "contiguous", device, 1),
    )
    check(s, t, [], True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, device) -> None:
    x = [torch.zeros(shape, device=device)]
    out = kernels.forward(x, x, [], True)
    assert torch.equal(out, torch.zeros(1, shape[0], device=device))
    (grad,) = kernels.backward(torch.ones_like(out), x, x, [], True)
    assert grad.shape == shape
    # an empty level beside one that is not
    y = [x[0], torch.ones(shape[0], 2, 2, 2, device=device)]
    zero = [torch.zeros_like(v) for v in y]
    assert torch.equal(kernels.forward(y, zero, [], True)[1], torch.full((shape[0],), 8.0, device=device))


def test_extreme_values(device) -> None:
    # 1e4 squared overflows fp16; 2 * 2e4 * 0.001 does not
    s = [torch.full((1, 4, 3, 3), 1e4, dtype=torch.float16, device=device)]
    t = [-s[0]]
    assert float(kernels.forward(s, t, [], True)) == pytest.approx(36 * 4e8, rel=1e-6)
    grad = kernels.backward(torch.full((1, 1), 1e-3, device=device), s, t, [], True)[0]
    assert torch.equal(grad, torch.full_like(s[0], 40.0))
    # l1: no gradient where the maps are equal, nor at NaN, as torch.sign has it
    s = [torch.tensor([0.0, -0.0, 1.0, float("nan")], device=device).view(1, 1, 2, 2)]
    grad = kernels.backward(torch.ones(1, 1, device=device), s, [torch.zeros_like(s[0])], [], False)[
        0
    ].flatten()
    assert torch.equal(grad, torch.tensor([0.0, 0.0, 1.0, 0.0], device=device))
    assert bool(kernels.forward(s, [torch.zeros_like(s[0])], [], False).isnan())


def test_what_a_mask_leaves_out_may_be_anything(device) -> None:
    s, t = (
        pyramid(SHAPES["odd"], torch.float32, "contiguous", device, 0),
        pyramid(SHAPES["odd"], torch.float32, "contiguous", device, 1),
    )
    valid = masks(SHAPES["odd"], device)
    want = kernels.forward(s, t, valid, True)
    for x, v in zip(s, valid, strict=True):
        x.masked_fill_(~v[:, None], float("nan"))
    assert torch.equal(kernels.forward(s, t, valid, True), want)
    grads = kernels.backward(torch.ones_like(want), s, t, valid, True)
    for grad, v in zip(grads, valid, strict=True):
        assert not bool(grad.masked_select(~v[:, None].expand_as(grad)).any())


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_launches_do_not_grow_with_levels_or_images(levels, images) -> None:
    maps = [torch.empty(images, 8, 2**i, 4, device="meta") for i in range(levels)]
    with trace(run=False) as forward:
        out = kernels.forward(maps, maps, [], True)
    with trace(run=False) as backward:
        kernels.backward(out, maps, maps, [], True)
    assert forward.names == ["pyramid_distance_forward", "pyramid_distance_finish"]
    assert backward.names == ["pyramid_distance_backward"]


@pytest.mark.parametrize("images", [2, 16])
def test_extra_memory_is_the_gradient_and_little_else(images) -> None:
    shapes = [(images, 256, h, w) for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
    s = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with trace(run=False) as record:
        kernels.backward(kernels.forward(s, s, [], True), s, s, [], True)
    maps = sum(2 * x.numel() * x.element_size() for x in s)
    gradient = maps / 2
    assert gradient <= record.bytes <= 1.001 * gradient  # performance.md's bound is 1.1 times S and T


@pytest.mark.parametrize("op", [pyramid_l2, pyramid_l1])
def test_operation_by_name_runs_the_kernels(op, device) -> None:
    s, t = (
        pyramid(SHAPES["odd"], torch.float32, "contiguous", device, 0),
        pyramid(SHAPES["odd"], torch.float32, "contiguous", device, 1),
    )
    for a, b in by_name(op, s, t, launches=3):
        assert_gradient(a, b, torch.float32)


def test_repeats_give_the_same_bits(device) -> None:
    s, t = (
        pyramid(SHAPES["long"], torch.float32, "contiguous", device, 0),
        pyramid(SHAPES["long"], torch.float32, "contiguous", device, 1),
    )
    assert torch.equal(kernels.forward(s, t, [], True), kernels.forward(s, t, [], True))


def test_an_image_beyond_32_bit_offsets_is_refused_before_any_launch() -> None:
    x = [torch.empty(1, 2, 2**15, 2**15, device="meta")]
    with (
        trace(run=False) as record,
        pytest.raises(
            ValueError, match=r"level 0 has 2147483648 elements; expected fewer than 2\*\*31 an image"
        ),
    ):
        kernels.forward(x, x, [], True)
    assert record.launches == []
