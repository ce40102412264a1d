"""attention_stats against float64 means written out: values, gradients, layouts, dtypes, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import attention_stats, fgd_attention
from ikd_fast.kernels.ops import attention_stats as ops
from ikd_fast.kernels.reference import attention_stats as reference
from tests.tolerances import DTYPES, assert_gradient, assert_value, gradcheck

SHAPES = [
    [(1, 1, 1, 1)],
    [(2, 3, 5, 7)],
    [(3, 16, 13, 9), (3, 8, 7, 5), (3, 24, 1, 1)],
]
FORMS = [(1.0, False), (1.0, True), (2.0, False), (2.0, True), (3.5, False), (1.5, True)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pyramid(shapes, dtype, seed=0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def written_out(maps: list[Tensor], p: float, positive: bool) -> list[list[Tensor]]:
    f = [(x.relu() if positive else x.abs()) ** p for x in maps]
    return [
        [y.mean(1) for y in f],
        [x.mean(1) for x in maps],
        [y.mean((2, 3)) for y in f],
        [x.mean((2, 3)) for x in maps],
    ]


def weighted(kinds, weights) -> Tensor:
    rows = zip((x for kind in kinds for x in kind), weights, strict=True)
    return sum((x * w.to(x.dtype)).sum() for x, w in rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda x: "x".join(map(str, x[0])) + f"+{len(x) - 1}")
@pytest.mark.parametrize(("p", "positive"), FORMS)
def test_values_and_gradients(p, positive, shapes, dtype) -> None:
    maps = pyramid(shapes, dtype)
    mine, truth = ([x.clone().to(d).requires_grad_() for x in maps] for d in (dtype, torch.float64))
    got = attention_stats(mine, p=p, positive=positive)
    want = written_out(truth, p, positive)
    for kind, expected in zip(got, want, strict=True):
        for a, b in zip(kind, expected, strict=True):
            assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_value(a, b, dtype)
    weights = [torch.randn(x.shape, dtype=torch.float64) for kind in want for x in kind]
    weighted(got, weights).backward()
    weighted(want, weights).backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_gradient(a.grad, b.grad, dtype)


@pytest.mark.parametrize(("p", "positive"), FORMS)
def test_gradcheck(p, positive) -> None:
    maps = [x.requires_grad_() for x in pyramid([(2, 3, 3, 2), (2, 2, 1, 3)], torch.float64)]

    def rows(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for kind in attention_stats(list(x), p=p, positive=positive) for y in kind)

    gradcheck(rows, *maps)


def test_what_is_left_out_is_empty_and_the_rest_the_same() -> None:
    maps = [x.requires_grad_() for x in pyramid([(2, 3, 5, 7), (2, 4, 2, 2)], torch.float32)]
    both = attention_stats(maps)
    channels, positions = attention_stats(maps, over="channels"), attention_stats(maps, over="positions")
    assert channels[2:] == ([], [])
    assert positions[:2] == ([], [])
    for part, kinds in ((channels, (0, 1)), (positions, (2, 3))):
        for kind in kinds:
            assert all(torch.equal(a, b) for a, b in zip(part[kind], both[kind], strict=True))
            grads = [
                torch.autograd.grad(sum(x.square().sum() for x in s[kind]), maps, retain_graph=True)
                for s in (part, both)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_attentions_of_fgd_are_softmaxes_of_these() -> None:
    (x,) = pyramid([(2, 5, 6, 7)], torch.float64)
    stats = attention_stats([x])
    spatial, channel = fgd_attention(x, 0.5)
    mine = (stats.spatial[0] / 0.5).flatten(1).softmax(1).view_as(spatial) * 42
    assert_value(mine, spatial, torch.float64)
    assert_value((stats.channel[0] / 0.5).softmax(1) * 5, channel, torch.float64)


def test_layouts_give_the_same() -> None:
    (x,) = pyramid([(2, 6, 8, 10)], torch.float32)
    wide = torch.zeros(2, 6, 8, 20)
    wide[..., ::2] = x
    want = written_out([x.double()], 2.0, False)
    for view in (x.to(memory_format=torch.channels_last), wide[..., ::2], x.transpose(2, 3).transpose(2, 3)):
        mine = view.detach().requires_grad_()
        got = attention_stats([mine], p=2)
        for a, b in zip(got, want, strict=True):
            assert_value(a[0], b[0], torch.float32)
        (grad,) = torch.autograd.grad(got.spatial[0].sum() + got.channel_mean[0].sum(), mine)
        assert_gradient(grad, 2 * x.double() / 6 + 1 / 80, torch.float32)
        assert grad.stride() == torch.empty_like(mine).stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_maps_go_block_by_block(layout) -> None:
    (x,) = pyramid(
        [(2, 21, 131, 127)], torch.float32
    )  # 349377 elements an image: more than one block of 2^18
    x = x.to(memory_format=layout)
    assert len(list(reference._blocks(x[:1].flatten(2)))) == 2
    mine, truth = x.clone(memory_format=layout).requires_grad_(), x.double().requires_grad_()
    got, want = attention_stats([mine]), written_out([truth], 1.0, False)
    for a, b in zip(got, want, strict=True):
        assert_value(a[0], b[0], torch.float32)
    weights = [torch.randn(k[0].shape, dtype=torch.float64) for k in want]
    weighted(got, weights).backward()
    weighted(want, weights).backward()
    assert_gradient(mine.grad, truth.grad, torch.float32)
    assert mine.grad.stride() == mine.stride()


def test_gradient_at_zero_is_zero() -> None:
    for p, positive in FORMS:
        x = torch.zeros(1, 2, 2, 2, requires_grad=True)
        stats = attention_stats([x], p=p, positive=positive)
        (grad,) = torch.autograd.grad(stats.spatial[0].sum() + stats.channel[0].sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))


def test_empty_maps() -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        stats = attention_stats([x, torch.ones(shape[0], 2, 1, 1)])
        n, c, h, w = shape
        assert stats.spatial[0].shape == (n, h, w)
        assert torch.equal(stats.channel[0], torch.zeros(n, c))
        assert torch.equal(stats.channel[1], torch.ones(n, 2))
        (grad,) = torch.autograd.grad(stats.spatial[0].sum() + stats.channel[0].sum(), x)
        assert grad.shape == shape


def test_large_half_maps_do_not_overflow() -> None:
    x = torch.full((1, 64, 4, 4), 1e4, dtype=torch.float16)
    stats = attention_stats([x], p=2)
    assert stats.spatial[0].flatten()[0].item() == pytest.approx(1e8, rel=1e-6)
    assert stats.channel_mean[0].flatten()[0].item() == 1e4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("p", "positive"), FORMS)
def test_what_is_not_finite_shows(p, positive, bad) -> None:
    x = torch.ones(1, 2, 2, 2)
    x[0, 0, 0, 0] = bad
    stats = attention_stats([x], p=p, positive=positive)
    hidden = positive and bad == -float("inf")  # max(-inf, 0) = 0
    assert stats.spatial[0][0, 0, 0].isfinite() == hidden
    assert stats.channel[0][0, 0].isfinite() == hidden
    assert not stats.spatial_mean[0][0, 0, 0].isfinite()
    assert not stats.channel_mean[0][0, 0].isfinite()
    assert torch.equal(stats.spatial[0][0, 1], torch.ones(2))
    assert stats.channel[0][0, 1] == 1


def test_autocast_and_inference_mode_change_nothing() -> None:
    maps = pyramid([(2, 8, 9, 9)], torch.float32)
    want = attention_stats(maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_stats(maps)
    with torch.inference_mode():
        taken = [x.clone() for x in maps]
    for other in (got, attention_stats(taken)):
        for a, b in zip(other, want, strict=True):
            assert torch.equal(a[0], b[0])


@pytest.mark.parametrize(("spatial", "channel"), [(True, True), (True, False), (False, True)])
def test_registered_operation_passes_opcheck(spatial, channel) -> None:
    maps = [x.requires_grad_() for x in pyramid([(2, 3, 4, 5), (2, 6, 1, 1)], torch.float32)]
    torch.library.opcheck(ops._op, (maps, 2.0, False, spatial, channel, "auto"))
    flat = [x.detach() for x in maps]
    grads = [
        torch.randn(size) if shown else None
        for size, shown in ((42, spatial), (42, False), (18, channel), (18, True))
    ]
    torch.library.opcheck(ops._op_backward, (*grads, flat, 2.0, False, "auto"))


@pytest.mark.parametrize("over", ["both", "channels", "positions"])
def test_compiled_whole_equals_eager(over) -> None:
    maps = pyramid([(2, 3, 4, 5), (2, 6, 1, 1)], torch.float32)

    def loss(x):
        kinds = attention_stats(x, p=2, over=over)
        return sum((y.square() * (i + 1)).sum() for i, kind in enumerate(kinds[::2]) for y in kind)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        mine = [x.clone().requires_grad_() for x in maps]
        value = f(mine)
        results.append([value.detach(), *torch.autograd.grad(value, mine)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused() -> None:
    x = pyramid([(1, 2, 3, 3)], torch.float64)[0].requires_grad_()
    (grad,) = torch.autograd.grad(attention_stats([x], p=2).spatial[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def test_errors() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="at least one map, got none"):
        attention_stats([])
    with pytest.raises(ValueError, match=r"level 0: expected a map \[N,C,H,W\], got \(3, 4, 4\)"):
        attention_stats([x[0]])
    with pytest.raises(ValueError, match=r"level 1: expected a map \[2,C,H,W\], got \(1, 3, 4, 4\)"):
        attention_stats([x, x[:1]])
    with pytest.raises(
        TypeError, match=r"level 0: expected a floating dtype \(fp16, bf16, fp32, fp64\), got torch.int64"
    ):
        attention_stats([x.long()])
    with pytest.raises(TypeError, match=r"level 1: expected torch.float32, got torch.float16"):
        attention_stats([x, x.half()])
    with pytest.raises(ValueError, match=r"level 1: expected every map on cpu, got meta"):
        attention_stats([x, x.to("meta")])
    for p in (0.5, 0, float("nan"), float("inf"), "2", True):
        with pytest.raises(ValueError, match=r"the exponent p must be a finite number >= 1"):
            attention_stats([x], p=p)
    with pytest.raises(ValueError, match="over must be one of 'both', 'channels', 'positions', got 'space'"):
        attention_stats([x], over="space")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        attention_stats([x], backend="cuda")
    with pytest.raises(
        TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch.float64"
    ):
        attention_stats([x.double()], backend="triton")
