"""MGD's keyed mask: the word behind each position, the zero fraction, independence; and the pyramid times it."""

from __future__ import annotations

import math

import pytest
import torch

from ikd_fast.kernels import Stream, keyed_mask, mask_maps, philox4x32, stable_id
from ikd_fast.kernels.ops import masked_l2 as masked_ops
from ikd_fast.kernels.reference.precision import full
from tests.tolerances import DTYPES, gradcheck

SHAPES = [(2, 7, 5, 6), (2, 8, 4, 8), (2, 3, 1, 1)]
KEY = {"ratio": 0.5, "seed": 3, "epoch": 2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_each_position_is_its_philox_word() -> None:
    image, level, seed, epoch, ratio = (3 << 32) + 9, 2, (1 << 32) + 5, 4, 0.65
    height, width, width4 = 3, 6, 8
    got = keyed_mask([image], height, width, ratio=ratio, level=level, seed=seed, epoch=epoch)[0, 0]
    for y in range(height):
        for x in range(width):
            index = y * width4 + x
            counter = (index // 4, image & 0xFFFFFFFF, (image >> 32) ^ (Stream.MASK + 256 * level), epoch)
            word = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[index % 4]
            u = (word >> 8) * 2.0**-24
            assert got[y, x] == (0.0 if u > 1 - ratio else 1.0), (y, x)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.45, 0.65, 0.9, 1.0])
def test_fraction_of_zeros(ratio) -> None:
    mask = keyed_mask(range(8), 100, 101, ratio=ratio, seed=11, epoch=2)
    zeros = 1.0 - mask.mean().item()
    # Four standard deviations of a binomial share; at 1.0, u = 0 alone survives (2^-24 of the draws).
    assert abs(zeros - ratio) <= 4 * math.sqrt(ratio * (1 - ratio) / mask.numel()) + 1e-5
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_a_mask_depends_on_nothing_else_in_the_batch() -> None:
    kwargs = {"ratio": 0.5, "seed": 3, "epoch": 1, "level": 1}
    batch = keyed_mask([5, 6, 7], 12, 10, **kwargs)
    for i, image in enumerate([5, 6, 7]):
        assert torch.equal(keyed_mask([image], 12, 10, **kwargs)[0], batch[i])
    assert torch.equal(keyed_mask([7, 5], 12, 10, **kwargs), batch[[2, 0]])
    # Rows begin on a block boundary: a narrower map of the same padded row length sees the same draws.
    assert torch.equal(keyed_mask([5], 12, 9, **kwargs)[0], batch[0, :, :, :9])


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 2}, {"level": 2}, {"image_ids": [6]}])
def test_masks_of_other_keys_are_uncorrelated(change) -> None:
    kwargs = {"image_ids": [5], "seed": 3, "epoch": 1, "level": 1, "height": 100, "width": 100, "ratio": 0.5}
    a, b = keyed_mask(**kwargs), keyed_mask(**{**kwargs, **change})
    agreement = (a == b).float().mean().item()
    assert abs(agreement - 0.5) < 4 * 0.5 / 100  # four standard deviations over 1e4 positions


def reference_pyramid(maps, ids, levels, **key) -> list[torch.Tensor]:
    """Map by map, the mask made and multiplied."""
    return [
        full(x) * keyed_mask(ids, *x.shape[2:], level=level, dtype=full(x).dtype, device=x.device, **key)
        for x, level in zip(maps, levels, strict=True)
    ]


