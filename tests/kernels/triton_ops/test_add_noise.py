"""The noise kernel against the reference: dtypes, layouts, mirrored and padded images, gradients, one launch.

Normals agree to 1e-5, so unrounded noise agrees to 1e-5 sigma grey levels; rounded, a value whose noise is that close to a
half moves by one grey level. Sums are single float32 operations, fused or not: two units in the last place. A cast to half
types rounds to nearest on a GPU and cuts off in the interpreter: one unit in the last place of the half type.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import add_noise
from ikd_fast.kernels.triton_ops.launch import trace

pytestmark = pytest.mark.usefixtures("poison")

SIGMA = 20.4
UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NORMALISED = {
    "grey_level": [1 / s for s in STD],
    "low": [-m / s for m, s in zip(MEAN, STD, strict=True)],
    "high": [(255 - m) / s for m, s in zip(MEAN, STD, strict=True)],
}
LEVEL = 1 / min(STD)  # the largest grey level of the three channels


def stack(device, dtype, layout: str, shape=(3, 3, 12, 72)) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(shape, generator=g) * 4 - 1.8).to(device, dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.zeros(shape[0], shape[1] + 1, shape[2], 2 * shape[3], dtype=dtype, device=device)
        wide[:, 1:, :, 1::2] = x
        return wide[:, 1:, :, 1::2]
    return x


def plan(flips=(False, False, True), **options) -> dict:
    return {
        "sigma": torch.tensor([SIGMA, 0.0, SIGMA]),
        "ids": torch.tensor([3, 5, -9]),
        "seed": 7,
        "epoch": 1,
        "flip": torch.tensor(flips),
        "sizes": torch.tensor([[11, 70], [12, 72], [5, 33]]),
        **NORMALISED,
        **options,
    }


def both(images, **options) -> tuple[Tensor, Tensor]:
    kernel, reference = (add_noise(images, **options, backend=b) for b in ("triton", "reference"))
    assert kernel.dtype == reference.dtype == images.dtype
    assert kernel.stride() == reference.stride()
    return kernel.cpu(), reference.cpu()


def assert_close(kernel: Tensor, reference: Tensor, absolute: float) -> None:
    assert not kernel.isnan().any()
    bound = 2 * UNIT[kernel.dtype] * reference.double().abs() + absolute
    assert ((kernel.double() - reference.double()).abs() <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(d, name) for d in UNIT for name in ("contiguous", "channels_last")] + [(torch.float32, "strided")],
    ids=str,
)
def test_value(device, dtype, layout) -> None:
    images = stack(device, dtype, layout)
    kernel, reference = both(images, **plan())
    assert_close(kernel, reference, 1e-5 * SIGMA * LEVEL + 2.0**-22)
    given = images.cpu()
    assert torch.equal(kernel[1], given[1])
    assert torch.equal(kernel[0, :, 11:], given[0, :, 11:])
    assert torch.equal(kernel[2, :, :, 33:], given[2, :, :, 33:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uint8_and_rounded_noise(device, layout) -> None:
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, 3, 12, 72), dtype=torch.uint8, generator=g).to(device)
    if layout == "channels_last":
        pixels = pixels.to(memory_format=torch.channels_last)
    units = {"grey_level": 1.0, "low": 0.0, "high": 255.0}
    kernel, reference = both(pixels, **plan(**units))
    moved = (kernel.int() - reference.int()).abs()
    assert moved.max() <= 1
    assert (moved > 0).double().mean() < 2e-3
    as_float, _ = both(pixels.float(), **plan(**units, round_noise=True))
    assert torch.equal(as_float, kernel.float())


@pytest.mark.parametrize("shape", [(3, 3, 1, 1), (3, 1, 5, 3), (3, 4, 17, 67)], ids=str)
def test_odd_shapes_and_any_channels(device, shape) -> None:
    units = {"grey_level": 0.02, "low": -2.0, "high": 2.5, "channels_reversed": True, "sizes": None}
    kernel, reference = both(stack(device, torch.float32, "contiguous", shape), **plan(**units))
    assert_close(kernel, reference, 1e-5 * SIGMA * 0.02 + 2.0**-22)


def test_reversed_channels_take_each_others_noise(device) -> None:
    images = stack(device, torch.float32, "contiguous")
    options = plan(grey_level=1 / 57, low=-9.0, high=9.0)
    straight = add_noise(images, **options, backend="triton")
    turned = add_noise(images.flip(1), **options, channels_reversed=True, backend="triton")
    assert torch.equal(turned.flip(1), straight)


def test_mirrored_noise(device) -> None:
    """The noise of a mirrored image is the mirrored noise, over its valid part."""
    images = stack(device, torch.float32, "contiguous")
    straight = add_noise(images, **plan((False,) * 3), backend="triton")
    mirrored = images.clone()
    mirrored[0, :, :11, :70] = images[0, :, :11, :70].flip(-1)
    out = add_noise(mirrored, **plan((True, False, False)), backend="triton")
    assert torch.equal(out[0, :, :11, :70], straight[0, :, :11, :70].flip(-1))
    assert torch.equal(out[1:], straight[1:])


def test_a_list_of_images_of_any_sizes(device) -> None:
    shapes = [(3, 18, 50), (3, 1, 1), (3, 9, 64)]
    images = [stack(device, torch.float32, "contiguous", (1, *shape))[0] for shape in shapes]
    images[2] = images[2].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    options = plan(sizes=None)
    with trace() as record:
        out = add_noise(images, **options, backend="triton")
    assert record.names == ["keyed_noise"]
    for a, b, image in zip(out, add_noise(images, **options, backend="reference"), images, strict=True):
        assert a.shape == image.shape
        assert a.stride() == image.stride()
        assert_close(a.cpu(), b.cpu(), 1e-5 * SIGMA * LEVEL + 2.0**-22)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(d, "contiguous") for d in UNIT] + [(torch.float32, name) for name in ("channels_last", "strided")],
    ids=str,
)
def test_gradient(device, dtype, layout) -> None:
    """The upstream gradient bit for bit where the sum is in range; where it is within 1e-4 of a bound either will do."""
    images = stack(device, dtype, layout)
    upstream = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    grads = []
    for backend in ("triton", "reference"):
        leaf = images.detach().requires_grad_()
        add_noise(leaf, **plan(), backend=backend).backward(upstream)
        grads.append(leaf.grad.cpu())
    wide = {"low": -99.0, "high": 99.0}
    total = add_noise(images.double(), **plan(**wide), backend="reference").cpu()
    edge = torch.zeros_like(total, dtype=torch.bool)
    for name in ("low", "high"):
        edge |= (total - torch.tensor(NORMALISED[name]).view(3, 1, 1)).abs() < 1e-4
    assert edge.double().mean() < 1e-2
    assert torch.equal(grads[0][~edge], grads[1][~edge])
    blocked = grads[0] == 0
    assert 0.01 < blocked.double().mean() < 0.5
    assert not blocked[1].any()
    assert not blocked[0, :, 11:].any()


def test_gradient_of_an_expanded_upstream(device) -> None:
    leaf = stack(device, torch.float32, "contiguous").requires_grad_()
    add_noise(leaf, **plan(low=-99.0, high=99.0), backend="triton").sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_one_launch_each_way_and_bytes(device) -> None:
    images = stack(device, torch.float32, "contiguous").requires_grad_()
    size = images.untyped_storage().nbytes()
    tables = (3 * 24 + 3 * 3) * 8
    with trace() as record:
        out = add_noise(images, **plan(), backend="triton")
    assert record.names == ["keyed_noise"]
    assert record.bytes == size + tables  # the result and its table: no mask is kept
    with trace() as record:
        out.sum().backward()
    assert record.names == ["keyed_noise"]
    assert record.bytes == size + tables


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats_are_equal_and_rows_do_not_depend_on_the_batch(device, layout) -> None:
    images, options = stack(device, torch.float32, layout), plan()
    first, again = (add_noise(images, **options, backend="triton") for _ in range(2))
    assert torch.equal(first, again)
    alone = {k: v[2:] if isinstance(v, Tensor) else v for k, v in options.items()}
    assert torch.equal(add_noise(images[2:], **alone, backend="triton"), first[2:])


def test_an_empty_batch(device) -> None:
    none = torch.empty(0, dtype=torch.int64)
    images = torch.empty(0, 3, 4, 4, device=device)
    out = add_noise(images, none.float(), none, seed=0, epoch=0, backend="triton")
    assert out.shape == images.shape


def test_errors_come_before_a_launch(device) -> None:
    images = stack(device, torch.float32, "contiguous")
    with trace() as record:
        with pytest.raises(ValueError, match=r"backend='triton' draws by rng='philox', got rng='torch'"):
            add_noise(images, **plan(), rng="torch", backend="triton")
        with pytest.raises(
            TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch.float64"
        ):
            add_noise(images.double(), **plan(), backend="triton")
        huge = torch.empty(1, 3, 1, 1, device=device).expand(1, 3, 30000, 30000)
        one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in plan().items()}
        with pytest.raises(
            ValueError, match=r"images\[0\] has 2700000000 elements; expected fewer than 2\*\*31"
        ):
            add_noise(huge, **one, backend="triton")
    assert record.launches == []
    assert record.bytes == 0


def test_a_nan_pixel_stays_nan_and_an_empty_valid_part_is_copied(device) -> None:
    x = torch.rand(2, 3, 4, 8, device=device)
    x[0, 0, 0, 0] = float("nan")
    plan = dict(
        sigma=torch.tensor([20.4, 20.4]),
        ids=torch.tensor([1, 2]),
        seed=0,
        epoch=0,
        grey_level=1 / 255,
        high=1.0,
    )
    sizes = torch.tensor([[4, 8], [4, 0]])
    results = [add_noise(x, **plan, sizes=sizes, backend=backend) for backend in ("triton", "reference")]
    for y in results:
        assert y.isnan().nonzero().tolist() == [[0, 0, 0, 0]]
        assert torch.equal(y[1], x[1])
    torch.testing.assert_close(*results, equal_nan=True, atol=1e-5, rtol=0)
