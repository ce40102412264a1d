"""Both deformable convolutions through mmcv.ops: against scipy, plain convolution, finite differences, compiled mmcv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor

import ikd_fast.mmdet  # noqa: F401  activates compat before mmcv.ops is imported
from ikd_fast.mmdet.compat import deformable
from tests.mmdet.operator_truth import DeformConvCase as Case
from tests.mmdet.operator_truth import plain_extension, recording_torchvision, serve
from tests.tolerances import assert_near, gradcheck

CASES = {
    "plain": Case(modulated=False),
    "modulated": Case(),
    "no bias": Case(bias=False),
    "groups": Case(groups=2, deform_groups=4),
    "plain groups": Case(groups=4, deform_groups=2, modulated=False),
    "uneven": Case((3, 2), (2, 1), (2, 0), (2, 1), size=(10, 8)),
    "pointwise": Case((1, 1), padding=(0, 0), modulated=False),
    "far": Case(shift=6.0),
    "whole": Case(shift=0.0),
}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, plain_extension(monkeypatch))


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def by_loops(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """Eq. 1 of Deformable ConvNets v2, a tap of an output position at a time in float64, interpolated by scipy."""
    maps, offset, weight = (tensors[n].double().numpy() for n in ("input", "offset", "weight"))
    mask = tensors["mask"].double().numpy() if "mask" in tensors else None
    taps = case.kernel[0] * case.kernel[1]
    out = np.zeros((case.batch, case.out, *offset.shape[2:]))
    per_part, per_group = case.channels // case.deform_groups, case.channels // case.groups
    for n, i, j in np.ndindex(case.batch, *offset.shape[2:]):
        seen = np.zeros((case.channels, taps))
        for c, tap in np.ndindex(case.channels, taps):
            at = c // per_part * taps + tap
            y = (
                i * case.stride[0]
                - case.padding[0]
                + tap // case.kernel[1] * case.dilation[0]
                + offset[n, 2 * at, i, j]
            )
            x = (
                j * case.stride[1]
                - case.padding[1]
                + tap % case.kernel[1] * case.dilation[1]
                + offset[n, 2 * at + 1, i, j]
            )
            # grid-constant interpolates between the border pixels and the zeros around them
            seen[c, tap] = map_coordinates(maps[n, c], [[y], [x]], order=1, mode="grid-constant")[0]
            if mask is not None:
                seen[c, tap] *= mask[n, at, i, j]
        for o in range(case.out):
            first = o // (case.out // case.groups) * per_group
            out[n, o, i, j] = (weight[o].reshape(per_group, taps) * seen[first : first + per_group]).sum()
    result = torch.from_numpy(out)
    return result + tensors["bias"][:, None, None] if "bias" in tensors else result  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("no bias", "pointwise")])
def test_equals_the_definition(name: str) -> None:
    case = replace(CASES[name], batch=1, channels=4, out=4, size=(6, 5))
    tensors = case.tensors()
    # Some 50 float64 products of order one.
    torch.testing.assert_close(case(tensors), by_loops(case, tensors), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("far", "whole")])
def test_without_offsets_it_is_a_convolution(name: str) -> None:
    case = replace(CASES[name], shift=0.0)
    tensors = case.tensors()
    if "mask" in tensors:
        tensors["mask"] = torch.full_like(tensors["mask"], 0.5)
    ours = case.with_gradients(tensors)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    factor = 0.5 if case.modulated else 1.0
    weight = factor * leaves["weight"]
    out = F.conv2d(
        leaves["input"], weight, leaves.get("bias"), case.stride, case.padding, case.dilation, case.groups
    )
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    names = [n for n in leaves if n not in ("offset", "mask")]
    grads = torch.autograd.grad(out, [leaves[n] for n in names], upstream)
    assert_near(ours["output"], out, 1e-14)
    for n, grad in zip(names, grads, strict=True):
        assert_near(ours[n], grad, 1e-13, n)


@pytest.mark.parametrize("name", ["plain", "modulated", "uneven", "groups"])
def test_gradients(name: str) -> None:
    case = replace(CASES[name], batch=1, channels=4, out=4, size=(3, 3))
    case = replace(case, deform_groups=min(case.deform_groups, 2))
    tensors = case.tensors()
    # The derivative jumps where a sample crosses a pixel: stay a tenth away from whole numbers.
    whole = tensors["offset"].floor()
    tensors["offset"] = whole + 0.1 + 0.8 * (tensors["offset"] - whole)
    leaves = [t.requires_grad_() for t in tensors.values()]
    gradcheck(lambda *values: case(dict(zip(tensors, values, strict=True))), *leaves)


def test_the_gradient_on_a_pixel_is_towards_the_next() -> None:
    """A choice where the derivative jumps, and the one of compiled mmcv; offsets are zero when training starts."""
    case = Case((1, 1), padding=(0, 0), modulated=False, batch=1, channels=1, out=1, shift=0.0)
    tensors = case.tensors()
    grad = case.with_gradients(tensors)["offset"]
    upstream = torch.randn(1, 1, *case.size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    right = F.pad(tensors["input"], (0, 1))[..., 1:] - tensors["input"]
    down = F.pad(tensors["input"], (0, 0, 0, 1))[..., 1:, :] - tensors["input"]
    slope = torch.cat([down, right], 1) * tensors["weight"].item() * upstream
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-14)


def test_bounded_memory_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = replace(case, batch=4).tensors()
    at_once = case.with_gradients(tensors)
    columns, sizes = deformable._columns, []

    def counted(*args: object) -> Tensor:
        result = columns(*args)
        sizes.append(len(result))
        return result

    monkeypatch.setattr(deformable, "_columns", counted)
    monkeypatch.setattr(deformable, "INDEX_CHANNELS", 1)
    monkeypatch.setattr(deformable, "COLUMNS", 25 * case.channels * case.kernel[0] * case.kernel[1])
    in_parts = case.with_gradients(tensors)
    assert len(sizes) >= 16  # at least two parts of each of four images, forward and backward
    assert max(sizes) <= 25
    for name, tensor in in_parts.items():
        assert_near(tensor, at_once[name], 1e-13, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "groups"])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, name: str) -> None:
    tensors = CASES[name].tensors(dtype)
    ours = CASES[name].with_gradients(tensors)
    exact = CASES[name].with_gradients({n: t.float() for n, t in tensors.items()})
    assert ours["output"].dtype == dtype
    assert torch.equal(ours["output"], exact["output"].to(dtype))
    unit = torch.finfo(dtype).eps
    for n, grad in ours.items():
        # The upstream gradient is rounded to half a unit, and so is the result.
        assert_near(grad, exact[n], 2 * unit, n)


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_autocast_of_the_caller_does_not_round(name: str) -> None:
    tensors = CASES[name].tensors(torch.float32)
    plain = CASES[name].with_gradients(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        under = CASES[name].with_gradients(tensors)
    assert all(torch.equal(under[n], plain[n]) for n in plain)


def test_modules_of_mmcv() -> None:
    """The form in configs: ``dcn=dict(type='DCNv2')`` and RepPoints' DeformConv2d, small maps and steps included."""
    from mmcv.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack

    torch.manual_seed(0)
    maps = torch.randn(4, 4, 6, 5, requires_grad=True)
    for layer in (
        DeformConv2dPack(4, 8, 3, padding=1, im2col_step=2),
        ModulatedDeformConv2dPack(4, 8, 3, padding=1),
    ):
        out = layer(maps)
        # conv_offset starts at zero: a convolution, with masks of a half in the modulated form.
        factor = 0.5 if isinstance(layer, ModulatedDeformConv2dPack) else 1.0
        expected = factor * F.conv2d(maps, layer.weight, padding=1)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert layer.conv_offset.weight.grad.abs().sum() > 0
    tiny = DeformConv2d(4, 8, 3, padding=1)  # mmcv pads a map smaller than the kernel, and cuts the result
    out = tiny(maps[:, :, :2, :2], torch.zeros(4, 18, 2, 2))
    torch.testing.assert_close(
        out, F.conv2d(maps[:, :, :2, :2], tiny.weight, padding=1), rtol=1e-5, atol=1e-6
    )