def pyramid(dtype=torch.float32, shapes=SHAPES) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_draw_for_all_channels_and_no_other_change(dtype) -> None:
    maps, key = pyramid(dtype), {"ratio": 0.4, "seed": (1 << 64) - 8, "epoch": (1 << 32) - 1}
    ids, levels = [(1 << 64) - 3, -7], [3, 0, 1]
    mine = [x.clone().requires_grad_() for x in maps]
    out = mask_maps(mine, ids, levels=levels, **key)
    for got, want in zip(out, reference_pyramid(maps, ids, levels, **key), strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(got, want)
    upstream = [torch.randn_like(x) for x in out]
    grads = torch.autograd.grad(out, mine, upstream)
    for grad, want in zip(grads, reference_pyramid(upstream, ids, levels, **key), strict=True):
        assert torch.equal(grad, want.to(dtype))
    assert torch.equal(mask_maps(maps, ids, **key)[1], mask_maps(maps[1:2], ids, levels=[1], **key)[0])


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_layouts_give_the_same_and_dense_ones_stay(layout) -> None:
    maps = pyramid(shapes=SHAPES[:2])
    want = mask_maps(maps, [1, 2], **KEY)
    if layout == "channels_last":
        views = [x.to(memory_format=torch.channels_last) for x in maps]
    else:
        views = [x.repeat_interleave(2, 3)[..., ::2] for x in maps]
    for got, x, y in zip(mask_maps(views, [1, 2], **KEY), want, views, strict=True):
        assert torch.equal(got, x)
        assert layout == "strided" or got.stride() == y.stride()


def test_gradient_is_the_mask() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda x: mask_maps([x], [1, 2], **KEY)[0], x)
    mask_maps([x], [1, 2], **KEY)[0].sum().backward()
    want = keyed_mask([1, 2], 4, 5, dtype=torch.float64, **KEY)
    assert torch.equal(x.grad, want.expand_as(x))
    # linear: the gradient of the squared output differentiates on to twice the mask
    (grad,) = torch.autograd.grad(mask_maps([x], [1, 2], **KEY)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, 2 * want.expand_as(x))


def test_a_level_whose_output_is_not_used_gets_no_gradient_of_value() -> None:
    maps = [x.requires_grad_() for x in pyramid()]
    mask_maps(maps, [1, 2], **KEY)[0].sum().backward()
    assert maps[0].grad.abs().sum() > 0
    assert all(x.grad is None or not x.grad.any() for x in maps[1:])


def test_it_is_a_product() -> None:
    x = torch.full((1, 1, 8, 8), float("nan"))
    assert mask_maps([x], [1], ratio=1.0, seed=0, epoch=0)[0].isnan().all()
    x = torch.full((1, 1, 8, 8), float("inf"), dtype=torch.float16)
    (out,) = mask_maps([x], [1], **KEY)
    keep = keyed_mask([1], 8, 8, **KEY) == 1
    assert torch.equal(out.isinf(), keep)
    assert torch.equal(out.isnan(), ~keep)
    # an upstream gradient beyond fp16 is masked before it is rounded
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float16, requires_grad=True)
    (grad,) = torch.autograd.grad(mask_maps([x], [1], **KEY), x, torch.full((1, 1, 8, 8), 1e5))
    assert torch.equal(grad.isinf(), keep)
    assert not grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_registered_operation_passes_opcheck(dtype) -> None:
    maps = [x.requires_grad_() for x in pyramid(dtype)]
    out = torch.float64 if dtype == torch.float64 else torch.float32
    torch.library.opcheck(masked_ops._op, (maps, out, torch.tensor([3, -4]), [0, 2, 5], -1, 7, 0.5, "auto"))


