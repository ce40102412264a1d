"""RoIAlign with the call signature of mmcv's compiled operator."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import bilinear_corners, blocks, outside_autocast, pixel_rows, weighted_rows, working_dtype

# Samples held at once. Each takes about 200 bytes of coordinates, positions and weights.
SAMPLES = 2**20
# The compiled operator starts its maximum here, and returns it for a bin without samples.
EMPTY_MAXIMUM = -10000.0


@dataclass
class _Samples:
    """The samples of some rois in the order roi, bin row, bin column, sample row, sample column."""

    bins: slice  # of all rois' bins
    bin_of: Tensor  # [S], counted from bins.start
    per_bin: Tensor  # [bins], number of samples
    y: Tensor  # [S], pixels of the map
    x: Tensor  # [S]
    rows: Tensor  # [S, 4] of pixel_rows(input)
    weight: Tensor  # [S, 4]


def _corners(y: Tensor, x: Tensor, image: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Points up to a pixel beyond the border take the border's value, those further out are zero."""
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    index, weight = bilinear_corners(y.clamp(0, height - 1), x.clamp(0, width - 1), inside, height, width)
    return index + (image * (height * width))[:, None], weight


def _grids(bin_size: Tensor, sampling_ratio: int) -> Tensor:
    """int64 [R, 2], samples per bin along x and y."""
    if sampling_ratio > 0:
        return torch.full_like(bin_size, sampling_ratio, dtype=torch.long)
    if not bool(bin_size.isfinite().all()):
        raise ValueError(
            "roi_align expects finite rois, got NaN or infinity: the boxes that they come from have diverged "
            "(lower the learning rate, or clip gradients)"
        )
    return bin_size.ceil().clamp(min=0).long()


def _chunks(samples: Tensor) -> Iterator[tuple[int, int, int]]:
    """First and last roi (exclusive) of each run of at most ``SAMPLES`` samples, at least one roi, and its samples."""
    totals = samples.cumsum(0).tolist()
    first = before = 0
    while first < len(totals):
        last = max(first + 1, bisect_right(totals, before + SAMPLES))
        yield first, last, totals[last - 1] - before
        first, before = last, totals[last - 1]


