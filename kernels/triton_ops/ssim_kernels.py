"""What ``ssim`` launches: local moments of tiles, and the adjoint of the filter.

A tile is SPAN columns by LANES; the lanes are rows of one plane, or, where channels lie next to each other in memory,
channels of one row, so that neighbouring lanes or columns are neighbours in memory. A program works on a block of TILE
columns, rows and channels, walking over what its lanes are not.

Along rows the Gaussian's taps are loads of shifted rows, reflected at the border (they come from cache). Along columns
the filter is a product with a banded matrix, whose entry (output, input) is the Gaussian at the input and at its mirror
images; the adjoint has the same weights with inputs and outputs exchanged.
"""

import triton
import triton.language as tl

from .levels import locate, pick_int, pick_pointer


@triton.jit
def _gaussian(distance, reach, scale):
    """Not normalised; ``scale`` is -1 / (2 sigma^2)."""
    x = distance.to(tl.float32)
    return tl.where(tl.abs(distance) <= reach, tl.exp(x * x * scale), 0.0)


@triton.jit
def _weight(o, p, size, reach, scale):
    """Of input ``p`` in output ``o`` of a reflected line of ``size``; 0 outside it."""
    w = _gaussian(p - o, reach, scale)
    w += tl.where(p > 0, _gaussian(p + o, reach, scale), 0.0)
    w += tl.where(p < size - 1, _gaussian(2 * (size - 1) - p - o, reach, scale), 0.0)
    return tl.where((o >= 0) & (o < size) & (p >= 0) & (p < size), w, 0.0)


@triton.jit
def _strides(p_strides, channels, height, width, LAYOUT: tl.constexpr):
    """N, C, H, W strides of a map; those of dense maps follow from its sizes."""
    if LAYOUT == 0:
        n, c, h, w = (channels * height * width).to(tl.int64), height * width, width, 1
    elif LAYOUT == 1:
        n, c, h, w = (channels * height * width).to(tl.int64), 1, width * channels, channels
    else:
        n, c, h, w = (
            tl.load(p_strides),
            tl.load(p_strides + 1),
            tl.load(p_strides + 2),
            tl.load(p_strides + 3),
        )
    return n, c, h, w


