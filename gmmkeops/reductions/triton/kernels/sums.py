"""Kernels in which a thread owns components: partial sums of moments over chunks of rows, and their float64 totals.

The points of a chunk are scalars for the threads of a program. Partial sums are stored as (W, M), where the M columns are the
components of the first chunk, then those of the second one, and so on.
"""

import triton
import triton.language as tl

__all__ = ["add_partial_sums", "moments"]


@triton.jit
def _add_points(
    x_ptr,
    l_ptr,
    g_ptr,
    n0,
    c,
    m,
    d,
    u,
    sums,
    D: tl.constexpr,
    FAMILY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    U: tl.constexpr,
):
    """Return the sums after U points: S0, S1 and S2 of whitened residuals y if full, otherwise of z = x - m."""
    for i in tl.static_range(U):
        n = n0 + i
        z = ()
        for a in tl.static_range(D):
            z = z + (tl.load(x_ptr + (n * D + a)) - m[a],)
        v = z
        if FAMILY == "full":
            v = ()
            for a in tl.static_range(D):
                y = d[a]
                for b in tl.static_range(a + 1):
                    y += u[a * (a + 1) // 2 + b] * z[b]
                v = v + (y,)
        for a in tl.static_range(D):
            y = v[a]
            if FAMILY == "diagonal":
                y = u[a] * z[a] + d[a]
            elif FAMILY == "spherical":
                y = u[0] * z[a] + d[a]
            # Squares minus their expected value, as for log-sum-exps.
            if a % 8 == 0:
                t = (8 if D - a > 8 else D - a) * 0.71875 - y * y
            else:
                t = t - y * y
            if a % 8 == 7 or a == D - 1:
                if a < 8:
                    total = t
                else:
                    total = total + t
        r = tl.exp2((c - tl.load(l_ptr + n)) + total)
        if WEIGHTED:
            r = r * tl.load(g_ptr + n)
        new = (sums[0] + r,)
        q = ()
        for a in tl.static_range(D):
            q = q + (r * v[a],)
            new = new + (sums[1 + a] + q[a],)
        if FAMILY == "full":
            for a in tl.static_range(D):
                for b in tl.static_range(a + 1):
                    new = new + (sums[1 + D + a * (a + 1) // 2 + b] + q[a] * v[b],)
        elif FAMILY == "diagonal":
            for a in tl.static_range(D):
                new = new + (sums[1 + D + a] + q[a] * v[a],)
        else:
            square = sums[1 + D]
            for a in tl.static_range(D):
                square += q[a] * v[a]
            new = new + (square,)
        sums = new
    return sums


@triton.jit(do_not_specialize=["origin", "N", "K", "M", "C"])
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
    M,
    C,
    D: tl.constexpr,
    FAMILY: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LISTS: tl.constexpr,
    BK: tl.constexpr,
    U: tl.constexpr,
):
    """Compute partial sums of moments over chunks of C rows, given base-2 log-sum-exps and weights."""
    t = tl.program_id(1)
    j = tl.program_id(0) * BK + tl.arange(0, BK)
    if LISTS:
        n0 = tl.load(block_ptr + 3 * t)
        n1 = tl.load(block_ptr + 3 * t + 1)
        pointer_ptr += tl.load(block_ptr + 3 * t + 2)
        first = tl.load(pointer_ptr)
        count = tl.load(pointer_ptr + 1) - first
        k = tl.load(index_ptr + first + j, mask=j < count, other=0).to(tl.int32)
        start = tl.load(end_ptr + t) - count - origin
        tl.store(component_ptr + start + j, k, mask=j < count)
        o_ptr += start
    else:
        n0 = t * C
        n1 = tl.minimum(n0 + C, N)
        count = K
        k = j
        o_ptr += t.to(tl.int64) * K
    valid = j < count
    if tl.program_id(0) * BK < count:
        p = p_ptr + k * R
        c = tl.load(p, mask=valid, other=-1e30)
        m = ()
        d = ()
        for a in tl.static_range(D):
            m = m + (tl.load(p + 1 + a, mask=valid, other=0.0),)
            d = d + (tl.load(p + 1 + D + a, mask=valid, other=0.0),)
        u = ()
        for a in tl.static_range(R - 1 - 2 * D):
            u = u + (tl.load(p + 1 + 2 * D + a, mask=valid, other=0.0),)
        sums = ()
        for a in tl.static_range(W):
            sums = sums + (tl.zeros((BK,), x_ptr.dtype.element_ty),)
        x_ptr += n0.to(tl.int64) * D
        l_ptr += n0
        g_ptr += n0
        size = n1 - n0
        whole = size // U * U
        for n in range(0, whole, U):
            sums = _add_points(x_ptr, l_ptr, g_ptr, n, c, m, d, u, sums, D, FAMILY, WEIGHTED, U)
        for n in range(whole, size):
            sums = _add_points(x_ptr, l_ptr, g_ptr, n, c, m, d, u, sums, D, FAMILY, WEIGHTED, 1)
        for a in tl.static_range(W):
            tl.store(o_ptr + M.to(tl.int64) * a + j, sums[a], mask=valid)


@triton.jit(do_not_specialize=["K", "chunks", "step", "shift", "s_step", "s_shift"])
def add_partial_sums(
    o_ptr,
    s_ptr,
    order_ptr,
    pointer_ptr,
    K,
    chunks,
    step,
    shift,
    s_step,
    s_shift,
    LISTS: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
):
    """Add partial sums (W, M) to the totals (W, K), float64, in the order of the chunks.

    Columns are ``step`` numbers apart and rows ``shift`` numbers, and ``s_step`` and ``s_shift`` for the totals. With lists,
    ``order_ptr`` holds the columns of each component one after another, and ``pointer_ptr`` (K + 1,) their ranges.
    """
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    w = tl.program_id(1).to(tl.int64)
    valid = k < K
    o_ptr += w * shift
    j = tl.arange(0, BJ)
    total = tl.zeros((BJ, BK), tl.float64)
    if LISTS:
        first = tl.load(pointer_ptr + k, mask=valid, other=0)
        count = tl.load(pointer_ptr + k + 1, mask=valid, other=0) - first
        most = tl.max(count, 0)
    else:
        first = k
        count = tl.zeros((BK,), tl.int32) + chunks
        most = chunks
    for j0 in range(0, most, BJ):
        inside = valid[None, :] & ((j0 + j)[:, None] < count[None, :])
        if LISTS:
            column = tl.load(order_ptr + first[None, :] + (j0 + j)[:, None], mask=inside, other=0).to(tl.int64)
        else:
            column = (j0 + j).to(tl.int64)[:, None] * K + k[None, :]
        total += tl.load(o_ptr + column * step, mask=inside, other=0.0).to(tl.float64)
    s_ptr += w * s_shift + k.to(tl.int64) * s_step
    tl.store(s_ptr, tl.load(s_ptr, mask=valid, other=0.0) + tl.sum(total, 0), mask=valid)
