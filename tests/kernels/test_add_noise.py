"""add_noise against its formula in float64: units, mirrored and padded images, gradients, registration, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import add_noise
from ikd_fast.kernels.ops import add_noise as op
from ikd_fast.kernels.reference import add_noise as reference
from ikd_fast.kernels.reference.add_noise import noise_field
from tests.tolerances import DTYPES, gradcheck

KEY = {"seed": 2**64 - 3, "epoch": 6}
IDS = [4, -7, 2**62]
SIGMA = torch.tensor([20.4, 0.0, 8.0])
GREY, LOW, HIGH = [1 / 58, 1 / 57, 1 / 56], [-2.1, -2.0, -1.8], [2.2, 2.4, 2.6]
UNITS = {"grey_level": GREY, "low": LOW, "high": HIGH}


def stack(dtype=torch.float32, shape=(3, 3, 9, 14)) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=g, dtype=torch.float64) * 5 - 2.3).to(dtype)


def by_formula(images: Tensor, flips, sizes, reverse: bool, rounded: bool, rng: str = "philox") -> Tensor:
    """In float64, image by image."""
    out = images.double().clone()
    grey, low, high = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (GREY, LOW, HIGH))
    for i, (h, w) in enumerate(sizes):
        if SIGMA[i] == 0:
            continue
        noise = noise_field((3, h, w), id=IDS[i], **KEY, rng=rng) * float(SIGMA[i])
        noise = (noise.round() if rounded else noise).double()
        noise = noise.flip(0) if reverse else noise
        noise = noise.flip(-1) if flips[i] else noise
        total = out[i, :, :h, :w] + noise * grey
        out[i, :, :h, :w] = total.maximum(low).minimum(high)
    return out


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize(("reverse", "rounded"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(dtype, reverse, rounded, rng) -> None:
    images, flips, sizes = stack(dtype), [False, True, True], [(9, 14), (5, 5), (7, 11)]
    options = {"flip": torch.tensor(flips), "sizes": torch.tensor(sizes), **UNITS}
    options.update(channels_reversed=reverse, round_noise=rounded, rng=rng)
    out = add_noise(images, SIGMA, torch.tensor(IDS), **KEY, **options)
    expected = by_formula(images, flips, sizes, reverse, rounded, rng)
    assert out.dtype == dtype
    # One rounding to the dtype, after three in float32 of values up to 3.
    unit = {torch.float64: 2.0**-52, torch.float32: 0.0}.get(dtype, torch.finfo(dtype).eps / 2)
    slack = 0.0 if dtype == torch.float64 else 4 * 3 * 2.0**-24
    assert ((out.double() - expected).abs() <= unit * expected.abs() + slack).all()
    assert torch.equal(out[1], images[1])
    assert torch.equal(out[2, :, 7:], images[2, :, 7:])
    assert not torch.equal(out[2, :, :7, :11], images[2, :, :7, :11])


def test_layouts_and_lists_give_the_same() -> None:
    images, ids = stack(), torch.tensor(IDS)
    want = add_noise(images, SIGMA, ids, **KEY, **UNITS)
    last = add_noise(images.to(memory_format=torch.channels_last), SIGMA, ids, **KEY, **UNITS)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, want)
    wide = torch.zeros(3, 3, 9, 28)
    wide[..., ::2] = images
    assert torch.equal(add_noise(wide[..., ::2], SIGMA, ids, **KEY, **UNITS), want)
    ragged = [images[0], images[1, :, :4, :3], images[2].permute(1, 2, 0).contiguous().permute(2, 0, 1)]
    out = add_noise(ragged, SIGMA, ids, **KEY, **UNITS)
    assert torch.equal(out[0], want[0])
    assert torch.equal(out[1], ragged[1])
    assert torch.equal(out[2], want[2])
    assert out[2].stride() == ragged[2].stride()


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 7, 5), (3, 16, 16), (2, 63, 65), (1, 3, 11)], ids=str)
@pytest.mark.parametrize("chunk", [1, 25, 1250])
def test_pieces_of_a_field_are_the_field(monkeypatch, shape, chunk, rng) -> None:
    """Also where torch's generator makes its last 16 values twice."""
    monkeypatch.setattr(reference, "chunk_blocks", lambda device: chunk)
    cpu = torch.device("cpu")
    rows = reference.noise_rows(shape, seed=1, id=2, epoch=3, device=cpu, rng=rng)
    channels, height, width = shape
    parts = [
        torch.cat([rows(c, a, b) for a, b in reference.chunks(height, width, cpu)]) for c in range(channels)
    ]
    assert torch.equal(torch.stack(parts), noise_field(shape, seed=1, id=2, epoch=3, rng=rng))


def test_gradcheck() -> None:
    """No value within 1e-6 of a bound, where a finite difference sees both sides."""
    images = stack(torch.float64, (3, 3, 4, 5)).requires_grad_()
    gradcheck(lambda x: add_noise(x, SIGMA, torch.tensor(IDS), **KEY, **UNITS), images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_passes_where_the_sum_is_in_range(dtype) -> None:
    sizes = [(9, 14), (9, 14), (7, 11)]
    images = stack(dtype).requires_grad_()
    options = {"sizes": torch.tensor(sizes), **UNITS}
    out = add_noise(images, SIGMA, torch.tensor(IDS), **KEY, **options)
    upstream = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(upstream)
    free = add_noise(images.detach().double(), SIGMA, torch.tensor(IDS), **KEY, sizes=options["sizes"],
                     grey_level=GREY, low=-99.0, high=99.0)  # fmt: skip
    low, high = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (LOW, HIGH))
    passes = (free >= low) & (free <= high)
    passes[1] = True
    passes[2, :, 7:] = True
    passes[2, :, :, 11:] = True
    assert 0.02 < passes.logical_not().double().mean() < 0.5
    # float32 and float64 sums of one value fall on the two sides of a bound once in a million.
    assert torch.equal(images.grad, torch.where(passes, upstream, 0))