@triton.jit
def _block(i_block, height, width, TILE: tl.constexpr):
    """First channel, row and column of a program: blocks of the same channels follow one another."""
    across = (width + TILE - 1) // TILE
    tiles = across * ((height + TILE - 1) // TILE)
    i_tile = i_block % tiles
    return i_block // tiles * TILE, i_tile // across * TILE, i_tile % across * TILE


@triton.jit
def _lanes(i, first, top, TILE: tl.constexpr, CHANNEL_LANES: tl.constexpr):
    """(channels, rows) of step ``i``, ``[1, TILE]`` each."""
    lane = tl.arange(0, TILE)[None, :]
    if CHANNEL_LANES:
        return first + lane, top + i + lane * 0
    return first + i + lane * 0, top + lane


@triton.jit
def _columns(left, width, reach, scale, TILE: tl.constexpr, SPAN: tl.constexpr):
    """Columns of the outputs and of the inputs of a block, the inputs' mask, and the Gaussian's sum."""
    x = left + tl.arange(0, TILE)[:, None]
    x_in = left - (SPAN - TILE) // 2 + tl.arange(0, SPAN)[:, None]
    near = (x_in >= left - reach) & (x_in < left + TILE + reach)
    total = tl.sum(_gaussian(tl.arange(0, SPAN) - SPAN // 2, reach, scale))
    return x, x_in, near & (x_in >= 0) & (x_in < width), total


@triton.jit
def _along_columns(b_weights, b_x):
    return tl.dot(b_weights, b_x, input_precision="ieee")


@triton.jit
def _loss(mu_s, mu_t, square, product, s_0, t_0, C1: tl.constexpr, C2: tl.constexpr, EPS: tl.constexpr):
    """(1 - SSIM) / 2 from the means of S, T, (S - T)^2 and S T of planes less their first values, and its slopes
    in the first, third (twice that) and fourth of them."""
    step = mu_s - mu_t
    gap = square - step * step
    contrast = 2.0 * (product - mu_s * mu_t) + C2
    whole_s = mu_s + s_0
    whole_t = mu_t + t_0
    luminance = whole_s * whole_s + whole_t * whole_t + C1
    shift = step + (s_0 - t_0)
    inverse = 1.0 / (luminance * (contrast + gap) + EPS)
    loss = 0.5 * (luminance * gap + contrast * shift * shift + EPS) * inverse
    inverse = tl.where((loss < 0.0) | (loss > 1.0), 0.0, inverse)  # NaN is neither: it stays
    to_square = luminance * (1.0 - 2.0 * loss) * inverse
    to_product = (shift * shift - 2.0 * loss * luminance) * inverse
    to_mean = whole_s * gap - luminance * step - mu_t * shift * shift + contrast * shift
    to_mean = (to_mean - 2.0 * loss * (whole_s * (contrast + gap) - luminance * mu_s)) * inverse
    loss = tl.where(loss < 0.0, 0.0, tl.where(loss > 1.0, 1.0, loss))
    return loss, to_mean, to_square, to_product


@triton.jit(do_not_specialize=["radius"])
def ssim_moments(
    p_student,
    p_teacher,
    p_strides,  # [L, 8]
    p_out,  # [programs]; with SLOPES, for each level three maps an image in the order of the lanes
    starts,
    blocks,
    channels,
    heights,
    widths,
    radius,
    scale,
    unit,
    LEVELS: tl.constexpr,
    LAYOUT_S: tl.constexpr,
    LAYOUT_T: tl.constexpr,
    CHANNEL_LANES: tl.constexpr,
    SLOPES: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The sum of a block's losses, or the slopes of each of its elements."""
    level, i_image, i_block = locate(starts, blocks, LEVELS)
    n_channels = pick_int(channels, level, LEVELS)
    height, width = pick_int(heights, level, LEVELS), pick_int(widths, level, LEVELS)
    p_s, p_t = pick_pointer(p_student, level, LEVELS), pick_pointer(p_teacher, level, LEVELS)
    first, top, left = _block(i_block, height, width, TILE)
    reach = tl.minimum(radius, tl.minimum(height, width) - 1)
    x, x_in, m_x, norm = _columns(left, width, reach, scale, TILE, SPAN)
    b_weights = _weight(x, tl.trans(x_in), width, reach, scale) / norm
    n_s, c_s, h_s, w_s = _strides(p_strides + level * 8, n_channels, height, width, LAYOUT_S)
    n_t, c_t, h_t, w_t = _strides(p_strides + level * 8 + 4, n_channels, height, width, LAYOUT_T)
    n_o, c_o, h_o, w_o = _strides(p_strides, n_channels, height, width, CHANNEL_LANES)
    p_s += i_image.to(tl.int64) * n_s
    p_t += i_image.to(tl.int64) * n_t
    total = tl.zeros([TILE, TILE], tl.float32)
    steps = tl.minimum(TILE, height - top) if CHANNEL_LANES else tl.minimum(TILE, n_channels - first)
    for i in range(steps):
        c, y = _lanes(i, first, top, TILE, CHANNEL_LANES)
        m_lane = (c < n_channels) & (y < height)
        m = m_x & m_lane
        o_s, o_t = c * c_s + x_in * w_s, c * c_t + x_in * w_t
        s_0 = tl.load(p_s + c * c_s, mask=m_lane, other=0.0).to(tl.float32) * unit
        t_0 = tl.load(p_t + c * c_t, mask=m_lane, other=0.0).to(tl.float32) * unit
        sum_s = tl.zeros([SPAN, TILE], tl.float32)
        sum_t = tl.zeros([SPAN, TILE], tl.float32)
        sum_square = tl.zeros([SPAN, TILE], tl.float32)
        sum_product = tl.zeros([SPAN, TILE], tl.float32)
        for tap in range(-reach, reach + 1):
            w = tl.exp(scale * (tap * tap)) / norm
            row = tl.abs(y + tap)
            row = tl.where(row >= height, 2 * (height - 1) - row, row)
            b_s = tl.load(p_s + (o_s + row * h_s), mask=m, other=0.0).to(tl.float32) * unit - s_0
            b_t = tl.load(p_t + (o_t + row * h_t), mask=m, other=0.0).to(tl.float32) * unit - t_0
            b_d = b_s - b_t
            sum_s += w * b_s
            sum_t += w * b_t
            sum_square += w * (b_d * b_d)
            sum_product += w * (b_s * b_t)
        # Columns that were not read have weight 0 but hold -s_0: finite wherever the plane's first value is.
        loss, to_mean, to_square, to_product = _loss(
            _along_columns(b_weights, sum_s),
            _along_columns(b_weights, sum_t),
            _along_columns(b_weights, sum_square),
            _along_columns(b_weights, sum_product),
            s_0,
            t_0,
            C1,
            C2,
            EPS,
        )
        m_out = (x < width) & m_lane
        if SLOPES:
            p_o = pick_pointer(p_out, level, LEVELS) + i_image.to(tl.int64) * 3 * n_o
            o = c * c_o + y * h_o + x * w_o
            tl.store(p_o + o, to_mean, mask=m_out)
            tl.store(p_o + n_o + o, to_square, mask=m_out)
            tl.store(p_o + 2 * n_o + o, to_product, mask=m_out)
        else:
            total += tl.where(m_out, loss, 0.0)
    if not SLOPES:
        elements = n_channels.to(tl.float32) * (height * width).to(tl.float32)
        tl.store(p_out + tl.program_id(0), tl.sum(total) / elements)


@triton.jit(do_not_specialize=["radius", "n_images"])
def ssim_adjoint(
    p_grad,  # [L, N]
    p_student,
    p_teacher,
    p_slopes,
    p_strides,  # [L, 12]
    p_out,
    starts,
    blocks,
    channels,
    heights,
    widths,
    radius,
    scale,
    unit,
    n_images,
    LEVELS: tl.constexpr,
    LAYOUT_S: tl.constexpr,
    LAYOUT_T: tl.constexpr,
    LAYOUT_O: tl.constexpr,
    CHANNEL_LANES: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The gradient of a block from the slopes of every output that its elements are inputs of."""
    level, i_image, i_block = locate(starts, blocks, LEVELS)
    n_channels = pick_int(channels, level, LEVELS)
    height, width = pick_int(heights, level, LEVELS), pick_int(widths, level, LEVELS)
    p_s, p_t = pick_pointer(p_student, level, LEVELS), pick_pointer(p_teacher, level, LEVELS)
    p_k, p_o = pick_pointer(p_slopes, level, LEVELS), pick_pointer(p_out, level, LEVELS)
    first, top, left = _block(i_block, height, width, TILE)
    reach = tl.minimum(radius, tl.minimum(height, width) - 1)
    x, x_in, m_x, norm = _columns(left, width, reach, scale, TILE, SPAN)
    b_weights = _weight(tl.trans(x_in), x, width, reach, scale) / norm
    n_s, c_s, h_s, w_s = _strides(p_strides + level * 12, n_channels, height, width, LAYOUT_S)
    n_t, c_t, h_t, w_t = _strides(p_strides + level * 12 + 4, n_channels, height, width, LAYOUT_T)
    n_o, c_o, h_o, w_o = _strides(p_strides + level * 12 + 8, n_channels, height, width, LAYOUT_O)
    n_k, c_k, h_k, w_k = _strides(p_strides, n_channels, height, width, CHANNEL_LANES)
    p_s += i_image.to(tl.int64) * n_s
    p_t += i_image.to(tl.int64) * n_t
    p_o += i_image.to(tl.int64) * n_o
    p_k += i_image.to(tl.int64) * 3 * n_k
    elements = n_channels.to(tl.float32) * (height * width).to(tl.float32)
    grad = tl.load(p_grad + level * n_images + i_image) * unit / elements
    steps = tl.minimum(TILE, height - top) if CHANNEL_LANES else tl.minimum(TILE, n_channels - first)
    for i in range(steps):
        c, y = _lanes(i, first, top, TILE, CHANNEL_LANES)
        m_lane = (c < n_channels) & (y < height)
        o_k = c * c_k + x_in * w_k
        sum_mean = tl.zeros([SPAN, TILE], tl.float32)
        sum_square = tl.zeros([SPAN, TILE], tl.float32)
        sum_product = tl.zeros([SPAN, TILE], tl.float32)
        for tap in range(-reach, reach + 1):
            row = y + tap
            m = m_x & m_lane & (row >= 0) & (row < height)
            k = o_k + row * h_k
            w = _weight(row, y, height, reach, scale) / norm
            sum_mean += w * tl.load(p_k + k, mask=m, other=0.0)
            sum_square += w * tl.load(p_k + n_k + k, mask=m, other=0.0)
            sum_product += w * tl.load(p_k + 2 * n_k + k, mask=m, other=0.0)
        m_out = (x < width) & m_lane
        s_0 = tl.load(p_s + c * c_s, mask=m_lane, other=0.0).to(tl.float32) * unit
        t_0 = tl.load(p_t + c * c_t, mask=m_lane, other=0.0).to(tl.float32) * unit
        b_s = tl.load(p_s + (c * c_s + y * h_s + x * w_s), mask=m_out, other=0.0).to(tl.float32) * unit - s_0
        b_t = tl.load(p_t + (c * c_t + y * h_t + x * w_t), mask=m_out, other=0.0).to(tl.float32) * unit - t_0
        b_g = _along_columns(b_weights, sum_mean)
        b_g += _along_columns(b_weights, sum_square) * (b_s - b_t)
        b_g += _along_columns(b_weights, sum_product) * b_t
        tl.store(p_o + (c * c_o + y * h_o + x * w_o), (grad * b_g).to(p_o.dtype.element_ty), mask=m_out)
