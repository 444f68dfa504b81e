"""Kernels that compute exponents of tiles of points and components by matrix products: log-sum-exps and partial sums of moments.

Each point and each component has three rows of W float16 digits, of which the first ones are integers, see
:mod:`gmmkeops.reductions.triton.digits`. Tensor cores compute the products of digits exactly and add them in float32. The
numbers of rows are padded to multiples of the sizes of tiles, so that no masks are needed.
"""

import triton
import triton.language as tl

__all__ = ["logsumexps", "moments", "split"]


@triton.jit
def _integer(v):
    """Round float32 numbers of absolute value below 2**22 to the nearest integer."""
    return ((v + 12582912.0).to(tl.int32, bitcast=True) - 1262485504).to(tl.float32)


@triton.jit
def _store_digits(digit_ptr, step, whole, rest):
    """Store the digits of a sum of integers and small numbers."""
    middle = rest.to(tl.float16)
    tl.store(digit_ptr, whole.to(tl.float16))
    tl.store(digit_ptr + step, middle)
    tl.store(digit_ptr + 2 * step, (rest - middle.to(tl.float32)).to(tl.float16))


@triton.jit(do_not_specialize=["N", "M"])
def split(
    x_ptr,
    a_ptr,
    digit_ptr,
    row_ptr,
    N,
    M,
    D: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BN: tl.constexpr,
):
    """Split points into digits (3, M, W), and compute two numbers (2, M) for each point.

    The first row of ``a_ptr`` (2, P) is the reference point, the other one has factors of differences from it. The entries of a
    point are these products z and, for diagonal factors, z²/2048. For spherical factors, the numbers of a point are the sum of
    the squares of the integers, and the sum of z² less that. A point with an entry that is too large has a second number of 1e30.
    Rows from N on are zero.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, P)
    inside = (rows < N)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + (rows[:, None] * D + d[None, :]), mask=inside, other=0.0)
    z = (x - tl.load(a_ptr + d)[None, :]) * tl.load(a_ptr + P + d)[None, :]
    z = tl.where(inside, z, 0.0)
    # The comparison is false for NaN.
    most: tl.constexpr = 2047.0 if DIAGONAL else 4095.0
    good = tl.min((tl.abs(z) <= most).to(tl.int32), 1) > 0
    z = tl.where(good[:, None], z, 0.0)
    # Integers beyond 2048 are even.
    whole = _integer(z).to(tl.float16).to(tl.float32)
    rest = z - whole
    step = M * W
    digit_ptr += rows[:, None] * W + d[None, :]
    _store_digits(digit_ptr, step, whole, rest)
    more = rest * (2 * whole + rest)
    if DIAGONAL:
        # The squares of integers have at most 22 significant bits.
        square = whole * whole * 0.00048828125
        large = _integer(square)
        _store_digits(digit_ptr + P, step, large, (square - large) + more * 0.00048828125)
        first = tl.zeros((BN,), tl.float32)
        second = tl.zeros((BN,), tl.float32)
    else:
        first = tl.sum(whole * whole, 1)
        second = tl.sum(more, 1)
    tl.store(row_ptr + rows, first)
    tl.store(row_ptr + M + rows, tl.where(good, second, 1e30))


@triton.jit
def _digits(digit_ptr, step, first, B: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """Load the digits of consecutive rows: three tiles (B, BW) for each block of columns."""
    # Offsets from a common pointer take few registers.
    place = tl.arange(0, B)[:, None] * W + tl.arange(0, BW)[None, :]
    found = ()
    for b in tl.static_range(W // BW):
        for digit in tl.static_range(3):
            found = found + (tl.load(digit_ptr + (first * W + digit * step + b * BW) + place),)
    return found


@triton.jit
def _product(x, p, total, BY_ROW: tl.constexpr):
    """Add the products of points and components, of which the former are rows or columns."""
    if BY_ROW:
        total = tl.dot(x, tl.trans(p), total)
    else:
        total = tl.dot(p, tl.trans(x), total)
    return total


@triton.jit
def _products(x, p, zero, BLOCKS: tl.constexpr, BY_ROW: tl.constexpr):
    """Return the products of the integers of points and components, and the sum of the next five products.

    The order of the sums does not depend on whether points are rows or columns, so that the exponents do not either.
    """
    small = zero
    for i in tl.static_range(BLOCKS):
        small = _product(x[3 * i + 2], p[3 * i], small, BY_ROW)
        small = _product(x[3 * i], p[3 * i + 2], small, BY_ROW)
        small = _product(x[3 * i + 1], p[3 * i + 1], small, BY_ROW)
        small = _product(x[3 * i + 1], p[3 * i], small, BY_ROW)
        small = _product(x[3 * i], p[3 * i + 1], small, BY_ROW)
    large = zero
    for i in tl.static_range(BLOCKS):
        large = _product(x[3 * i], p[3 * i], large, BY_ROW)
    return large, small


@triton.jit(do_not_specialize=["N", "K", "M", "KP"])
def logsumexps(
    digit_ptr,
    row_ptr,
    p_digit_ptr,
    p_ptr,
    o_ptr,
    N,
    K,
    M,
    KP,
    W: tl.constexpr,
    BW: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the base-2 log-sum-exps (N,). Component parameters ``p_ptr`` (3, KP) are c, w and J."""
    n0 = tl.program_id(0) * BN
    rows = n0 + tl.arange(0, BN)
    x = _digits(digit_ptr, M * W, n0, BN, W, BW)
    whole = tl.load(row_ptr + rows)
    missing = tl.load(row_ptr + M + rows)
    m = tl.full((BN,), -1e38, tl.float32)
    s = tl.zeros((BN,), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        p = _digits(p_digit_ptr, KP * W, k0, BK, W, BW)
        large, small = _products(x, p, tl.zeros((BN, BK), tl.float32), W // BW, True)
        c = tl.load(p_ptr + k)
        w = tl.load(p_ptr + KP + k)
        J = tl.load(p_ptr + 2 * KP + k)
        # The sums of integers are exact.
        if DIAGONAL:
            q = (J[None, :] + large) + small
        else:
            q = ((whole[:, None] + J[None, :]) + large) + (missing[:, None] + small)
        e = c[None, :] - w[None, :] * q
        n = tl.maximum(m, tl.max(e, 1))
        s = s * tl.exp2(m - n) + tl.sum(tl.exp2(e - n[:, None]), 1)
        m = n
    values = m + tl.log2(s)
    if DIAGONAL:
        values -= missing
    tl.store(o_ptr + rows, values, mask=rows < N)


@triton.jit(do_not_specialize=["N", "K", "M", "KP", "C"])
def moments(
    digit_ptr,
    row_ptr,
    p_digit_ptr,
    p_ptr,
    a_ptr,
    l_ptr,
    g_ptr,
    o_ptr,
    N,
    K,
    M,
    KP,
    C,
    W: tl.constexpr,
    BW: tl.constexpr,
    DIAGONAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute partial sums (M, W + 4) of r X, r and r q over chunks of C rows, times 2**14, given base-2 log-sum-exps.

    The sum over a tile is computed by tensor cores, which truncate, and added to the others by an addition that rounds.
    """
    k0 = tl.program_id(0) * BK
    chunk = tl.program_id(1)
    k = k0 + tl.arange(0, BK)
    p = _digits(p_digit_ptr, KP * W, k0, BK, W, BW)
    c = tl.load(p_ptr + k)
    w = tl.load(p_ptr + KP + k)
    J = tl.load(p_ptr + 2 * KP + k)
    if DIAGONAL:
        center = ()
        for b in tl.static_range(W // BW):
            center = center + (tl.load(a_ptr + (k[:, None] * W + b * BW + tl.arange(0, BW)[None, :])),)
    S0 = tl.zeros((BK,), tl.float32)
    Sq = tl.zeros((BK,), tl.float32)
    S = ()
    for b in tl.static_range(W // BW):
        S = S + (tl.zeros((BK, BW), tl.float32),)
    first = chunk * C
    for n0 in tl.range(first, tl.minimum(first + C, N), BN, num_stages=STAGES):
        rows = n0 + tl.arange(0, BN)
        x = _digits(digit_ptr, M * W, n0, BN, W, BW)
        level = tl.load(l_ptr + rows, mask=rows < N, other=1e30)
        large, small = _products(x, p, tl.zeros((BK, BN), tl.float32), W // BW, False)
        if DIAGONAL:
            q = (J[:, None] + large) + small
        else:
            whole = tl.load(row_ptr + rows)
            missing = tl.load(row_ptr + M + rows)
            q = ((whole[None, :] + J[:, None]) + large) + (missing[None, :] + small)
        # Responsibilities times 2**14 are in the middle of the range of float16.
        r = tl.exp2((c[:, None] - w[:, None] * q) - level[None, :]) * 16384.0
        if WEIGHTED:
            r *= tl.load(g_ptr + rows, mask=rows < N, other=0.0)[None, :]
        r_head = r.to(tl.float16)
        r_rest = (r - r_head.to(tl.float32)).to(tl.float16)
        if not DIAGONAL:
            Sq += tl.sum(r * q, 1)
        total = tl.sum(r, 1)
        S0 += total
        # This product with one makes the compiler convert the centers here, where they need few registers.
        one = (total * 0.0 + 1.0).to(tl.float16)[:, None]
        new = ()
        for b in tl.static_range(W // BW):
            if DIAGONAL:
                part = tl.dot(r_head, x[3 * b], -total[:, None] * (one * center[b]).to(tl.float32))
                part = tl.dot(r_rest, x[3 * b], part)
                # Squares are small numbers in these units, so that their second and third digits matter.
                part = tl.dot(r_head, x[3 * b + 2], part)
                part = tl.dot(r_rest, x[3 * b + 1], part)
                new = new + (S[b] + tl.dot(r_head, x[3 * b + 1], part),)
            else:
                part = tl.dot(r_rest, x[3 * b])
                part = S[b] + tl.dot(r_head, x[3 * b + 1], part)
                new = new + (part + tl.dot(r_head, x[3 * b]),)
        S = new
    o_ptr += (chunk.to(tl.int64) * K + k) * (W + 4)
    real = k < K
    for b in tl.static_range(W // BW):
        tl.store(o_ptr[:, None] + (b * BW + tl.arange(0, BW))[None, :], S[b], mask=real[:, None])
    tl.store(o_ptr + W, S0, mask=real)
    tl.store(o_ptr + (W + 1), Sq, mask=real)
    # Rows have W + 4 numbers, so that they are aligned to 16 bytes; the last two are padding.
    tl.store(o_ptr + (W + 2), 0.0, mask=real)
    tl.store(o_ptr + (W + 3), 0.0, mask=real)