def test_lists_have_gradients_too_and_none_is_asked_of_bytes() -> None:
    images = [x.clone().requires_grad_() for x in stack()]
    images[1].requires_grad_(False)
    add_noise(images, SIGMA, torch.tensor(IDS), **KEY, low=-99.0)[2].sum().backward()
    assert images[1].grad is None
    assert images[0].grad is None or not images[0].grad.any()
    assert torch.equal(images[2].grad, torch.ones_like(images[2]))
    pixels = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    assert not add_noise(pixels, SIGMA, torch.tensor(IDS), **KEY).requires_grad


def test_inputs_are_never_changed_and_outputs_are_new() -> None:
    images = stack()
    before = images.clone()
    out = add_noise(images, torch.zeros(3), torch.tensor(IDS), **KEY)
    assert torch.equal(images, before)
    assert torch.equal(out, before)
    assert out.data_ptr() != images.data_ptr()
    assert add_noise([], torch.zeros(0), torch.zeros(0, dtype=torch.int64), **KEY) == []


def test_opcheck() -> None:
    plan = (SIGMA, torch.tensor(IDS), torch.tensor([True, False, True]), torch.tensor([[9, 14]] * 3))
    numbers = (-3, 6, GREY, LOW, HIGH, True, False, "philox", "auto")
    for images in ([stack().requires_grad_()], [x[None] for x in stack()]):
        torch.library.opcheck(op._op, (images, *plan, *numbers))
    torch.library.opcheck(op._op_backward, ([stack()], [stack()], *plan, *numbers))


def test_compiled_equals_eager() -> None:
    def function(images, sigma, ids, epoch: int):
        return add_noise(images * 0.9, sigma, ids, seed=5, epoch=epoch, **UNITS)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        images = stack().requires_grad_()
        out = call(images, SIGMA, torch.tensor(IDS), 3)
        out.square().sum().backward()
        results.append((out.detach(), images.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


PIXELS = torch.zeros(1, 3, 4, 5)
ONE = {"sigma": torch.ones(1), "ids": torch.tensor([1])}


@pytest.mark.parametrize(
    ("images", "change", "error", "message"),
    [
        (PIXELS[0], {}, ValueError, r"expected \[N, C, H, W\] or a list of \[C, H, W\], got \[3, 4, 5\]"),
        ([PIXELS], {}, ValueError, r"images\[0\]: expected \[1, H, W\], got \[1, 3, 4, 5\]"),
        (PIXELS.long(), {}, TypeError, r"expected uint8, fp16, .* got torch\.int64"),
        (
            [PIXELS[0], PIXELS[0].half()],
            {},
            ValueError,
            r"images\[1\]: expected torch\.float32 .* got torch\.float16",
        ),
        ([PIXELS[0], PIXELS[0].to("meta")], {}, ValueError, r"images\[1\]: .* on cpu .*on meta"),
        (
            PIXELS,
            {"sigma": torch.tensor([-1.0])},
            ValueError,
            r"sigma\[0\]: expected a finite number >= 0 .*got -1\.0",
        ),
        (PIXELS, {"sigma": torch.tensor([float("nan")])}, ValueError, r"sigma\[0\]: .*got nan"),
        (PIXELS, {"sigma": torch.tensor([float("inf")])}, ValueError, r"sigma\[0\]: .*got inf"),
        (
            PIXELS,
            {"sigma": torch.ones(2)},
            ValueError,
            r"sigma: expected torch\.float32 \[1\] on the CPU .*\[2\]",
        ),
        (PIXELS, {"ids": torch.ones(1)}, ValueError, r"ids: expected torch\.int64 \[1\] .*torch\.float32"),
        (PIXELS, {"flip": torch.ones(1)}, ValueError, r"flip: expected torch\.bool"),
        (
            PIXELS,
            {"sizes": torch.tensor([[4, 6]])},
            ValueError,
            r"sizes\[0\]: expected .*\(4, 5\), got \(4, 6\)",
        ),
        (PIXELS, {"sizes": torch.tensor([[-1, 2]])}, ValueError, r"sizes\[0\]: .*got \(-1, 2\)"),
        (PIXELS, {"grey_level": 0.0}, ValueError, r"channel 0: expected grey_level > 0 .*grey_level=0\.0"),
        (
            PIXELS,
            {"grey_level": [1.0, 2.0]},
            ValueError,
            r"grey_level: .* each of 3 channels, got \[1\.0, 2\.0\]",
        ),
        (PIXELS, {"low": 2.0, "high": [3.0, 1.0, 3.0]}, ValueError, r"channel 1: .*low=2\.0, high=1\.0"),
        (PIXELS, {"high": float("inf")}, ValueError, r"high: expected a finite number"),
        (PIXELS, {"seed": -1}, ValueError, r"seed must be in 0\.\.2\*\*64-1, got -1"),
        (PIXELS, {"seed": 2**64}, ValueError, r"seed must be in 0\.\.2\*\*64-1, got 18446744073709551616"),
        (PIXELS, {"epoch": 2**32}, ValueError, r"epoch must be in"),
        (PIXELS, {"rng": "numpy"}, ValueError, r"rng must be one of 'philox', 'torch', got 'numpy'"),
        (PIXELS, {"backend": "cuda"}, ValueError, r"backend must be one of .* got 'cuda'"),
    ],
)
def test_errors(images, change, error, message) -> None:
    with pytest.raises(error, match=message):
        add_noise(images, **{**ONE, "seed": 0, "epoch": 0, **change})
