"""Kernels in which a thread owns points: log-sum-exps, largest exponents, random labels and gradients.

All of them loop over components, whose parameters are scalars for the threads of a program. The record of a component is
[c, m, d, u], see :class:`gmmkeops.reductions.triton.packing.Packed`. A tuple of D tensors holds the coordinates of the points.

Each program has a block of rows and a range of components: all of them or, for ``LISTS``, those of a list. The row of
``block_ptr`` is (first row, last-plus-one row, list), and ``pointer_ptr`` holds the first position of each list in ``index_ptr``.
"""

import triton
import triton.language as tl

__all__ = ["block_of", "component_of", "draws", "gradients", "largest", "logsumexps", "note_least"]


@triton.jit
def block_of(block_ptr, pointer_ptr, index_ptr, N, K, BN: tl.constexpr, LISTS: tl.constexpr):
    """Return the rows of the program, the mask of the valid ones, its list, and the number of its components."""
    t = tl.program_id(0)
    if LISTS:
        rows = tl.load(block_ptr + 3 * t) + tl.arange(0, BN)
        valid = rows < tl.load(block_ptr + 3 * t + 1)
        pointer_ptr += tl.load(block_ptr + 3 * t + 2)
        first = tl.load(pointer_ptr)
        count = (tl.load(pointer_ptr + 1) - first).to(tl.int32)
        index_ptr += first
    else:
        rows = t * BN + tl.arange(0, BN)
        valid = rows < N
        count = K
    return rows, valid, index_ptr, count


@triton.jit
def component_of(index_ptr, k, count, K, LISTS: tl.constexpr):
    """Return the component at position k; for lists, component K of no weight beyond their end."""
    if LISTS:
        k = tl.load(index_ptr + k, mask=k < count, other=K).to(tl.int32)
    return k


@triton.jit
def _points(x_ptr, rows, valid, D: tl.constexpr):
    """Load the coordinates of rows."""
    x = ()
    for a in tl.static_range(D):
        x = x + (tl.load(x_ptr + rows.to(tl.int64) * D + a, mask=valid, other=0.0),)
    return x


@triton.jit
def _plus(v, u, z, D: tl.constexpr):
    """Return v + u z.

    From compute capability 10 on, Triton packs the products of two points, and then adds some of them separately, unless ``fma``
    is used. With many dimensions ``fma`` takes too many registers.
    """
    if D <= 4:
        return tl.fma(z, u, v)
    else:
        return v + u * z


