"""Kernels that process a tile of points and one component at a time: log-sum-exps and partial sums of moments in many dimensions.

Full factors are applied by tensor cores. Each factor of a product is the sum of two numbers with the eleven significant bits of
TF32, so that products have the accuracy of float32 (see :mod:`gmmkeops.reductions.dense.products`).

The record of a component has c at 0, m at 16, d at 16 + P, and V at 16 + 2 P, where P is the padded number of dimensions: for
full factors the heads (P, P) and the rests (P, P) of V, otherwise (P). Padding is zero.
"""

import triton
import triton.language as tl

from gmmkeops.reductions.triton.kernels.rows import block_of, component_of, note_least

__all__ = ["logsumexps", "moments"]


@triton.jit
def _halves(v):
    """Split numbers into a number with eleven significant bits and the rest, of which tensor cores read eleven bits."""
    head = ((v.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return head, v - head


@triton.jit
def _exponent(x, p, D: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr):
    """Return the residuals z, the whitened residuals y and the exponents less c of a tile of points, for the record at p.

    The offset c includes the expected value of -|y|², which is taken out of the squares, so that rounding errors are small.
    """
    d = tl.arange(0, P)
    z = x - tl.load(p + 16 + d)[None, :]
    y = tl.zeros_like(z) + tl.load(p + (16 + P) + d)[None, :]
    p += 16 + 2 * P
    if FULL:
        place = d[:, None] * P + d[None, :]
        head = tl.load(p + place)
        z_head, z_rest = _halves(z)
        y = tl.dot(z_rest, head, y, input_precision="tf32")
        y = tl.dot(z_head, tl.load(p + P * P + place), y, input_precision="tf32")
        y = tl.dot(z_head, head, y, input_precision="tf32")
    else:
        y += tl.load(p + d)[None, :] * z
    return z, y, tl.sum(tl.where(d < D, 0.71875, 0.0)[None, :] - y * y, 1)


@triton.jit
def _tile(x_ptr, rows, valid, D: tl.constexpr, P: tl.constexpr):
    """Load the coordinates (BN, P) of rows, padded by zeros."""
    d = tl.arange(0, P)
    place = rows.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(x_ptr + place, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["N", "K"])
def logsumexps(
    x_ptr,
    p_ptr,
    o_ptr,
    least_ptr,
    block_ptr,
    pointer_ptr,
    index_ptr,
    N,
    K,
    D: tl.constexpr,
    P: tl.constexpr,
    FULL: tl.constexpr,
    R: tl.constexpr,
    LISTS: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the base-2 log-sum-exps (N,), and their minimum in each block of rows if there are lists."""
    rows, valid, index_ptr, count = block_of(block_ptr, pointer_ptr, index_ptr, N, K, BN, LISTS)
    x = _tile(x_ptr, rows, valid, D, P)
    m = tl.full((BN,), -1e38, x_ptr.dtype.element_ty)
    s = tl.zeros((BN,), x_ptr.dtype.element_ty)
    for k in range(0, count):
        c = component_of(index_ptr, k, count, K, LISTS)
        p = p_ptr + c * R
        z, y, e = _exponent(x, p, D, P, FULL)
        e += tl.load(p)
        n = tl.maximum(m, e)
        s = s * tl.exp2(m - n) + tl.exp2(e - n)
        m = n
    values = m + tl.log2(s)
    tl.store(o_ptr + rows, values, mask=valid)
    note_least(least_ptr, values, valid, LISTS)


@triton.jit(do_not_specialize=["origin", "N", "K", "C"])
def moments(
    x_ptr,
    p_ptr,
    l_ptr,
    g_ptr,
    o_ptr,
    block_ptr,
    pointer_ptr,
    index_ptr,
    end_ptr,
    component_ptr,
    origin,
    N,
    K,
    C,
    D: tl.constexpr,
    P: tl.constexpr,
    FULL: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LISTS: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute partial sums of moments (M, W) over chunks of C rows: S0, S1 (P), and S2 (P, P) of y if full, or (P) of z."""
    j = tl.program_id(0)
    t = tl.program_id(1)
    if LISTS:
        n0 = tl.load(block_ptr + 3 * t)
        n1 = tl.load(block_ptr + 3 * t + 1)
        pointer_ptr += tl.load(block_ptr + 3 * t + 2)
        first = tl.load(pointer_ptr)
        count = tl.load(pointer_ptr + 1) - first
        k = tl.load(index_ptr + first + j, mask=j < count, other=0).to(tl.int32)
        start = tl.load(end_ptr + t) - count - origin
        tl.store(component_ptr + start + j, k, mask=j < count)
        o_ptr += (start + j) * W
    else:
        n0 = t * C
        n1 = tl.minimum(n0 + C, N)
        count = K
        k = j
        o_ptr += (t.to(tl.int64) * K + j) * W
    if j < count:
        p = p_ptr + k * R
        c = tl.load(p)
        d = tl.arange(0, P)
        S0 = tl.zeros((BN,), tl.float32)
        S1 = tl.zeros((BN, P), tl.float32)
        if FULL:
            S2 = tl.zeros((P, P), tl.float32)
            cross = tl.zeros((P, P), tl.float32)
        else:
            S2 = tl.zeros((BN, P), tl.float32)
        for n in range(n0, n1, BN):
            rows = n + tl.arange(0, BN)
            valid = rows < n1
            z, y, e = _exponent(_tile(x_ptr, rows, valid, D, P), p, D, P, FULL)
            e += c - tl.load(l_ptr + rows, mask=valid, other=1e30)
            r = tl.exp2(e)
            if WEIGHTED:
                g = tl.load(g_ptr + rows, mask=valid, other=0.0)
                r = g * r
            S0 += r
            if FULL:
                # The outer products of √r y need one splitting only; weights of both signs have a root of their absolute value.
                root = tl.where(e >= -126, tl.exp2(0.5 * e), 0.0)
                if WEIGHTED:
                    root = root * tl.sqrt(tl.abs(g))
                v = root[:, None] * y
                head, rest = _halves(v)
                left = head
                if WEIGHTED:
                    sign = tl.where(g < 0, -1.0, 1.0)
                    root = sign * root
                    left = sign[:, None] * head
                left = tl.trans(left)
                S1 += root[:, None] * v
                S2 = tl.dot(left, head, S2, input_precision="tf32")
                cross = tl.dot(left, rest, cross, input_precision="tf32")
            else:
                q = r[:, None] * z
                S1 += q
                S2 += q * z
        tl.store(o_ptr, tl.sum(S0, 0))
        tl.store(o_ptr + 1 + d, tl.sum(S1, 0))
        if FULL:
            tl.store(o_ptr + 1 + P + d[:, None] * P + d[None, :], S2 + cross + tl.trans(cross))
        else:
            tl.store(o_ptr + 1 + P + d, tl.sum(S2, 0))
