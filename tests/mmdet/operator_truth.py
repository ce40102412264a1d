"""What the operators of compat are compared with: compiled mmcv, and references in terms of other operators."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def compiled_wheel(shared_dir: Path) -> Path:
    """The wheel of compiled mmcv for this Python; skips by name where there is none."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-"
    for wheel in sorted((shared_dir / "wheels").glob("mmcv-*.whl")):
        if tag in wheel.name and sys.platform in wheel.name:
            return wheel
    pytest.skip(f"no compiled mmcv wheel for {tag}{sys.platform} in ../shared/wheels")


def load_extension(wheel: Path, folder: Path) -> ModuleType:
    """The extension alone, outside ``sys.modules``."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.startswith("mmcv/_ext.") and n.endswith(".so"))
        path = archive.extract(name, folder)
    loader = importlib.machinery.ExtensionFileLoader("_ext", path)
    spec = importlib.util.spec_from_loader("_ext", loader, origin=path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def serve(monkeypatch: pytest.MonkeyPatch, extension: Any) -> None:
    """Let the public functions of ``mmcv.ops`` call ``extension``."""
    import mmcv.ops  # noqa: F401

    for name in ("nms", "roi_align", "deform_conv", "modulated_deform_conv"):
        # mmcv.ops.roi_align is a function: the module of that name is found here alone.
        monkeypatch.setattr(sys.modules[f"mmcv.ops.{name}"], "ext_module", extension)


def plain_extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Our operators without torchvision, whatever is installed."""
    from ikd_fast.mmdet.compat import operators

    with monkeypatch.context() as patch:
        patch.setattr(operators, "find_torchvision", lambda: (None, "not wanted"))
        return operators.build_extension()[0]