@triton.jit
def _exponent(x, p, D: tl.constexpr, FAMILY: tl.constexpr):
    """Return the whitened residuals y of points and the exponents, for the component whose record begins at p.

    The offset c includes the expected value of -|y|². It is taken out of sums of at most eight squares, so that partial sums are
    small and rounding errors do not grow with D.
    """
    z = ()
    for a in tl.static_range(D):
        z = z + (x[a] - tl.load(p + (1 + a)),)
    y = ()
    for a in tl.static_range(D):
        v = tl.load(p + (1 + D + a))
        if FAMILY == "full":
            for b in tl.static_range(a + 1):
                v = _plus(v, tl.load(p + (1 + 2 * D + a * (a + 1) // 2 + b)), z[b], D)
        elif FAMILY == "diagonal":
            v = _plus(v, tl.load(p + (1 + 2 * D + a)), z[a], D)
        else:
            v = _plus(v, tl.load(p + (1 + 2 * D)), z[a], D)
        y = y + (v,)
        if a % 8 == 0:
            t = (8 if D - a > 8 else D - a) * 0.71875 - v * v
        else:
            t = t - v * v
        if a % 8 == 7 or a == D - 1:
            if a < 8:
                total = t
            else:
                total = total + t
    return y, tl.load(p) + total


@triton.jit
def note_least(least_ptr, values, valid, LISTS: tl.constexpr):
    """Store the smallest value of the rows of the program; -inf if one is NaN or less than what a kernel begins with."""
    if LISTS:
        values = tl.where(values > -9.9e37, values, float("-inf"))
        tl.store(least_ptr + tl.program_id(0), tl.min(tl.where(valid, values, float("inf")), 0))


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
    FAMILY: tl.constexpr,
    R: tl.constexpr,
    LISTS: tl.constexpr,
    BN: tl.constexpr,
    U: tl.constexpr,
):
    """Compute the base-2 log-sum-exps (N,), and their minimum in each block of rows if there are lists."""
    rows, valid, index_ptr, count = block_of(block_ptr, pointer_ptr, index_ptr, N, K, BN, LISTS)
    x = _points(x_ptr, rows, valid, D)
    m = tl.full((BN,), -1e38, x_ptr.dtype.element_ty)
    s = tl.zeros((BN,), x_ptr.dtype.element_ty)
    for k in range(0, count, U):
        n = m
        es = ()
        for i in tl.static_range(U):
            c = component_of(index_ptr, k + i, count, K, LISTS)
            y, e = _exponent(x, p_ptr + c * R, D, FAMILY)
            n = tl.maximum(n, e)
            es = es + (e,)
        s = s * tl.exp2(m - n)
        for i in tl.static_range(U):
            s += tl.exp2(es[i] - n)
        m = n
    values = m + tl.log2(s)
    tl.store(o_ptr + rows, values, mask=valid)
    note_least(least_ptr, values, valid, LISTS)


@triton.jit(do_not_specialize=["N", "K"])
def largest(
    x_ptr,
    p_ptr,
    o_ptr,
    label_ptr,
    least_ptr,
    block_ptr,
    pointer_ptr,
    index_ptr,
    N,
    K,
    TOP: tl.constexpr,
    D: tl.constexpr,
    FAMILY: tl.constexpr,
    R: tl.constexpr,
    LISTS: tl.constexpr,
    BN: tl.constexpr,
    U: tl.constexpr,
):
    """Compute the TOP largest base-2 exponents (N, TOP) and their components; if two are equal, the one that is listed first."""
    rows, valid, index_ptr, count = block_of(block_ptr, pointer_ptr, index_ptr, N, K, BN, LISTS)
    x = _points(x_ptr, rows, valid, D)
    best = ()
    label = ()
    for j in tl.static_range(TOP):
        best = best + (tl.full((BN,), -1e38, x_ptr.dtype.element_ty),)
        label = label + (tl.zeros((BN,), tl.int32),)
    for k in range(0, count, U):
        for i in tl.static_range(U):
            c = component_of(index_ptr, k + i, count, K, LISTS)
            y, e = _exponent(x, p_ptr + c * R, D, FAMILY)
            c = tl.zeros((BN,), tl.int32) + c
            better = e > best[0]
            new = ()
            names = ()
            for j in tl.static_range(TOP):
                # Once a value has been inserted, those after it move down by one place.
                better = better | (e > best[j])
                new = new + (tl.where(better, e, best[j]),)
                names = names + (tl.where(better, c, label[j]),)
                e = tl.where(better, best[j], e)
                c = tl.where(better, label[j], c)
            best = new
            label = names
    places = rows.to(tl.int64) * TOP
    for j in tl.static_range(TOP):
        tl.store(o_ptr + places + j, best[j], mask=valid)
        tl.store(label_ptr + places + j, label[j], mask=valid)
    note_least(least_ptr, best[TOP - 1], valid, LISTS)


@triton.jit(do_not_specialize=["N", "K"])
def draws(
    x_ptr,
    p_ptr,
    l_ptr,
    u_ptr,
    label_ptr,
    block_ptr,
    pointer_ptr,
    index_ptr,
    N,
    K,
    D: tl.constexpr,
    FAMILY: tl.constexpr,
    R: tl.constexpr,
    LISTS: tl.constexpr,
    BN: tl.constexpr,
    U: tl.constexpr,
):
    """Choose the first component at which the running sum of responsibilities reaches a number in (0, 1]."""
    rows, valid, index_ptr, count = block_of(block_ptr, pointer_ptr, index_ptr, N, K, BN, LISTS)
    x = _points(x_ptr, rows, valid, D)
    level = tl.load(l_ptr + rows, mask=valid, other=0.0)
    u = tl.load(u_ptr + rows, mask=valid, other=1.0)
    s = tl.zeros((BN,), x_ptr.dtype.element_ty)
    label = tl.full((BN,), -1, tl.int32)
    for k in range(0, count, U):
        for i in tl.static_range(U):
            c = component_of(index_ptr, k + i, count, K, LISTS)
            y, e = _exponent(x, p_ptr + c * R, D, FAMILY)
            r = tl.exp2(e - level)
            # If rounding keeps the sum below the number, the last component of positive probability is chosen.
            label = tl.where((s < u) & (r > 0), c, label)
            s += r
    tl.store(label_ptr + rows, label, mask=valid)


@triton.jit(do_not_specialize=["N", "K"])
def gradients(
    x_ptr,
    p_ptr,
    l_ptr,
    o_ptr,
    block_ptr,
    pointer_ptr,
    index_ptr,
    N,
    K,
    D: tl.constexpr,
    FAMILY: tl.constexpr,
    R: tl.constexpr,
    LISTS: tl.constexpr,
    BN: tl.constexpr,
    U: tl.constexpr,
):
    """Compute Σ r U y (N, D) with the scaled factors U of the records, given the base-2 log-sum-exps."""
    rows, valid, index_ptr, count = block_of(block_ptr, pointer_ptr, index_ptr, N, K, BN, LISTS)
    x = _points(x_ptr, rows, valid, D)
    level = tl.load(l_ptr + rows, mask=valid, other=0.0)
    sums = ()
    for a in tl.static_range(D):
        sums = sums + (tl.zeros((BN,), x_ptr.dtype.element_ty),)
    for k in range(0, count, U):
        for i in tl.static_range(U):
            c = component_of(index_ptr, k + i, count, K, LISTS)
            p = p_ptr + c * R
            y, e = _exponent(x, p, D, FAMILY)
            r = tl.exp2(e - level)
            q = ()
            for a in tl.static_range(D):
                q = q + (r * y[a],)
            new = ()
            for b in tl.static_range(D):
                v = sums[b]
                if FAMILY == "full":
                    for a in tl.static_range(b, D):
                        v += tl.load(p + (1 + 2 * D + a * (a + 1) // 2 + b)) * q[a]
                elif FAMILY == "diagonal":
                    v += tl.load(p + (1 + 2 * D + b)) * q[b]
                else:
                    v += tl.load(p + (1 + 2 * D)) * q[b]
                new = new + (v,)
            sums = new
    for a in tl.static_range(D):
        tl.store(o_ptr + rows.to(tl.int64) * D + a, sums[a], mask=valid)