def test_gradient_of_the_weight_alone() -> None:
    case = Case(modulated=False)
    tensors = case.tensors()
    every = case.with_gradients(tensors)
    tensors["weight"].requires_grad_()
    out = case(tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (grad,) = torch.autograd.grad(out, tensors["weight"], upstream)
    assert torch.equal(grad, every["weight"])


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_other_memory_formats(name: str) -> None:
    tensors = CASES[name].tensors()
    plain = CASES[name].with_gradients(tensors)
    last = {
        n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in tensors.items()
    }
    assert not last["weight"].is_contiguous()
    for n, tensor in CASES[name].with_gradients(last).items():
        assert_near(tensor, plain[n], 1e-14, n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"offset": t["offset"][:, 2:]}, r"expects offset \(2, 18, 9, 7\), got \(2, 16, 9, 7\)"),
        (lambda t: t | {"mask": t["mask"][..., 1:]}, r"expects mask \(2, 9, 9, 7\), got \(2, 9, 9, 6\)"),
        (lambda t: t | {"weight": t["weight"][:, 1:]}, r"expects weight \(12, 8, 3, 3\), got \(12, 7, 3, 3\)"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_named(change: Callable[[dict], dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case()(change(Case().tensors()))


def test_groups_that_do_not_divide_are_named() -> None:
    tensors = Case().tensors()
    with pytest.raises(ValueError, match="expects input channels divisible by deform_groups, got 8 and 3"):
        replace(Case(), deform_groups=3)(tensors)
    with pytest.raises(ValueError, match="expects input channels divisible by groups, got 8 and 5"):
        replace(Case(), groups=5)(tensors)


# Not "whole": on a pixel the stand-in may take the other derivative.
@pytest.mark.parametrize("name", [n for n in CASES if n != "whole"])
def test_through_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torchvision that is checked against ours on the way; every gradient included."""
    from ikd_fast.mmdet.compat import operators

    case = CASES[name]
    tensors = case.tensors()
    plain = case.with_gradients(tensors)
    ops = recording_torchvision()
    monkeypatch.setattr(operators, "find_torchvision", lambda: (ops, None))
    extension, providers = operators.build_extension()
    assert [p for n, p in providers.items() if "deform_conv" in n] == ["torchvision"] * 5
    serve(monkeypatch, extension)
    served = case.with_gradients(tensors)
    # Forward, and backward once for all tensors or, in the plain form, for positions and weight apart.
    assert [name for name, _ in ops.calls] == ["deform_conv2d"] * (2 if case.modulated else 3)
    for _, arguments in ops.calls:
        for name in ("input", "offset", "weight", "mask"):
            value, expected = arguments.pop(name), tensors.get(name)
            if name == "weight" and not case.modulated and value.shape == expected.shape and not value.any():
                continue  # its value does not enter its gradient
            assert (value is None) == (expected is None)
            assert expected is None or torch.equal(value, expected)
        assert arguments == {
            "bias": None, "stride": case.stride, "padding": case.padding, "dilation": case.dilation,
        }  # fmt: skip
    for name, tensor in served.items():
        assert_near(tensor, plain[name], 1e-12, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_compiled_mmcv(case: Case, dtype, monkeypatch, compiled_operators) -> None:
    larger = replace(case, channels=16, out=24, size=(23, 30))
    tensors = larger.tensors(dtype)
    ours = larger.with_gradients(tensors)
    serve(monkeypatch, compiled_operators)
    compiled = larger.with_gradients(tensors)
    for name, tensor in ours.items():
        # Sums of some hundred terms in another order; offsets amplify a coordinate's rounding by the map's slope.
        assert_near(tensor, compiled[name], 1e-5 if dtype == torch.float32 else 1e-13, name)
