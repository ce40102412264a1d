"""Deformable convolution, plain and modulated, with the call signatures of mmcv's compiled operators.

Argument names are the compiled ones: some callers pass them by keyword. ``columns`` and ``ones`` are buffers of the
compiled code, left as they are; ``im2col_step`` is its number of images at once, bounded here by memory instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .deformable import Convolution, Geometry, backward, forward
from .sampling import outside_autocast, working_dtype


@outside_autocast
def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int, torchvision_ops: Any = None,
) -> None:  # fmt: skip
    """Write the deformable convolution into ``output``; the drop-in for ``mmcv._ext.deform_conv_forward``.

    Args:
        input: [N, C, H, W].
        weight: [O, C / group, kH, kW].
        offset: [N, deformable_group * kH * kW * 2, Ho, Wo] in pixels of the input, the pairs as (dy, dx).
        output: [N, O, Ho, Wo], overwritten.
        torchvision_ops: ``torchvision.ops``, used when given.
    """
    geometry = Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    forward(Convolution(input, offset, None, weight, None, geometry), output, torchvision_ops)


@outside_autocast
def deform_conv_backward_input(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor, weight: Tensor,
    columns: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int, torchvision_ops: Any = None,
) -> None:  # fmt: skip
    """Add the gradient of the input to ``gradInput``, write that of the offsets into ``gradOffset``.

    Where a sample lies exactly on a pixel its gradient is the one towards the next pixel, as in the compiled operator.
    """
    geometry = Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    call = Convolution(input, offset, None, weight, None, geometry)
    grads = backward(call, gradOutput, ("input", "offset"), torchvision_ops)
    gradInput.add_(grads["input"])
    gradOffset.copy_(grads["offset"])


@outside_autocast
def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, scale: float, im2col_step: int, torchvision_ops: Any = None,
) -> None:  # fmt: skip
    """Add ``scale`` times the gradient of the weight to ``gradWeight``."""
    geometry = Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    # The weight's gradient does not depend on its value: gradWeight stands for its shape.
    call = Convolution(input, offset, None, gradWeight, None, geometry)
    gradWeight.add_(backward(call, gradOutput, ("weight",), torchvision_ops)["weight"], alpha=scale)


@outside_autocast
def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, output: Tensor,
    columns: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
    torchvision_ops: Any = None,
) -> None:  # fmt: skip
    """Write the modulated deformable convolution into ``output``; the drop-in for the operator of this name.

    Args:
        input, weight, offset, output, torchvision_ops: as in :func:`deform_conv_forward`.
        bias: [O], read when ``with_bias``.
        mask: [N, deformable_group * kernel_h * kernel_w, Ho, Wo], a factor for every sample.
    """
    geometry = Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )  # fmt: skip
    call = Convolution(input, offset, mask, weight, bias if with_bias else None, geometry)
    forward(call, output, torchvision_ops)


@outside_autocast
def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, columns: Tensor,
    grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor,
    grad_output: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
    torchvision_ops: Any = None,
) -> None:  # fmt: skip
    """Add the gradients of input, weight and bias to theirs, write those of offset and mask into theirs."""
    geometry = Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )  # fmt: skip
    call = Convolution(input, offset, mask, weight, None, geometry)
    grads = backward(call, grad_output, ("input", "offset", "mask", "weight"), torchvision_ops)
    grad_input.add_(grads["input"])
    grad_weight.add_(grads["weight"])
    grad_offset.copy_(grads["offset"])
    grad_mask.copy_(grads["mask"])
    if with_bias:
        grad_bias.add_(grad_output.to(working_dtype(input)).sum((0, 2, 3)))
