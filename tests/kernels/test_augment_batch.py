"""The fused path equals AdaptiveFreqAug.apply followed by channel order, normalise and pad."""

from __future__ import annotations

import pytest
import torch

from ikd_fast.augment import AdaptiveFreqAug, Branch
from ikd_fast.kernels import augment_batch
from ikd_fast.kernels.ops import augment_batch as op
from ikd_fast.kernels.reference import add_noise as reference

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIZES = [(63, 100), (60, 37), (80, 64), (33, 51)]
BOXES = [[[5, 5, 60, 50]], [[4, 4, 20, 20]], [[0, 0, 40, 40], [1, 1, 9, 9]], []]


@pytest.fixture
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator) for h, w in SIZES]


@pytest.fixture
def aug() -> AdaptiveFreqAug:
    return AdaptiveFreqAug(noise_prob=1.0, hflip_prob=0.5, seed=2)


def expected(aug, images, plan, pad_value: float) -> torch.Tensor:
    targets = [{"boxes": torch.tensor(b, dtype=torch.float32).reshape(-1, 4)} for b in BOXES]
    done, _ = aug.apply(images, targets, plan)
    height, width = (-(-max(s) // 32) * 32 for s in zip(*plan.out_sizes, strict=True))
    out = torch.full((len(images), 3, height, width), pad_value)
    for row, image in zip(out, done, strict=True):
        rgb = image.permute(2, 0, 1).flip(0).float()
        rgb = (rgb - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        row[:, : rgb.shape[1], : rgb.shape[2]] = rgb
    return out


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("pad_value", [0.0, -1.5])
def test_equals_apply_then_normalise(aug, images, layout: str, pad_value: float) -> None:
    plan = aug.plan(BOXES, SIZES, ids=[3, 8, 5, 6], epoch=1)
    assert {Branch.CROP, Branch.NOISE} == set(plan.branch.tolist())
    assert plan.flip.any()
    assert not plan.flip.all()
    given = images if layout == "HWC" else [x.permute(2, 0, 1).contiguous() for x in images]
    args = {**plan.kernel_args(), "mean": MEAN, "std": STD, "swap_channels": True, "pad_value": pad_value}
    got = augment_batch(given, layout=layout, **args)
    assert torch.equal(got, expected(aug, images, plan, pad_value))
    last = augment_batch(given, layout=layout, channels_last=True, dtype=torch.bfloat16, **args)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, got.bfloat16())


def test_unrounded_noise_equals_float_apply(images) -> None:
    """round_noise=False adds what apply adds to the same image given as floats 0..255."""
    aug = AdaptiveFreqAug(noise_prob=1.0, value_range=(0, 255), seed=2)
    plan = aug.plan([[], []], SIZES[:2], ids=[1, 2], epoch=0)
    want = aug.apply_noise([x.permute(2, 0, 1).float() for x in images[:2]], plan)
    got = augment_batch(images[:2], **plan.kernel_args(), round_noise=False, divisor=1)
    for i, (h, w) in enumerate(SIZES[:2]):
        assert torch.equal(got[i, :, :h, :w], want[i])
    assert not torch.equal(got, got.round())


def test_fixed_size(aug, images) -> None:
    plan = aug.plan(BOXES, SIZES, ids=[3, 8, 5, 6], epoch=1)
    got = augment_batch(images, **plan.kernel_args(), size=(128, 160))
    small = augment_batch(images, **plan.kernel_args())
    h, w = small.shape[-2:]
    assert torch.equal(got[:, :, :h, :w], small)
    assert got[:, :, h:].abs().max() == 0 == got[:, :, :, w:].abs().max()


@pytest.mark.parametrize("chunk", [1, 75])
def test_pieces_of_rows_change_nothing(monkeypatch, aug, images, chunk: int) -> None:
    plan = aug.plan(BOXES, SIZES, ids=[3, 8, 5, 6], epoch=1)
    for rng in ("philox", "torch"):
        args = {**plan.kernel_args(), "mean": MEAN, "std": STD, "rng": rng}
        want = augment_batch(images, **args)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "chunk_blocks", lambda device: chunk)
            assert torch.equal(augment_batch(images, **args), want)


def test_any_strides_and_no_change_to_the_input(aug, images) -> None:
    plan = aug.plan(BOXES, SIZES, ids=[3, 8, 5, 6], epoch=1)
    args = {**plan.kernel_args(), "mean": MEAN, "std": STD}
    before, want = [x.clone() for x in images], augment_batch(images, **args)
    assert torch.equal(augment_batch([x.permute(2, 0, 1) for x in images], layout="CHW", **args), want)
    wide = [torch.stack([x, x.flip(0)], 2) for x in images]
    assert torch.equal(augment_batch([x[:, :, 0] for x in wide], **args), want)
    assert all(torch.equal(a, b) for a, b in zip(images, before, strict=True))


def test_opcheck(aug, images) -> None:
    plan = aug.plan(BOXES, SIZES, ids=[3, 8, 5, 6], epoch=1)
    rows = (plan.window, plan.flip, plan.sigma, plan.ids, -5, 3)
    for channels_last, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        rest = (96, 128, 0.5, dtype, channels_last, True, "philox", "auto")
        torch.library.opcheck(op._op, (images, *rows, True, True, list(MEAN), list(STD), *rest))


def test_compiled_equals_eager(aug, images) -> None:
    plan = aug.plan(BOXES, SIZES, ids=[3, 8, 5, 6], epoch=1).kernel_args()

    def function(given, window, flip, sigma, ids, size):
        numbers = {"seed": 2**64 - 1, "epoch": 1, "mean": MEAN, "std": STD, "size": size}
        return augment_batch(given, window, flip, sigma, ids, **numbers) * 2

    args = images, *(plan[k] for k in ("window", "flip", "sigma", "ids"))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args, (96, 128)), function(*args, (96, 128)))
    with pytest.raises(Exception, match=r"under torch\.compile .* write size=\(H, W\)"):
        compiled(*args, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "at least one"),
        ({"layout": "NHWC"}, "layout must be one of 'HWC', 'CHW', got 'NHWC'"),
        ({"divisor": 0}, "divisor must be >= 1, got 0"),
        ({"size": (8, 8)}, r"size: expected at least .*got \(8, 8\)"),
        ({"mean": (1, 2, 3)}, "three numbers each or neither"),
        ({"sigma": torch.zeros(2)}, r"sigma: expected torch\.float32 \[1\] .*\[2\]"),
        ({"images": [torch.zeros(9, 9, 3)]}, r"images\[0\]: expected uint8 HWC .*torch\.float32"),
        ({"window": torch.tensor([[0, 0, 10, 9]])}, r"window\[0\]: expected 0 <= x0 < x1 <= 9"),
        ({"window": torch.tensor([[0, 0, 8, 9]]), "sigma": torch.ones(1)}, "keeps its whole window"),
        (
            {"window": torch.tensor([[3, 0, 3, 9]])},
            r"window\[0\]: expected 0 <= x0 < x1 .*got \[3, 0, 3, 9\]",
        ),
        ({"window": torch.tensor([[0, -1, 9, 9]])}, r"window\[0\]: .*got \[0, -1, 9, 9\]"),
        (
            {"sigma": torch.tensor([-0.5])},
            r"sigma\[0\]: expected a finite number >= 0 of grey levels, got -0\.5",
        ),
        ({"sigma": torch.tensor([float("nan")])}, r"sigma\[0\]: .*got nan"),
        ({"mean": MEAN, "std": (1, 0, 1)}, r"std: expected three finite numbers > 0, got \(1, 0, 1\)"),
        ({"mean": MEAN, "std": (1, 1, float("nan"))}, r"std: expected three finite numbers > 0, got"),
        ({"seed": -1}, r"seed must be in 0\.\.2\*\*64-1, got -1"),
        ({"epoch": -1}, r"epoch must be in 0\.\.2\*\*32-1, got -1"),
        ({"rng": "numpy"}, r"rng must be one of 'philox', 'torch', got 'numpy'"),
        ({"rng": "torch", "backend": "triton"}, r"backend='triton' draws by rng='philox', got rng='torch'"),
        ({"backend": "gpu"}, r"backend must be one of 'auto', 'triton', 'reference', got 'gpu'"),
        ({"dtype": torch.float64}, r"expected float32, float16 or bfloat16 as dtype, got torch\.float64"),
        (
            {"flip": torch.zeros(1)},
            r"flip: expected torch\.bool \[1\] on the CPU for 1 images, got torch\.float32",
        ),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    args = {
        "images": [torch.zeros(9, 9, 3, dtype=torch.uint8)],
        "window": torch.tensor([[0, 0, 9, 9]]),
        "flip": torch.tensor([False]),
        "sigma": torch.zeros(1),
        "ids": torch.tensor([1]),
        "seed": 0,
        "epoch": 0,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        augment_batch(**{**args, **change})
