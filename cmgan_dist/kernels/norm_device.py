"""Device code of `norm_triton`, which says what the tensors are and launches it.

Triton compiles what stands here, so arguments have no Python types: pointers first, then strides, sizes and constants.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# torch.compile passes Python floats in float64, eager Triton in float32: kernels begin by making them float32.


@triton.jit
def _group(k, n0, n1, n2, n3):
    """Return the first row and the number of rows of group k."""
    start = tl.where(k > 0, n0, 0) + tl.where(k > 1, n1, 0) + tl.where(k > 2, n2, 0)
    rows = tl.where(k == 0, n0, tl.where(k == 1, n1, tl.where(k == 2, n2, n3)))
    return start, rows


@triton.jit
def _merge(count, mean, low, m2, count_b, mean_b, low_b, m2_b):
    """Return the moments of two disjoint sets of rows together, after Chan, Golub & LeVeque (1983).

    The mean, of a high and a low part, is added to without rounding."""
    total = count + count_b
    share = count_b / tl.maximum(total, 1.0)
    delta = (mean_b - mean) + (low_b - low)
    step = low + delta * share
    high = mean + step
    back = high - mean
    rest = (mean - (high - back)) + (step - back)
    first = count == 0.0
    m2 = m2 + m2_b + delta * delta * (count * share)
    return total, tl.where(first, mean_b, high), tl.where(first, low_b, rest), m2


@triton.jit
def _merged(moments, k, groups, parts, channels, cols, ok, BLOCK_C: tl.constexpr):
    """Return the moments of group k over all parts."""
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    low = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for p in range(parts):
        at = moments + (p * groups + k) * 4 * channels + cols
        count_b = tl.load(at, mask=ok, other=0.0)
        mean_b = tl.load(at + channels, mask=ok, other=0.0)
        low_b = tl.load(at + 2 * channels, mask=ok, other=0.0)
        m2_b = tl.load(at + 3 * channels, mask=ok, other=0.0)
        count, mean, low, m2 = _merge(count, mean, low, m2, count_b, mean_b, low_b, m2_b)
    return count, mean, low, m2


@triton.jit
def _store4(out, k, channels, cols, ok, a, b, c, d):
    """Write the four rows a, b, c and d of group k."""
    at = out + k * 4 * channels + cols
    tl.store(at, a, mask=ok)
    tl.store(at + channels, b, mask=ok)
    tl.store(at + 2 * channels, c, mask=ok)
    tl.store(at + 3 * channels, d, mask=ok)


@triton.jit
def _mask(seed, row, column, channels, p, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return dropout factors, 0 or 1 / (1 - p), of rows `row` [BLOCK_R] and the BLOCK_C columns from `column` on."""
    quads = column // 4 + tl.arange(0, BLOCK_C // 4)
    counter = row[:, None] * tl.cdiv(channels, 4) + quads[None, :]
    a, b, c, d = tl.rand4x(seed, counter.to(tl.uint32))
    draw = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_R, BLOCK_C))
    return tl.where(draw >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def _before_activation(
    x, dy, x_stride, dy_stride, row, cols, inside, stats_mean, stats_low, stats_rstd, w, b, seed, column, channels,
    slope, p, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return normalised x and the gradient by what goes into the activation, [BLOCK_R, BLOCK_C] each."""
    wide = row.to(tl.int64)[:, None]
    value = tl.load(x + wide * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + wide * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    normal = ((value - stats_mean[None, :]) - stats_low[None, :]) * stats_rstd[None, :]
    normal = tl.where(inside, normal, 0.0)
    if DROPOUT:
        g = g * _mask(seed, row, column, channels, p, BLOCK_R, BLOCK_C)
    g = g * tl.where(normal * w[None, :] + b[None, :] > 0, 1.0, slope)
    return normal, g


SIZES = ["n0", "n1", "n2", "n3", "parts", "splits", "groups", "steps"]
"""Names of the arguments whose values must not make another compiled kernel."""


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x, out, x_stride, channels, groups, splits, n0, n1, n2, n3, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Write the moments of one split of one group's rows. Grid: column blocks, K, splits."""
    k = tl.program_id(1)
    split = tl.program_id(2)
    start, rows = _group(k, n0, n1, n2, n3)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = cols < channels
    per = tl.cdiv(tl.cdiv(rows, splits), BLOCK_R) * BLOCK_R
    first = split * per
    last = tl.minimum(first + per, rows)
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    low = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for r in range(first, last, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        inside = (row < last)[:, None] & ok[None, :]
        at = x + (start + row).to(tl.int64)[:, None] * x_stride + cols[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        number = tl.minimum(last - r, BLOCK_R).to(tl.float32)
        centre = tl.sum(value, 0) / number
        rest = tl.where(inside, value - centre[None, :], 0.0)
        total = tl.sum(rest, 0)
        tile_m2 = tl.sum(rest * rest, 0) - total * total / number
        tile_count = tl.zeros([BLOCK_C], tl.float32) + number
        count, mean, low, m2 = _merge(count, mean, low, m2, tile_count, centre, total / number, tile_m2)
    _store4(out, split * groups + k, channels, cols, ok, count, mean, low, m2)


@triton.jit(do_not_specialize=SIZES)
def pack_kernel(moments, totals, channels, groups, parts, BLOCK_C: tl.constexpr):
    """Turn moments [P, K, 4, C] into totals [K, 2C + 1] of this process. Grid: column blocks, K."""
    k = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = cols < channels
    count, mean, low, m2 = _merged(moments, k, groups, parts, channels, cols, ok, BLOCK_C)
    count = count.to(tl.float64)
    centre = mean.to(tl.float64) + low.to(tl.float64)
    at = totals + k * (2 * channels + 1) + cols
    tl.store(at, count * centre, mask=ok)
    tl.store(at + channels, m2.to(tl.float64) + count * centre * centre, mask=ok)
    tl.store(at + 2 * channels, count, mask=cols == 0)


@triton.jit(do_not_specialize=SIZES)
def unpack_kernel(totals, moments, channels, BLOCK_C: tl.constexpr):
    """Turn totals [K, 2C + 1] of all processes into moments [1, K, 4, C]. Grid: column blocks, K."""
    k = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = cols < channels
    at = totals + k * (2 * channels + 1)
    count = tl.load(at + 2 * channels)
    some = tl.maximum(count, 1.0)
    mean = tl.load(at + cols, mask=ok, other=0.0) / some
    m2 = tl.maximum(tl.load(at + channels + cols, mask=ok, other=0.0) - count * mean * mean, 0.0)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    rows = tl.zeros([BLOCK_C], tl.float32) + count.to(tl.float32)
    _store4(moments, k, channels, cols, ok, rows, high, low, m2.to(tl.float32))


@triton.jit
def _affine(weight, bias, cols, ok, AFFINE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return weight and bias of the columns, or 1 and 0 without affine parameters."""
    if AFFINE:
        w = tl.load(weight + cols, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    else:
        w = tl.full([BLOCK_C], 1.0, tl.float32)
        b = tl.zeros([BLOCK_C], tl.float32)
    return w, b


@triton.jit
def _normalising(at, channels, ok, eps):
    """Return mean, its low part and 1 / standard deviation of the columns whose statistics begin at `at`."""
    mean = tl.load(at + channels, mask=ok, other=0.0)
    low = tl.load(at + 2 * channels, mask=ok, other=0.0)
    rstd = tl.rsqrt(tl.load(at + 3 * channels, mask=ok, other=0.0) + eps)
    return mean, low, rstd


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x, y, moments, stats, weight, bias, running_mean, running_var, seed, x_stride, channels, groups, parts, steps,
    n0, n1, n2, n3, eps, slope, p,
    TRAINING: tl.constexpr, AFFINE: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the moments, normalise, activate, drop. Grid: column blocks, row blocks of `steps` tiles, K."""
    eps, slope, p = tl.cast(eps, tl.float32), tl.cast(slope, tl.float32), tl.cast(p, tl.float32)
    k = tl.program_id(2)
    start, rows = _group(k, n0, n1, n2, n3)
    column = tl.program_id(0) * BLOCK_C
    cols = column + tl.arange(0, BLOCK_C)
    ok = cols < channels
    if TRAINING:
        count, mean, low, m2 = _merged(moments, k, groups, parts, channels, cols, ok, BLOCK_C)
        some = tl.maximum(count, 1.0)
        variance = m2 / some
        share = tl.where(count > 0, 1.0 / some, 0.0)
    else:
        mean = tl.load(running_mean + k * channels + cols, mask=ok, other=0.0)
        variance = tl.load(running_var + k * channels + cols, mask=ok, other=1.0)
        low = tl.zeros([BLOCK_C], tl.float32)
        share = tl.zeros([BLOCK_C], tl.float32)
    rstd = tl.rsqrt(variance + eps)
    if tl.program_id(1) == 0:
        _store4(stats, k, channels, cols, ok, share, mean, low, variance)
    w, b = _affine(weight, bias, cols, ok, AFFINE, BLOCK_C)
    if DROPOUT:
        key = tl.load(seed)
    first = tl.program_id(1) * steps * BLOCK_R
    last = tl.minimum(first + steps * BLOCK_R, rows)
    for r in range(first, last, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        inside = (row < last)[:, None] & ok[None, :]
        wide = (start + row).to(tl.int64)[:, None]
        value = tl.load(x + wide * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        normal = ((value - mean[None, :]) - low[None, :]) * rstd[None, :]
        made = normal * w[None, :] + b[None, :]
        made = tl.where(made > 0, made, made * slope)
        if DROPOUT:
            made = made * _mask(key, start + row, column, channels, p, BLOCK_R, BLOCK_C)
        tl.store(y + wide * channels + cols[None, :], made.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    dy, x, stats, weight, bias, seed, out, dy_stride, x_stride, channels, groups, splits, n0, n1, n2, n3, eps, slope, p,
    AFFINE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the sums of the gradient over one split of one group's rows. Grid: column blocks, K, splits."""
    eps, slope, p = tl.cast(eps, tl.float32), tl.cast(slope, tl.float32), tl.cast(p, tl.float32)
    k = tl.program_id(1)
    split = tl.program_id(2)
    start, rows = _group(k, n0, n1, n2, n3)
    column = tl.program_id(0) * BLOCK_C
    cols = column + tl.arange(0, BLOCK_C)
    ok = cols < channels
    at = stats + k * 4 * channels + cols
    mean, low, rstd = _normalising(at, channels, ok, eps)
    w, b = _affine(weight, bias, cols, ok, AFFINE, BLOCK_C)
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    per = tl.cdiv(tl.cdiv(rows, splits), BLOCK_R) * BLOCK_R
    first = split * per
    last = tl.minimum(first + per, rows)
    sum_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(first, last, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        inside = (row < last)[:, None] & ok[None, :]
        normal, g = _before_activation(
            x, dy, x_stride, dy_stride, start + row, cols, inside, mean, low, rstd, w, b, key, column, channels,
            slope, p, DROPOUT, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        sum_g += g
        sum_gx += g * normal
    at = out + (split * groups + k) * 2 * channels + cols
    tl.store(at, tl.sum(sum_g, 0), mask=ok)
    tl.store(at + channels, tl.sum(sum_gx, 0), mask=ok)


@triton.jit
def _total(sums, k, groups, parts, channels, cols, ok, BLOCK_C: tl.constexpr):
    """Return both sums of group k over all parts."""
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_C], tl.float32)
    for part in range(parts):
        at = sums + (part * groups + k) * 2 * channels + cols
        sum_g += tl.load(at, mask=ok, other=0.0)
        sum_gx += tl.load(at + channels, mask=ok, other=0.0)
    return sum_g, sum_gx


@triton.jit(do_not_specialize=SIZES)
def input_grad_kernel(
    dy, x, stats, sums, weight, bias, seed, dx, dweight, dbias, dy_stride, x_stride, channels, groups, parts, steps,
    n0, n1, n2, n3, eps, slope, p,
    AFFINE: tl.constexpr, PARAMETERS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of input and parameters. Grid: column blocks, row blocks of `steps` tiles, K."""
    eps, slope, p = tl.cast(eps, tl.float32), tl.cast(slope, tl.float32), tl.cast(p, tl.float32)
    k = tl.program_id(2)
    start, rows = _group(k, n0, n1, n2, n3)
    column = tl.program_id(0) * BLOCK_C
    cols = column + tl.arange(0, BLOCK_C)
    ok = cols < channels
    at = stats + k * 4 * channels + cols
    share = tl.load(at, mask=ok, other=0.0)
    mean, low, rstd = _normalising(at, channels, ok, eps)
    w, b = _affine(weight, bias, cols, ok, AFFINE, BLOCK_C)
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    sum_g, sum_gx = _total(sums, k, groups, parts, channels, cols, ok, BLOCK_C)
    if PARAMETERS and (k == 0 and tl.program_id(1) == 0):
        grad_b, grad_w = sum_g, sum_gx
        for other in range(1, groups):
            more_b, more_w = _total(sums, other, groups, parts, channels, cols, ok, BLOCK_C)
            grad_b += more_b
            grad_w += more_w
        tl.store(dweight + cols, grad_w.to(dweight.dtype.element_ty), mask=ok)
        tl.store(dbias + cols, grad_b.to(dbias.dtype.element_ty), mask=ok)
    scale = w * rstd
    off = scale * (sum_g * share)
    off_x = scale * (sum_gx * share)
    first = tl.program_id(1) * steps * BLOCK_R
    last = tl.minimum(first + steps * BLOCK_R, rows)
    for r in range(first, last, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        inside = (row < last)[:, None] & ok[None, :]
        normal, g = _before_activation(
            x, dy, x_stride, dy_stride, start + row, cols, inside, mean, low, rstd, w, b, key, column, channels,
            slope, p, DROPOUT, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        grad = scale[None, :] * g - (normal * off_x[None, :] + off[None, :])
        wide = (start + row).to(tl.int64)[:, None]
        tl.store(dx + wide * channels + cols[None, :], grad.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def update_running_kernel(stats, running_mean, running_var, channels, momentum, BLOCK_C: tl.constexpr):
    """Move running statistics towards the batch's, variance unbiased; groups without rows keep theirs.

    Grid: column blocks, K."""
    momentum = tl.cast(momentum, tl.float32)
    k = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = cols < channels
    at = stats + k * 4 * channels + cols
    share = tl.load(at, mask=ok, other=1.0)
    mean = tl.load(at + channels, mask=ok, other=0.0)
    low = tl.load(at + 2 * channels, mask=ok, other=0.0)
    variance = tl.load(at + 3 * channels, mask=ok, other=0.0)
    use = ok & (share > 0)
    running = k * channels + cols
    old = tl.load(running_mean + running, mask=use, other=0.0)
    tl.store(running_mean + running, old + momentum * ((mean - old) + low), mask=use)
    old = tl.load(running_var + running, mask=use, other=0.0)
    tl.store(running_var + running, old + momentum * (variance / tl.maximum(1.0 - share, 1e-9) - old), mask=use)
