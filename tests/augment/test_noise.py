"""The noise: its distribution, its index, its units, and what it never touches."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from ikd_fast.augment import AdaptiveFreqAug
from ikd_fast.kernels.reference.philox import Stream, normal, philox4x32

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
H, W = 120, 147


def noisy(**options) -> AdaptiveFreqAug:
    return AdaptiveFreqAug(**{"noise_prob": 1.0, **options})


def targets(n: int = 1) -> list[dict]:
    return [{"boxes": torch.tensor([[3.0, 3, 9, 9]]), "labels": torch.tensor([1])} for _ in range(n)]


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("sigma", [20.4, 5.0])
def test_distribution(rng: str, sigma: float) -> None:
    """Mid grey, so that nothing is clamped: |n| <= 5.77 for Philox, and 127.5 / 20.4 = 6.25."""
    image = torch.full((3, H, W), 0.5)
    (out,), _ = noisy(rng=rng, noise_std=sigma, value_range=(0, 1))(
        [image], targets(), image_ids=[5], epoch=2
    )
    z = ((out.double() - 0.5) * 255 / sigma).flatten()
    n = z.numel()
    # four standard errors
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    per_channel = z.view(3, -1)
    assert (torch.corrcoef(per_channel) - torch.eye(3)).abs().max() < 4 / math.sqrt(n / 3)


def test_element_by_hand() -> None:
    """Element (c, y, x) is number (c*H + y)*W4 + x of the stream, W4 = W rounded up to a multiple of 4."""
    image = torch.full((3, H, W), 100.0)
    aug = noisy(value_range=(0, 255), seed=77)
    (out,), _ = aug([image], targets(), image_ids=[5], epoch=2)
    stride = 148
    for c, y, x in ((0, 0, 0), (0, 0, 146), (1, 7, 3), (2, 119, 146)):
        n = normal(1, seed=77, id=5, epoch=2, stream=Stream.NOISE, offset=(c * H + y) * stride + x)
        # one rounding of a float32 near 100
        assert abs(out[c, y, x].item() - (100 + 20.4 * n.item())) < 2e-5


def test_torch_generator_is_seeded_by_the_stream() -> None:
    words = philox4x32((0, 5, Stream.NOISE, 2), (77, 0))
    field = torch.randn((3, H, W), generator=torch.Generator().manual_seed(words[0] | words[1] << 32))
    (out,), _ = noisy(rng="torch", value_range=(0, 255), seed=77)(
        [torch.full((3, H, W), 100.0)], targets(), image_ids=[5], epoch=2
    )
    torch.testing.assert_close(out, 100 + 20.4 * field, rtol=0, atol=2e-5)


def test_clamp_and_rounding() -> None:
    image = torch.randint(0, 256, (3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (out,), _ = noisy(seed=1)([image], targets(), image_ids=[5], epoch=0)
    field = normal((3, H, 148), seed=1, id=5, epoch=0, stream=Stream.NOISE)[..., :W]
    assert out.dtype == torch.uint8
    expected = (image.double() + (field * 20.4).round().double()).clamp(0, 255)
    assert torch.equal(out.double(), expected)
    assert ((out == 0) & (image > 0)).any()
    assert ((out == 255) & (image < 255)).any()


def test_units_give_the_same_result() -> None:
    """uint8, 0..255, 0..1, -1..1 and normalised, compared in grey levels."""
    pixels = torch.randint(0, 256, (3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    forms = {
        "0..255": (pixels.float(), {"value_range": (0, 255)}),
        "0..1": (pixels / 255, {"value_range": (0, 1)}),
        "-1..1": (pixels / 127.5 - 1, {"value_range": (-1, 1)}),
        "normalised": ((pixels - mean) / std, {"mean": MEAN, "std": STD}),
        "float64": (pixels.double() / 255, {"value_range": (0, 1)}),
    }
    (want,), _ = noisy()([pixels], targets(), image_ids=[5], epoch=0)
    (unrounded,), _ = noisy(value_range=(0, 255))([pixels.float()], targets(), image_ids=[5], epoch=0)
    for name, (image, scale) in forms.items():
        aug = noisy(round_noise=True, **scale)
        (out,), _ = aug([image], targets(), image_ids=[5], epoch=0)
        assert out.dtype == image.dtype
        # float32 roundings of values up to 255
        assert (aug.units.to_pixels(out) - want).abs().max() < 1e-4, name
        (free,), _ = noisy(**scale)([image], targets(), image_ids=[5], epoch=0)
        assert (aug.units.to_pixels(free) - unrounded).abs().max() < 1e-4, name
    assert (unrounded - want).abs().max() <= 0.5 + 1e-4  # the rounding alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_added_in_float32(dtype: torch.dtype) -> None:
    image = (torch.rand(3, H, W, generator=torch.Generator().manual_seed(0))).to(dtype)
    (out,), _ = noisy(value_range=(0, 1))([image], targets(), image_ids=[5], epoch=0)
    (want,), _ = noisy(value_range=(0, 1))([image.float()], targets(), image_ids=[5], epoch=0)
    assert torch.equal(out, want.to(dtype))


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_noise_does_not_depend_on_padding_batch_or_flip(rng: str) -> None:
    aug = noisy(rng=rng, value_range=(0, 1))
    image = torch.rand(3, H, W, generator=torch.Generator().manual_seed(0))
    plan = aug.plan([[[3, 3, 9, 9]]], [(H, W)], [5], 0)
    (want,), _ = aug.apply([image], targets(), plan)
    stack = torch.zeros(3, 3, 160, 192)
    stack[1, :, :H, :W] = image
    padded = [{"boxes": [], "size": (160, 192)}, {**targets()[0], "size": (H, W)}, {"boxes": []}]
    out, _ = aug(stack, padded, image_ids=[8, 5, 9], epoch=0)
    assert torch.equal(out[1, :, :H, :W], want)
    assert out[1, :, H:].abs().sum() == 0 == out[1, :, :, W:].abs().sum()
    mirrored = noisy(rng=rng, value_range=(0, 1), hflip_prob=1.0)
    (flipped,), _ = mirrored([image], targets(), image_ids=[5], epoch=0)
    assert torch.equal(flipped, want.flip(-1))


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("form", ["list", "stack", "uint8"])
def test_apply_is_geometry_then_noise_and_replays(rng: str, form: str) -> None:
    n = 10
    stack = torch.rand(n, 3, H, W, generator=torch.Generator().manual_seed(0))
    images = stack if form == "stack" else list((stack * 255).byte() if form == "uint8" else stack)
    given = targets(n)
    for target in given[::2]:
        target["boxes"] = torch.tensor([[3.0, 3, 90, 90]])
    aug = AdaptiveFreqAug(noise_prob=0.6, hflip_prob=0.5, value_range=(0, 1), rng=rng, seed=3)
    plan = aug.plan_for(images, given, range(n), 4)
    assert 0 < plan.crop_frac < 1
    assert 0 < plan.noise_frac < 1
    geo, geo_targets = aug.apply_geometry(images, given, plan)
    noise = aug.apply_noise(geo, plan, plan.out_sizes)
    whole, whole_targets = aug.apply(images, given, plan)
    called, _ = aug(images, given, image_ids=range(n), epoch=4)
    replayed, _ = aug(images, given, plan=plan)
    for i in range(n):
        for other in (noise, called, replayed):
            assert torch.equal(other[i], whole[i])
        assert torch.equal(geo_targets[i]["boxes"], whole_targets[i]["boxes"])
        assert torch.equal(geo[i], whole[i]) == (plan.sigma[i].item() == 0)
    if form == "list":  # the noise of a list added after padding it
        padded = torch.zeros(n, 3, 160, 160)
        for i, image in enumerate(geo):
            padded[i, :, : image.shape[1], : image.shape[2]] = image
        out = aug.apply_noise(padded, plan)
        assert all(torch.equal(out[i, :, : x.shape[1], : x.shape[2]], x) for i, x in enumerate(whole))
        assert out.sum() == pytest.approx(sum(x.sum().item() for x in whole), rel=1e-4)


def test_apply_reads_nothing_back_from_the_device() -> None:
    """On the meta device anything that needs a value on the host (item, nonzero, a copy back) raises."""
    given = targets(6)
    for target in given[::2]:
        target["boxes"] = torch.tensor([[3.0, 3, 90, 90]])
    stack = torch.zeros(6, 3, H, W, dtype=torch.uint8, device="meta")
    aug = AdaptiveFreqAug(noise_prob=0.7, hflip_prob=0.5)
    plan = aug.plan_for(stack, given, range(6), 0)
    assert 0 < plan.noise_frac < 1
    assert plan.flip.any()
    out, new_targets = aug.apply(stack, given, plan)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.uint8, stack.shape)
    assert [t["size"] for t in new_targets] == plan.out_sizes
    images, _ = aug.apply(list(stack), given, plan)
    assert [tuple(x.shape[1:]) for x in images] == plan.out_sizes
    with pytest.raises(RuntimeError, match="meta"):
        out.sum().item()
