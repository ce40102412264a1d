"""Deformable convolution as a sampled im2col and a matrix product, forward and backward.

At output position p, tap k of the kernel reads the input at ``p * stride - padding + k * dilation + offset[p, k]`` by
bilinear interpolation (zero outside the map), times ``mask[p, k]`` in the modulated form (Dai et al., "Deformable
Convolutional Networks", eq. 2; Zhu et al., "Deformable ConvNets v2", eq. 1). The columns of at most ``COLUMNS`` values
are held at once, however large the maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .sampling import bilinear_corners, blocks, pixel_rows, weighted_rows, working_dtype

# Values of sampled columns (positions x taps x channels) held at once: 64 MiB in float32. Their positions and weights
# take as much as 64 channels.
COLUMNS = 2**24
INDEX_CHANNELS = 64


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution as (vertical, horizontal), and its two kinds of groups."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def output_size(self, input: Tensor) -> tuple[int, int]:
        h, w = (
            (input.size(2 + d) + 2 * self.padding[d] - self.dilation[d] * (self.kernel[d] - 1) - 1)
            // self.stride[d]
            + 1
            for d in range(2)
        )
        return h, w


@dataclass(frozen=True)
class Convolution:
    """The tensors of one call; ``mask`` and ``bias`` are None where there are none."""

    input: Tensor  # [N, C, H, W]
    offset: Tensor  # [N, deform_groups * taps * 2, Ho, Wo], the pairs as (dy, dx)
    mask: Tensor | None  # [N, deform_groups * taps, Ho, Wo]
    weight: Tensor  # [O, C / groups, kh, kw]
    bias: Tensor | None  # [O]
    geometry: Geometry

    def check(self, out: Tensor) -> None:
        """Raise ValueError for shapes that do not belong together; ``out`` is the output or its gradient."""
        g = self.geometry
        if self.input.dim() != 4:
            raise ValueError(
                f"deformable convolution expects input [N, C, H, W], got {tuple(self.input.shape)}"
            )
        n, channels = self.input.shape[:2]
        for name, count, of, total in (
            ("groups", g.groups, "input", channels),
            ("groups", g.groups, "output", self.weight.size(0)),
            ("deform_groups", g.deform_groups, "input", channels),
        ):
            if count < 1 or total % count:
                raise ValueError(
                    f"deformable convolution expects {of} channels divisible by {name}, got {total} and {count}"
                )
        size = g.output_size(self.input)
        if min(size) < 1:
            raise ValueError(
                f"deformable convolution of {tuple(self.input.shape)} with {g} has no output: {size}"
            )
        for name, tensor, shape in (
            ("weight", self.weight, (self.weight.size(0), channels // g.groups, *g.kernel)),
            ("offset", self.offset, (n, 2 * g.deform_groups * g.taps, *size)),
            ("mask", self.mask, (n, g.deform_groups * g.taps, *size)),
            ("output", out, (n, self.weight.size(0), *size)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"deformable convolution of input {tuple(self.input.shape)} with {g} expects {name} {shape}, "
                    f"got {tuple(tensor.shape)}"
                )

    def working(self) -> Convolution:
        """The same in the working dtype, apart from any graph."""
        dtype = working_dtype(self.input)
        return replace(
            self,
            input=self.input.detach().to(dtype),
            offset=self.offset.detach().to(dtype),
            mask=None if self.mask is None else self.mask.detach().to(dtype),
            weight=self.weight.detach().to(dtype),
            bias=None if self.bias is None else self.bias.detach().to(dtype),
        )

    def parts(self) -> Iterator[tuple[slice, Convolution]]:
        """The same cut along the batch into parts of at most ``COLUMNS`` values, at least one image each."""
        h, w = self.geometry.output_size(self.input)
        for images in blocks(len(self.input), self.positions_at_once() // (h * w)):
            mask = None if self.mask is None else self.mask[images]
            yield images, replace(self, input=self.input[images], offset=self.offset[images], mask=mask)

    def positions_at_once(self) -> int:
        """How many output positions have ``COLUMNS`` values."""
        g = self.geometry
        return COLUMNS // (g.taps * max(self.input.size(1), INDEX_CHANNELS * g.deform_groups))


def _positions_first(tensor: Tensor, geometry: Geometry) -> Tensor:
    """[N, deform_groups * taps * k, H, W] -> [N * H * W, deform_groups, taps, k]."""
    n, channels, h, w = tensor.shape
    parts = (geometry.deform_groups, geometry.taps, channels // geometry.deform_groups // geometry.taps)
    return tensor.reshape(n, *parts, h, w).permute(0, 4, 5, 1, 2, 3).reshape(n * h * w, *parts)


def _columns(call: Convolution, at: slice) -> Tensor:
    """What the taps of some output positions see: [positions, taps, C].

    Positions are counted over images, rows and columns. Differentiable in input, offset and mask.
    """
    g = call.geometry
    height, width = call.input.shape[2:]
    out_h, out_w = g.output_size(call.input)
    position = torch.arange(at.start, at.stop, device=call.input.device)
    tap = torch.arange(g.taps, device=call.input.device)
    offset = _positions_first(call.offset, g)[at]
    base_y = (position // out_w % out_h * g.stride[0] - g.padding[0])[:, None, None]
    base_x = (position % out_w * g.stride[1] - g.padding[1])[:, None, None]
    y = base_y + tap // g.kernel[1] * g.dilation[0] + offset[..., 0]
    x = base_x + tap % g.kernel[1] * g.dilation[1] + offset[..., 1]
    inside = (y > -1) & (x > -1) & (y < height) & (x < width)
    index, weight = bilinear_corners(y, x, inside, height, width)
    if call.mask is not None:
        weight = weight * _positions_first(call.mask, g)[at]
    image = position // (out_h * out_w)
    group = torch.arange(g.deform_groups, device=call.input.device)
    index = index + ((image[:, None] * g.deform_groups + group) * (height * width))[..., None, None]
    table = pixel_rows(call.input, g.deform_groups)
    columns = weighted_rows(table, index.flatten(0, -2), weight.flatten(0, -2))
    return columns.view(len(position), g.deform_groups, g.taps, -1).transpose(1, 2).flatten(2)


def _product(columns: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Columns [positions, taps, C] and a kernel [O, C / groups, kh, kw] -> [positions, O]."""
    positions, taps, channels = columns.shape
    out = weight.size(0)
    left = columns.view(positions, taps, groups, channels // groups).permute(2, 0, 1, 3)
    right = weight.reshape(groups, out // groups, channels // groups, taps).permute(0, 3, 2, 1)
    product = left.reshape(groups, positions, -1) @ right.reshape(groups, -1, out // groups)
    return product.transpose(0, 1).flatten(1)


def _pieces(call: Convolution, torchvision_ops: Any) -> Iterator[tuple[slice, Tensor]]:
    """Output positions, and the convolution there [positions, O] without its bias; differentiable in every tensor."""
    g = call.geometry
    h, w = g.output_size(call.input)
    total = len(call.input) * h * w
    if torchvision_ops is not None:
        # Both kinds of groups follow from the shapes.
        result = torchvision_ops.deform_conv2d(
            call.input, call.offset, call.weight, None, g.stride, g.padding, g.dilation, call.mask
        )
        yield slice(0, total), result.permute(0, 2, 3, 1).flatten(0, 2)
        return
    for at in blocks(total, call.positions_at_once()):
        yield at, _product(_columns(call, at), call.weight, g.groups)


def forward(call: Convolution, output: Tensor, torchvision_ops: Any = None) -> None:
    """Write the convolution into ``output`` [N, O, Ho, Wo]; half types are computed in float32."""
    call.check(output)
    call = call.working()
    h, w = output.shape[2:]
    for images, part in call.parts():
        rows = part.input.new_empty(len(part.input) * h * w, call.weight.size(0))
        for at, values in _pieces(part, torchvision_ops):
            rows[at] = values
        if call.bias is not None:
            rows += call.bias
        output[images] = rows.view(-1, h, w, call.weight.size(0)).permute(0, 3, 1, 2).to(output.dtype)


def backward(
    call: Convolution, grad_output: Tensor, wanted: Sequence[str], torchvision_ops: Any = None
) -> dict[str, Tensor]:
    """Gradients by name, in the working dtype, of the tensors ``wanted`` of ``input, offset, mask, weight``.

    The columns are sampled again, a bounded number at a time; none are kept from the forward pass.
    """
    call.check(grad_output)
    call = call.working()
    weight = call.weight.detach().requires_grad_("weight" in wanted)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted if name != "weight"}
    for images, part in call.parts():
        grad_rows = grad_output[images].to(call.input.dtype).permute(0, 2, 3, 1).flatten(0, 2)
        leaves = {name: getattr(part, name).detach().requires_grad_() for name in found}
        inputs = [*leaves.values(), weight] if weight.requires_grad else [*leaves.values()]
        with torch.enable_grad():
            for at, values in _pieces(replace(part, weight=weight, **leaves), torchvision_ops):
                # Adds to .grad: over the positions of an image for all, over the images too for the weight.
                torch.autograd.backward(values, grad_rows[at], inputs=inputs)
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            found[name].append(leaf.grad)
    grads = {name: torch.cat(parts) for name, parts in found.items()}
    return grads if weight.grad is None else grads | {"weight": weight.grad}