def roi_align(
    input: Tensor, boxes: Tensor, output_size: Any, spatial_scale: float = 1.0, sampling_ratio: int = -1, aligned: bool = False
) -> Tensor:  # fmt: skip
    """Average RoIAlign with torchvision's signature, one roi after another, by grid_sample; differentiable."""
    height, width = input.shape[2:]
    out = []
    for image, *corners in boxes.tolist():
        x1, y1, x2, y2 = (v * spatial_scale - 0.5 * aligned for v in corners)
        roi_h, roi_w = y2 - y1, x2 - x1
        if not aligned:
            roi_h, roi_w = max(roi_h, 1.0), max(roi_w, 1.0)
        axes = []
        for start, size, bins in ((y1, roi_h, output_size[0]), (x1, roi_w, output_size[1])):
            n = sampling_ratio if sampling_ratio > 0 else -int(-size / bins // 1)
            step = torch.arange(bins, dtype=input.dtype)[:, None]
            axes.append(
                start + (step + (torch.arange(n, dtype=input.dtype) + 0.5) / max(n, 1)) * (size / bins)
            )
        y, x = (axis.flatten() for axis in axes)
        grid = torch.stack(
            torch.broadcast_tensors((2 * x + 1) / width - 1, ((2 * y + 1) / height - 1)[:, None]), -1
        )
        values = F.grid_sample(
            input[int(image)][None], grid[None], padding_mode="border", align_corners=False
        )[0]
        known = ((y >= -1) & (y <= height))[:, None] & (x >= -1) & (x <= width)
        values = (values * known).unflatten(2, axes[1].shape).unflatten(1, axes[0].shape)
        out.append(values.mean((2, 4)) if values.numel() else values.new_zeros(input.size(1), *output_size))
    return torch.stack(out)


def deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1, 1), padding: Any = (0, 0),
    dilation: Any = (1, 1), mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Deformable convolution with torchvision's signature, one tap after another, by grid_sample; differentiable."""
    height, width = input.shape[2:]
    kernel_h, kernel_w = weight.shape[2:]
    taps = kernel_h * kernel_w
    groups, parts = input.size(1) // weight.size(1), offset.size(1) // (2 * taps)
    out_h, out_w = offset.shape[2:]
    seen = []
    for tap in range(taps):
        channels = []
        for part in range(parts):
            dy, dx = offset[:, 2 * (part * taps + tap)], offset[:, 2 * (part * taps + tap) + 1]
            y = (torch.arange(out_h) * stride[0] - padding[0] + tap // kernel_w * dilation[0])[:, None] + dy
            x = torch.arange(out_w) * stride[1] - padding[1] + tap % kernel_w * dilation[1] + dx
            grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
            values = F.grid_sample(
                input.chunk(parts, 1)[part], grid, padding_mode="zeros", align_corners=False
            )
            channels.append(values if mask is None else values * mask[:, part * taps + tap, None])
        seen.append(torch.cat(channels, 1))
    columns = torch.stack(seen, 2).flatten(1, 2)  # [N, C * taps, Ho, Wo]
    return F.conv2d(columns, weight.flatten(1)[:, :, None, None], bias, groups=groups)


def recording_torchvision() -> SimpleNamespace:
    """Stands for ``torchvision.ops``: the references above, and ``calls``, the bound arguments of every call."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def recorded(function: Any) -> Any:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            # Copies: the caller may go on to write into what it passed.
            given = {
                n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in bound.arguments.items()
            }
            calls.append((function.__name__, given))
            return function(*args, **kwargs)

        return call

    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        kept: list[int] = []
        for j in scores.argsort(descending=True).tolist():
            ends = torch.minimum(boxes[j, 2:], boxes[kept, 2:]) - torch.maximum(boxes[j, :2], boxes[kept, :2])
            inter = ends.clamp(min=0).prod(1)
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            if not (inter / (area[j] + area[kept] - inter) > iou_threshold).any():
                kept.append(j)
        return torch.tensor(kept, dtype=torch.long)

    return SimpleNamespace(
        nms=recorded(nms), roi_align=recorded(roi_align), deform_conv2d=recorded(deform_conv2d), calls=calls
    )


@dataclass(frozen=True)
class DeformConvCase:
    """Sizes of a deformable convolution, made-up tensors for it, and the call through mmcv.ops."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    modulated: bool = True
    bias: bool = True
    batch: int = 2
    channels: int = 8
    out: int = 12
    size: tuple[int, int] = (9, 7)
    shift: float = 1.5  # standard deviation of the offsets, in pixels

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Input, offset, weight, and mask and bias where the case has them."""
        generator = torch.Generator().manual_seed(6)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        taps = self.kernel[0] * self.kernel[1]
        h, w = (
            (self.size[d] + 2 * self.padding[d] - self.dilation[d] * (self.kernel[d] - 1) - 1) // self.stride[d] + 1
            for d in range(2)
        )  # fmt: skip
        made = {
            "input": normal(self.batch, self.channels, *self.size),
            "offset": normal(self.batch, 2 * self.deform_groups * taps, h, w) * self.shift,
            "mask": normal(self.batch, self.deform_groups * taps, h, w).sigmoid(),
            "weight": normal(self.out, self.channels // self.groups, *self.kernel) / taps,
            "bias": normal(self.out),
        }
        absent = ([] if self.modulated else ["mask", "bias"]) + ([] if self.bias else ["bias"])
        return {name: tensor.to(dtype) for name, tensor in made.items() if name not in absent}

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """mmcv's public function."""
        from mmcv.ops import deform_conv2d, modulated_deform_conv2d

        sizes = (self.stride, self.padding, self.dilation, self.groups, self.deform_groups)
        if self.modulated:
            return modulated_deform_conv2d(
                tensors["input"],
                tensors["offset"],
                tensors["mask"],
                tensors["weight"],
                tensors.get("bias"),
                *sizes,
            )
        return deform_conv2d(tensors["input"], tensors["offset"], tensors["weight"], *sizes)

    def with_gradients(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The output, and the gradient of every tensor for a random upstream gradient."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = self(leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
        return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}
