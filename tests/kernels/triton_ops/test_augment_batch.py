"""The augmentation kernel against the reference: layouts, dtypes, windows, noise, padding, one launch.

Without noise both compute (p - mean) / std in float32; the kernel's product with the reciprocal is corrected by its
remainder, so they differ by one unit in the last place at most, 2^-23 of values up to 3. Normals agree to 1e-5, so
unrounded noise agrees to 1e-5 sigma. Rounded to grey levels it is the same unless sigma * n is that close to a half:
about one value in a thousand at sigma 20, which then differs by one grey level. A cast to half types rounds to nearest
on a GPU and cuts off in the interpreter: one unit in the last place of the half type.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.augment import AdaptiveFreqAug, Branch
from ikd_fast.kernels import augment_batch
from ikd_fast.kernels.triton_ops.launch import trace

pytestmark = pytest.mark.usefixtures("poison")

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIGMA = 20.4
SIZES = [(18, 50), (17, 72), (1, 1), (9, 64), (5, 3)]
WINDOWS = [(0, 0, 50, 18), (3, 2, 70, 15), (0, 0, 1, 1), (0, 0, 64, 9), (0, 0, 3, 5)]
FLIPS = [False, True, True, True, False]
UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def images(device, layout: str = "HWC", sizes=SIZES) -> list[Tensor]:
    """``view``: CHW views of HWC images; ``cut``: HWC views inside larger ones, every second row and column."""
    g = torch.Generator().manual_seed(0)
    hwc = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=g).to(device) for h, w in sizes]
    if layout == "CHW":
        return [x.permute(2, 0, 1).contiguous() for x in hwc]
    if layout == "view":
        return [x.permute(2, 0, 1) for x in hwc]
    if layout == "cut":
        large = [x.new_zeros(2 * x.shape[0] + 1, 2 * x.shape[1], 4) for x in hwc]
        for big, x in zip(large, hwc, strict=True):
            big[1::2, ::2, 1:] = x
        return [big[1::2, ::2, 1:] for big in large]
    return hwc


def plan(sigmas=(SIGMA, 0.0, SIGMA, SIGMA, 0.0), count: int = 5) -> dict:
    return {
        "window": torch.tensor(WINDOWS[:count]),
        "flip": torch.tensor(FLIPS[:count]),
        "sigma": torch.tensor(sigmas[:count]),
        "ids": torch.tensor([3, -9, 2**62, 0, 77][:count]),
        "seed": 2**63 + 11,
        "epoch": 4,
    }


def both(given, **options) -> tuple[Tensor, Tensor]:
    kernel, reference = (augment_batch(given, **options, backend=b) for b in ("triton", "reference"))
    assert kernel.shape == reference.shape
    assert kernel.stride() == reference.stride()
    assert kernel.dtype == reference.dtype
    return kernel.cpu(), reference.cpu()


def assert_close(kernel: Tensor, reference: Tensor, absolute: float = 0.0) -> None:
    """Within two units in the last place (of the interpreter's unfused products), plus ``absolute``."""
    assert not kernel.isnan().any()
    bound = 2 * UNIT[kernel.dtype] * reference.double().abs() + absolute
    assert ((kernel.double() - reference.double()).abs() <= bound).all()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("HWC", d) for d in UNIT] + [(name, torch.float32) for name in ("CHW", "view", "cut")],
    ids=str,
)
def test_no_noise(device, layout, dtype, channels_last) -> None:
    options = {**plan([0.0] * 5), "mean": MEAN, "std": STD, "pad_value": -1.5}
    name = "CHW" if layout in ("CHW", "view") else "HWC"
    options.update(layout=name, dtype=dtype, channels_last=channels_last, swap_channels=layout != "CHW")
    assert_close(*both(images(device, layout), **options), absolute=2.0**-22)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_unrounded_noise(device, dtype, channels_last) -> None:
    options = {
        **plan((0.0, 0.0, SIGMA, SIGMA, SIGMA)),
        "dtype": dtype,
        "channels_last": channels_last,
        "round_noise": False,
    }
    assert_close(*both(images(device), **options), absolute=1e-5 * SIGMA)


@pytest.mark.parametrize(("layout", "swap"), [("HWC", False), ("CHW", True), ("cut", True)])
def test_noise_in_grey_levels(device, layout, swap) -> None:
    options = {**plan(), "swap_channels": swap, "layout": "CHW" if layout == "CHW" else "HWC"}
    kernel, reference = both(images(device, layout), **options)
    assert torch.equal(kernel, kernel.round())
    moved = (kernel - reference).abs()
    assert moved.max() <= 1
    assert (moved > 0).double().mean() < 2e-3
    assert (kernel[0, :, :18, :50] - images("cpu")[0].permute(2, 0, 1)).abs().max() > SIGMA