def _samples(
    rois: Tensor,
    map_size: tuple[int, int],
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[_Samples]:
    """The samples of all rois, a bounded number at a time."""
    image = rois[:, 0].long()
    corners = rois[:, 1:] * spatial_scale
    if aligned:
        corners = corners - 0.5
    start = corners[:, :2]
    size = corners[:, 2:] - start
    if not aligned:
        size = size.clamp(min=1)
    bin_size = size / size.new_tensor([bins[1], bins[0]])
    grid = _grids(bin_size, sampling_ratio)
    n_bins = bins[0] * bins[1]
    for first, last, count in _chunks(grid.prod(1) * n_bins):
        per_bin = grid[first:last].prod(1).repeat_interleave(n_bins)
        # The output size is given so that a GPU need not be asked for it.
        bin_of = torch.arange(len(per_bin), device=rois.device).repeat_interleave(per_bin, output_size=count)
        within = torch.arange(count, device=rois.device) - (per_bin.cumsum(0) - per_bin)[bin_of]
        roi, place = bin_of // n_bins + first, bin_of % n_bins
        grid_x, grid_y = grid[roi].unbind(1)
        bin_w, bin_h = bin_size[roi].unbind(1)
        start_x, start_y = start[roi].unbind(1)
        # In the compiled operator's order of operations, so that border samples fall on the same side.
        y = start_y + place // bins[1] * bin_h + ((within // grid_x).to(rois.dtype) + 0.5) * bin_h / grid_y
        x = start_x + place % bins[1] * bin_w + ((within % grid_x).to(rois.dtype) + 0.5) * bin_w / grid_x
        rows, weight = _corners(y, x, image[roi], *map_size)
        yield _Samples(slice(first * n_bins, last * n_bins), bin_of, per_bin, y, x, rows, weight)


def _average(table: Tensor, samples: _Samples) -> Tensor:
    """[bins, C], the mean over the samples of each bin; zero for a bin without any."""
    offsets = F.pad((4 * samples.per_bin).cumsum(0), (1, 0))
    weight = samples.weight / samples.per_bin[samples.bin_of, None]
    return F.embedding_bag(
        samples.rows.flatten(),
        table,
        offsets,
        per_sample_weights=weight.flatten(),
        mode="sum",
        include_last_offset=True,
    )


def _maximum(table: Tensor, samples: _Samples) -> tuple[Tensor, Tensor, Tensor]:
    """[bins, C] three times: the largest sample of each bin, and the y and x where it was taken."""
    values = weighted_rows(table, samples.rows, samples.weight)
    count, channels = values.shape
    bin_of = samples.bin_of[:, None].expand(-1, channels)
    highest = values.new_full((len(samples.per_bin), channels), EMPTY_MAXIMUM)
    highest.scatter_reduce_(0, bin_of, values, "amax")
    # The first of equal samples, as a loop over them finds it.
    position = torch.arange(count, device=values.device)[:, None].expand(-1, channels)
    position = torch.where(values == highest[samples.bin_of], position, count)
    first = torch.full(highest.shape, count, device=values.device)
    first.scatter_reduce_(0, bin_of, position, "amin")
    nowhere = values.new_full((1,), -1)
    return highest, torch.cat([samples.y, nowhere])[first], torch.cat([samples.x, nowhere])[first]


def _check(rois: Tensor, maps: Tensor, pooled: Tensor, bins: tuple[int, int]) -> None:
    """Raise ValueError for shapes that do not belong together; ``maps`` and ``pooled`` may be gradients."""
    if rois.dim() != 2 or rois.size(1) != 5:
        raise ValueError(f"roi_align expects rois [R, 5] as (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    expected = (len(rois), maps.size(1), *bins)
    if pooled.shape != expected:
        raise ValueError(f"roi_align expects pooled features {expected}, got {tuple(pooled.shape)}")
    # On a GPU the question would make the host wait; there a wrong image fails in embedding_bag.
    if len(rois) and rois.device.type == "cpu":
        low, high = (int(v) for v in rois[:, 0].aminmax())
        if low < 0 or high >= len(maps):
            raise ValueError(f"roi_align expects images 0..{len(maps) - 1} in rois[:, 0], got {low}..{high}")


@outside_autocast
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
    torchvision_ops: Any = None,
) -> None:
    """Write the pooled features into ``output``; the drop-in for ``mmcv._ext.roi_align_forward``.

    Each roi is divided into ``aligned_height x aligned_width`` bins; a bin is the mean (or maximum) of bilinear
    samples on a regular grid inside it (He et al., "Mask R-CNN", section 3). Half types are computed in float32.

    Args:
        input: [N, C, H, W].
        rois: [R, 5] as (image, x1, y1, x2, y2) in pixels of the image.
        output: [R, C, aligned_height, aligned_width], overwritten.
        argmax_y, argmax_x: as ``output``, overwritten with where the maximum was taken (-1: no sample); unused and
            may be empty for averages.
        spatial_scale: size of the map over size of the image.
        sampling_ratio: samples per bin and axis; 0 for one a pixel of the map (``ceil`` of the bin's size).
        pool_mode: 0 maximum, 1 average.
        aligned: True shifts by half a pixel; False is the older form, whose rois are at least one pixel large.
            With ``sampling_ratio`` 0 a roi of negative size has no samples, as in the CUDA operator (the CPU
            one raises).
        torchvision_ops: ``torchvision.ops``, used for averages.
    """
    bins = (aligned_height, aligned_width)
    _check(rois, input, output, bins)
    if rois.numel() == 0:
        return
    dtype = working_dtype(input)
    rois = rois.detach().to(dtype)
    if pool_mode == 1 and torchvision_ops is not None:
        output.copy_(
            torchvision_ops.roi_align(
                input.detach().to(dtype), rois, bins, spatial_scale, sampling_ratio, aligned
            )
        )
        return
    table = pixel_rows(input.detach().to(dtype))
    pooled = table.new_empty(len(rois) * bins[0] * bins[1], input.size(1))
    where = [torch.empty_like(pooled) for _ in range(2)] if pool_mode == 0 else []
    map_size = (input.size(2), input.size(3))
    for samples in _samples(rois, map_size, bins, spatial_scale, sampling_ratio, aligned):
        if pool_mode == 0:
            pooled[samples.bins], where[0][samples.bins], where[1][samples.bins] = _maximum(table, samples)
        else:
            pooled[samples.bins] = _average(table, samples)
    for target, values in zip((output, argmax_y, argmax_x), (pooled, *where), strict=False):
        target.copy_(values.view(len(rois), *bins, -1).permute(0, 3, 1, 2))


def _scatter_maximum(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor
) -> Tensor:
    """Gradient of the maxima [N, C, H, W]: each goes to the four pixels around its sample."""
    n, channels, height, width = grad_input.shape
    total = torch.zeros(n * channels * height * width, dtype=rois.dtype, device=rois.device)
    channel = torch.arange(channels, device=rois.device)[:, None, None]
    for part in blocks(len(rois), SAMPLES // max(1, grad_output[0].numel())):
        # Every channel has samples of its own: each is a map by itself here.
        plane = rois[part, 0].long()[:, None, None, None] * channels + channel
        y, x = argmax_y[part].to(rois.dtype), argmax_x[part].to(rois.dtype)
        rows, weight = _corners(y.flatten(), x.flatten(), plane.expand_as(y).flatten(), height, width)
        # -1 marks a bin without samples; the compiled operator looks at y alone.
        grad = grad_output[part].to(rois.dtype) * (y != -1)
        total.index_add_(0, rows.flatten(), (weight * grad.flatten()[:, None]).flatten())
    return total.view(n, channels, height, width)


@outside_autocast
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
    torchvision_ops: Any = None,
) -> None:
    """Add d output / d input, applied to ``grad_output``, to ``grad_input``; arguments as in the forward operator."""
    bins = (aligned_height, aligned_width)
    _check(rois, grad_input, grad_output, bins)
    if rois.numel() == 0:
        return
    dtype = working_dtype(grad_input)
    rois = rois.detach().to(dtype)
    if pool_mode == 0:
        grad_input.add_(_scatter_maximum(grad_output, rois, argmax_y, argmax_x, grad_input))
        return
    n, channels, height, width = grad_input.shape
    # The average is linear in the map: its gradient is that at a map of zeros.
    if torchvision_ops is not None:
        with torch.enable_grad():
            zeros = torch.zeros(grad_input.shape, dtype=dtype, device=rois.device, requires_grad=True)
            pooled = torchvision_ops.roi_align(zeros, rois, bins, spatial_scale, sampling_ratio, aligned)
            grad_input.add_(torch.autograd.grad(pooled, zeros, grad_output.to(dtype))[0])
        return
    table = torch.zeros(n * height * width, channels, dtype=dtype, device=rois.device, requires_grad=True)
    grad_rows = grad_output.to(dtype).permute(0, 2, 3, 1).reshape(-1, channels)
    for samples in _samples(rois, (height, width), bins, spatial_scale, sampling_ratio, aligned):
        with torch.enable_grad():
            torch.autograd.backward(_average(table, samples), grad_rows[samples.bins], inputs=[table])
    assert table.grad is not None
    grad_input.add_(table.grad.view(n, height, width, channels).permute(0, 3, 1, 2))