def test_compiled_whole_equals_eager_for_any_ids() -> None:
    torch._dynamo.reset()

    def loss(maps, ids, epoch):
        out = mask_maps(maps, ids, levels=[0, 2, 3], ratio=0.5, seed=(1 << 64) - 1, epoch=epoch)
        return sum(x.square().sum() for x in out)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ids, epoch in (([1, 2], 0), ([4, 9], 1), ([stable_id("coco", 4), stable_id("voc", 4)], 1)):
        results = []
        for f in (loss, compiled):
            mine = [x.requires_grad_() for x in pyramid(torch.bfloat16)]
            value = f(mine, ids, epoch)
            results.append([value.detach(), *torch.autograd.grad(value, mine)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_new_ids_and_epochs_do_not_recompile(as_tensor) -> None:
    torch._dynamo.reset()
    graphs = []

    def step(x, ids, epoch):
        return mask_maps([x], ids, ratio=0.5, seed=0, epoch=epoch)[0]

    compiled = torch.compile(step, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    x = torch.ones(2, 3, 8, 8)
    for epoch in range(12):
        ids = [stable_id("coco", epoch) >> 1, 3 * epoch]
        given = torch.tensor([ids[0], ids[1]]) if as_tensor else ids
        assert torch.equal(compiled(x, given, epoch), mask_maps([x], ids, ratio=0.5, seed=0, epoch=epoch)[0])
    assert len(graphs) <= 3  # numbers as constants, then as inputs; 0 and 1 are always constants


def test_ids_as_a_tensor_of_the_same_bits() -> None:
    x = [torch.ones(2, 1, 8, 8)]
    want = mask_maps(x, [(1 << 64) - 5, 7], **KEY)[0]
    assert torch.equal(mask_maps(x, torch.tensor([-5, 7]), **KEY)[0], want)
    for ids in (torch.tensor([1.0, 2.0]), torch.tensor([1, 2], dtype=torch.int32), torch.ones(2, 1).long()):
        with pytest.raises(TypeError, match=r"expected image ids as int64 \[2\] on the CPU, got torch\."):
            mask_maps(x, ids, **KEY)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty(shape) -> None:
    maps = [torch.zeros(shape, requires_grad=True), torch.ones(shape[0], 2, 3, 3, requires_grad=True)]
    out = mask_maps(maps, range(shape[0]), ratio=0.5, seed=0, epoch=0)
    assert [x.shape for x in out] == [x.shape for x in maps]
    grads = torch.autograd.grad(sum(x.sum() for x in out), maps)
    assert [x.shape for x in grads] == [x.shape for x in maps]
    assert torch.equal(out[1], keyed_mask(range(shape[0]), 3, 3, ratio=0.5, level=1).expand(-1, 2, 3, 3))


def test_errors_of_keyed_mask() -> None:
    assert keyed_mask([], 4, 5, ratio=0.5).shape == (0, 1, 4, 5)
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in 0\.\.1"):
            keyed_mask([1], 4, 4, ratio=ratio)
    with pytest.raises(ValueError, match="epoch must be in"):
        keyed_mask([1], 4, 4, ratio=0.5, epoch=-1)


ZERO = torch.zeros(2, 1, 2, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_ids": [1]}, ValueError, "one image id for each of the 2 images, got 1"),
        ({"image_ids": [1, 2.0]}, TypeError, r"an image id must be an integer, got 2\.0 of float"),
        ({"ratio": 1.5}, ValueError, r"ratio, the fraction set to zero, must be in 0\.\.1, got 1\.5"),
        ({"ratio": float("nan")}, ValueError, r"in 0\.\.1, got nan"),
        ({"seed": -1}, ValueError, r"seed must be in 0\.\.2\*\*64-1, got -1"),
        ({"seed": 1 << 64}, ValueError, "seed must be in"),
        ({"epoch": 1 << 32}, ValueError, r"epoch must be in 0\.\.2\*\*32-1, got 4294967296"),
        ({"epoch": None}, TypeError, "epoch must be an integer, got None"),
        ({"levels": [0, 1]}, ValueError, "one level index for each of 1 maps, got 2"),
        ({"levels": [-1]}, ValueError, r"level indices must be in 0\.\.2\*\*24-1, got \[-1\]"),
        ({"levels": ["a"]}, TypeError, "a level index must be an integer, got 'a'"),
        ({"student": ZERO}, ValueError, r"expected a list of maps .* got a tensor \(2, 1, 2, 2\)"),
        ({"student": []}, ValueError, "one a level, got no level"),
        ({"student": [ZERO[0]]}, ValueError, r"level 0: expected a map \[N,C,H,W\], got \(1, 2, 2\)"),
        ({"student": [ZERO, ZERO[:1]]}, ValueError, r"level 1: expected a map \[2,C,H,W\], got \(1, 1"),
        ({"student": [ZERO.long()]}, TypeError, "level 0: expected a floating-point map .* got torch.int64"),
        (
            {"student": [ZERO, ZERO.half()]},
            TypeError,
            "level 1: expected torch.float32 on cpu .* torch.float16",
        ),
        ({"student": [ZERO, ZERO.to("meta")]}, ValueError, "level 1: expected .* on cpu .* on meta"),
        ({"backend": "cuda"}, ValueError, "mask_maps: backend must be one of"),
        ({"student": [ZERO.double()], "backend": "triton"}, TypeError, "got torch.float64"),
    ],
    ids=str,
)
def test_errors(changes, error, message) -> None:
    values = {"student": [ZERO], "image_ids": [1, 2], "ratio": 0.5, "seed": 0, "epoch": 0, **changes}
    with pytest.raises(error, match=message):
        mask_maps(**values)