@pytest.mark.parametrize(("height", "width"), [(18, 67), (24, 72), (33, 128)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_output_sizes(device, height, width, channels_last) -> None:
    """Rows that are no multiple of 16 bytes, and sizes beyond any image."""
    options = {
        **plan(),
        "size": (height, width),
        "mean": MEAN,
        "std": STD,
        "round_noise": False,
        "pad_value": 7.0,
    }
    kernel, reference = both(images(device), channels_last=channels_last, **options)
    assert_close(kernel, reference, absolute=1e-5 * SIGMA / min(STD) + 2.0**-22)
    for i, (x0, y0, x1, y1) in enumerate(WINDOWS):
        assert (kernel[i, :, y1 - y0 :] == 7).all()
        assert (kernel[i, :, :, x1 - x0 :] == 7).all()


def test_strong_noise_is_clamped_and_rounded_as_the_references(device) -> None:
    """Noise beyond 2^22 grey levels, where a float32 has no fractions left, saturates like any other."""
    options = plan([1e7, 0.0, 1e38, 1e7, 0.0])
    kernel, reference = both(images(device), **options)
    inside = kernel[0, :, :18, :50]
    assert ((inside == 0) | (inside == 255)).double().mean() > 0.99
    assert ((kernel - reference).abs() > 1).double().mean() < 1e-3


@pytest.mark.parametrize("batch", [1, 5])
def test_the_chain_of_the_library(device, batch) -> None:
    """AdaptiveFreqAug.apply on the CPU, channel order, normalise, pad; noise may round the other way on a device."""
    sizes = [(40, 41), (31, 37), (40, 44), (17, 51), (20, 30)][:batch]
    boxes = [
        torch.tensor(b)
        for b in ([[0.0, 0, 40, 40]], [[4.0, 4, 20, 20]], [[0.0, 0, 40, 40]], [[1.0, 1, 9, 9]])
    ]
    boxes = [*boxes, torch.zeros(0, 4)][:batch]
    aug = AdaptiveFreqAug(noise_prob=1.0, hflip_prob=0.5, seed=2)
    made = aug.plan(boxes, sizes, ids=range(batch), epoch=1)
    if batch > 1:
        assert set(made.branch.tolist()) == {Branch.CROP, Branch.NOISE}
        assert 0 < made.flip.sum() < batch
    given = images(device, sizes=sizes)
    kernel = augment_batch(
        given, **made.kernel_args(), swap_channels=True, mean=MEAN, std=STD, backend="triton"
    ).cpu()
    done, _ = aug.apply([x.cpu() for x in given], [{"boxes": b} for b in boxes], made)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    wanted = torch.zeros_like(kernel)
    for row, image in zip(wanted, done, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = (image.permute(2, 0, 1).flip(0).float() - mean) / std
    levels = (kernel - wanted).abs() * std
    assert levels.max() < 1.001
    assert (levels > 1e-4).double().mean() < 2e-3


def test_one_launch_whatever_the_batch(device) -> None:
    for count in (1, 5):
        with trace() as record:
            out = augment_batch(images(device)[:count], **plan(count=count), backend="triton")
        assert record.names == ["augment_batch_forward"]
        assert record.bytes == out.untyped_storage().nbytes() + count * 16 * 8  # the output and its table


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_repeats_are_equal_and_rows_do_not_depend_on_the_batch(device, channels_last) -> None:
    given, options = images(device), {**plan(), "size": (24, 72), "channels_last": channels_last}
    first, again = (augment_batch(given, **options, backend="triton") for _ in range(2))
    assert torch.equal(first, again)
    order = [4, 2, 0]
    moved = {k: v[order] if isinstance(v, Tensor) else v for k, v in options.items()}
    assert torch.equal(augment_batch([given[i] for i in order], **moved, backend="triton"), first[order])


def test_errors_come_before_a_launch(device) -> None:
    with trace() as record:
        with pytest.raises(ValueError, match=r"backend='triton' draws by rng='philox', got rng='torch'"):
            augment_batch(images(device), **plan(), rng="torch", backend="triton")
        with pytest.raises(
            ValueError, match=r"sigma\[0\]: expected a finite number >= 0 of grey levels, got nan"
        ):
            augment_batch(images(device), **plan([float("nan")] * 5), backend="triton")
        huge = torch.empty(1, 1, 3, dtype=torch.uint8, device=device).expand(30000, 30000, 3)
        one = {**plan([0.0], count=1), "window": torch.tensor([[0, 0, 9, 9]])}
        with pytest.raises(
            ValueError, match=r"images\[0\] has 2700000000 elements; expected fewer than 2\*\*31"
        ):
            augment_batch([huge], **one, backend="triton")
        with pytest.raises(
            ValueError, match=r"the output has .* elements; expected fewer than 2\*\*31 an image"
        ):
            augment_batch(images(device)[:1], **plan([0.0], count=1), size=(40000, 40000), backend="triton")
    assert record.launches == []
    assert record.bytes == 0
