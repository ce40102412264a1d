"""pyramid_l2 and pyramid_l1 against float64 loops: values, gradients, layouts, dtypes, errors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import pyramid_l1, pyramid_l2
from ikd_fast.kernels.ops import backend
from ikd_fast.kernels.ops import pyramid_l2 as pyramid_ops
from ikd_fast.kernels.reference import pyramid_l2 as reference
from tests.kernels.pairs import assert_compiles_whole, assert_differentiable_once
from tests.tolerances import DTYPES, TOLERANCES, assert_gradient, assert_value, gradcheck


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SHAPES = [
    [(1, 1, 1, 1)],
    [(2, 3, 5, 7)],
    [(3, 16, 13, 9), (3, 8, 7, 5), (3, 24, 1, 1)],
    [(2, 21, 20, 33), (2, 13, 10, 17)],
]


def slow_l2(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([((s[i] - t[i]) ** 2).sum() for i in range(len(s))])


def slow_l1(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(s[i] - t[i]).abs().sum() for i in range(len(s))])


OPS = [
    pytest.param(pyramid_l2, slow_l2, id="l2"),
    pytest.param(pyramid_l1, slow_l1, id="l1"),
]


def maps(shapes, dtype, seed=0) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    s, t = ([torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in shapes] for _ in range(2))
    return s, t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda x: "x".join(map(str, x[0])) + f"+{len(x) - 1}")
@pytest.mark.parametrize(("op", "slow"), OPS)
def test_value_and_gradient(op, slow, shapes, dtype) -> None:
    s, t = maps(shapes, dtype)
    upstream = torch.randn(len(shapes), shapes[0][0], dtype=torch.float64)
    mine = [x.clone().requires_grad_() for x in s]
    out = op(mine, t)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.backward(upstream.to(out.dtype))
    truth = [x.double().requires_grad_() for x in s]
    expected = torch.stack([slow(a, b.double()) for a, b in zip(truth, t, strict=True)])
    expected.backward(upstream)
    assert_value(out, expected, dtype)
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_gradient(a.grad, b.grad, dtype)


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_layouts_give_the_same(op, slow) -> None:
    s, t = maps([(2, 6, 8, 10)], torch.float32)
    want = op(s, t)
    last = [x.to(memory_format=torch.channels_last) for x in s]
    wide = torch.zeros(2, 6, 8, 20)
    wide[..., ::2] = s[0]
    for view in (last, [wide[..., ::2]]):
        assert_value(op(view, t), want, torch.float32)
        assert_value(op(view, [x.to(memory_format=torch.channels_last) for x in t]), want, torch.float32)


@pytest.mark.parametrize(("op", "slow"), OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_maps_are_summed_in_chunks(op, slow, dtype, layout) -> None:
    s, t = maps([(2, 17, 131, 127)], dtype)  # 8.6 chunks, the last one short
    s, t = ([x.to(memory_format=layout) for x in y] for y in (s, t))
    assert reference._chunkable(s[0], t[0])
    s = [x.requires_grad_() for x in s]
    out = op(s, t)
    assert_value(out[0], slow(s[0].double(), t[0].double()), dtype)
    upstream = torch.tensor([[1.5, -0.25]])
    (grad,) = torch.autograd.grad((out * upstream).sum(), s)
    d = s[0].detach().double() - t[0].double()
    want = (2 * d if slow is slow_l2 else d.sign()) * upstream[0].double()[:, None, None, None]
    assert grad.stride() == s[0].stride()
    assert_gradient(grad, want, dtype)


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_gradcheck(op, slow) -> None:
    s, t = maps([(2, 3, 3, 2), (2, 2, 1, 3)], torch.float64)
    gradcheck(lambda *x: op(list(x), t), *(x.requires_grad_() for x in s))


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_equal_maps_give_zero_and_no_gradient(op, slow) -> None:
    t = maps([(2, 4, 6, 5)], torch.float32)[0]
    s = [x.clone().requires_grad_() for x in t]
    out = op(s, t)
    assert torch.equal(out, torch.zeros(1, 2))
    out.sum().backward()
    assert torch.equal(s[0].grad, torch.zeros_like(s[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_maps_do_not_overflow(dtype) -> None:
    s, t = (
        [torch.full((1, 256, 10, 10), 150.0, dtype=dtype)],
        [torch.full((1, 256, 10, 10), -150.0, dtype=dtype)],
    )
    assert pyramid_l2(s, t).item() == pytest.approx(300.0**2 * 25600, rel=TOLERANCES[dtype].value)


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_autocast_changes_nothing(op, slow) -> None:
    s, t = maps([(2, 8, 9, 9)], torch.float32)
    want = op(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(s, t), want)


@pytest.mark.parametrize("op", [pyramid_l2, pyramid_l1])
def test_errors(op) -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="1 student and 2 teacher levels"):
        op([x], [x, x])
    with pytest.raises(ValueError, match="got 0 student"):
        op([], [])
    with pytest.raises(ValueError, match=r"level 0.*student \(2, 3, 4, 4\) and teacher \(2, 3, 4, 5\)"):
        op([x], [torch.zeros(2, 3, 4, 5)])
    with pytest.raises(ValueError, match=r"level 1: expected maps \[2,C,H,W\]"):
        op([x, x[:1]], [x, x[:1]])
    with pytest.raises(TypeError, match=r"level 0.*torch.int64"):
        op([x.long()], [x.long()])
    with pytest.raises(ValueError, match=r"level 0.*meta"):
        op([x], [x.to("meta")])
    with pytest.raises(ValueError, match=r"map\.detach\(\)"):
        op([x], [x.clone().requires_grad_()])


def masks(shapes) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.rand(n, h, w, generator=g) > 0.4 for n, _, h, w in shapes]


@pytest.mark.parametrize(("op", "slow"), OPS)
def test_valid_positions_alone_count(op, slow) -> None:
    shapes = [(2, 5, 6, 7), (2, 3, 1, 1)]
    s, t = maps(shapes, torch.float32)
    valid = masks(shapes)
    for x, v in zip(s, valid, strict=True):  # what lies outside may be anything
        x.masked_fill_(~v[:, None], float("inf"))
    mine = [x.clone().requires_grad_() for x in s]
    out = op(mine, t, valid)
    out.backward(torch.ones_like(out))
    for i, (a, b, v) in enumerate(zip(s, t, valid, strict=True)):
        inside = v[:, None].expand_as(a)
        want = torch.stack(
            [
                slow(a[k][inside[k]][None].double(), b[k][inside[k]][None].double())[0]
                if inside[k].any()
                else out.new_zeros(()).double()
                for k in range(len(a))
            ]
        )
        assert_value(out[i], want, torch.float32)
        assert torch.equal(mine[i].grad[~inside], torch.zeros(int((~inside).sum())))
        d = (a - b)[inside]
        assert_gradient(mine[i].grad[inside], 2 * d if slow is slow_l2 else d.sign(), torch.float32)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("with_masks", [True, False])
def test_registered_operation_passes_opcheck(square, with_masks) -> None:
    shapes = [(2, 3, 4, 5), (2, 6, 1, 1)]
    s, t = maps(shapes, torch.float32)
    s = [x.requires_grad_() for x in s]
    valid = masks(shapes) if with_masks else []
    torch.library.opcheck(pyramid_ops._op, (s, t, valid, square, "auto"))
    grad, flat = torch.randn(2, 2), [x.detach() for x in s]
    torch.library.opcheck(pyramid_ops._op_backward, (grad, flat, t, valid, square, "auto"))


@pytest.mark.parametrize("op", [pyramid_l2, pyramid_l1])
def test_compiled_whole_equals_eager(op) -> None:
    shapes = [(2, 3, 4, 5), (2, 6, 1, 1)]
    s, t = maps(shapes, torch.float32)
    valid, weight = masks(shapes), torch.tensor([1.0, 3.0])

    def loss(student, teacher):
        return (op(student, teacher, valid).sqrt().sum(1) * weight).sum()

    assert_compiles_whole(loss, s, t)


def test_a_second_derivative_is_refused() -> None:
    assert_differentiable_once(pyramid_l2)


def test_errors_of_masks_dtypes_and_backends() -> None:
    x, half = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"one valid mask for each of 1 levels, got 2"):
        pyramid_l2([x], [x], [torch.ones(2, 4, 4, dtype=torch.bool)] * 2)
    with pytest.raises(
        ValueError,
        match=r"level 0: expected a bool valid mask \(2, 4, 4\) on cpu, got torch.float32 \(2, 4, 4\)",
    ):
        pyramid_l2([x], [x], [torch.ones(2, 4, 4)])
    with pytest.raises(
        TypeError, match=r"level 1: expected torch.float32 as the student map of level 0, got torch.float16"
    ):
        pyramid_l2([x, half], [x, x])
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        pyramid_l2([x], [x], backend="cuda")
    with pytest.raises(
        TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch.float64"
    ):
        pyramid_l2([x.double()], [x.double()], backend="triton")


def test_triton_by_name_is_never_replaced(monkeypatch) -> None:
    x = torch.zeros(1, 1, 2, 2)
    monkeypatch.setattr(backend, "triton_problem", lambda: "triton does not import (made up)")
    with pytest.raises(RuntimeError, match=r"backend='triton' was asked for, but triton does not import"):
        pyramid_l2([x], [x], backend="triton")
    monkeypatch.setattr(backend, "triton_problem", lambda: None)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"expects CUDA tensors, got tensors on cpu"):
        pyramid_l2([x], [x], backend="triton")


def test_cuda_without_triton_takes_the_reference_with_one_warning(monkeypatch) -> None:
    monkeypatch.setattr(backend, "triton_problem", lambda: "expected triton >= 3.6, got 3.1")
    backend._warn_once.cache_clear()
    cuda = torch.device("cuda")
    with pytest.warns(UserWarning, match="reference .* on the GPU: expected triton >= 3.6, got 3.1"):
        assert backend.choose("pyramid_l2", "auto", cuda, torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("pyramid_l2", "auto", cuda, torch.float32) == "reference"
    backend._warn_once.cache_clear()
    monkeypatch.setattr(backend, "triton_problem", lambda: None)
    assert backend.choose("pyramid_l2", "auto", cuda, torch.bfloat16) == "triton"
    assert backend.choose("pyramid_l2", "auto", cuda, torch.float64) == "reference"
