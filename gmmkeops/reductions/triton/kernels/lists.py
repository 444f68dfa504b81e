"""Kernels that compute and check candidate lists.

The bounds and the rule by which they are pruned are those of :mod:`gmmkeops.reductions.truncation.bounds`. A program owns a node
of the kd-tree or, for the checks, a leaf. The components of the list of its parent are the lanes. Bounds are computed twice,
before and after the rule is known, without fused multiplications and additions, so that both are equal.

The list of a node is stored at the beginning of the space for that of its parent. Positions in lists have 64 bits.
"""

import triton
import triton.language as tl

__all__ = ["check", "compact", "refine"]


@triton.jit
def _lower_limit(minima, rounding, share, give):
    """Return the log of the density that may be pruned, given estimated minima; -inf and +inf stay, NaN becomes -inf."""
    size = tl.maximum(tl.abs(minima), 1.0)
    limit = tl.where(tl.abs(minima) < float("inf"), minima - 4 * rounding * size + share - give, minima)
    return tl.where(minima > -float("inf"), limit, -float("inf"))


@triton.jit
def _bounds(
    c,
    inside,
    box,
    t,
    offset_ptr,
    mean_ptr,
    u_ptr,
    u_step,
    common_ptr,
    D: tl.constexpr,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return upper bounds of the exponents of components c over node t; -inf for lanes that are not inside."""
    center_ptr, axes_ptr, half_ptr, semi_ptr, reach_ptr = box
    z = ()
    for a in tl.static_range(D):
        b = tl.load(center_ptr + t * D + a, volatile=D > 4) - tl.load(common_ptr + a, volatile=D > 4)
        z = z + (b - tl.load(mean_ptr + c * D + a, mask=inside, other=0.0),)
    distance = z[0] * z[0]
    for a in tl.static_range(1, D):
        distance += z[a] * z[a]
    u_ptr += c * u_step
    norm = tl.zeros_like(distance)
    square = tl.zeros_like(distance)
    slope = ()
    if FULL:
        for a in tl.static_range(D):
            slope = slope + (tl.zeros_like(distance),)
        for e in tl.static_range(D):
            y = tl.zeros_like(distance)
            column = ()
            for a in tl.static_range(D):
                u = tl.load(u_ptr + a * D + e, mask=inside, other=0.0)
                square += u * u
                y += u * z[a]
                column = column + (u,)
            norm += y * y
            new = ()
            for a in tl.static_range(D):
                new = new + (slope[a] + y * column[a],)
            slope = new
    else:
        for a in tl.static_range(D):
            u = tl.load(u_ptr + (a if WIDE else 0), mask=inside, other=0.0)
            if WIDE or a == 0:
                square += u * u
            y = u * z[a]
            norm += y * y
            slope = slope + (y * u,)
    box_support = tl.zeros_like(distance)
    ellipsoid = tl.zeros_like(distance)
    for e in tl.static_range(D):
        v = tl.zeros_like(distance)
        for a in tl.static_range(D):
            v += slope[a] * tl.load(axes_ptr + (t * D + a) * D + e, volatile=D > 4)
        box_support += tl.abs(v) * tl.load(half_ptr + t * D + e, volatile=D > 4)
        v *= tl.load(semi_ptr + t * D + e, volatile=D > 4)
        ellipsoid += v * v
    norm = tl.sqrt(norm)
    support = tl.minimum(box_support, tl.sqrt(ellipsoid)) / tl.maximum(norm, 1e-300)
    slack = 1e-13 * tl.sqrt(square) * (tl.sqrt(distance) + tl.load(reach_ptr + t))
    least = norm - support * (1 + 1e-13) - slack
    # After an overflow there is no bound (distance zero). Bounds are finite, since -inf denotes that nothing was pruned.
    least = tl.where(least > 0, least, 0.0)
    offset = tl.load(offset_ptr + c, mask=inside, other=0.0)
    u = offset + 1e-13 * tl.abs(offset) - (0.5 - 1e-13) * least * least
    return tl.where(inside, tl.where(u > -1e308, u, -1e308), float("-inf"))


@triton.jit
def _depth(safe_sum, sums, highest, own, spent, depth):
    """Return the depth below the limit from which as many bounds as possible are pruned, at least those below ``depth``.

    ``sums`` are those of exponentials of bounds that are at least 6, 4, 3, 2 and 1 nats below the limit, ``own`` the part of the
    largest bounds, which are ``highest`` above the limit and are kept, and ``spent`` that of components that were pruned before.
    """
    left = tl.sum(safe_sum, 0) - tl.where(highest <= -depth, own, 0.0) + spent
    for i in tl.static_range(5):
        fewer = 6.0 if i == 0 else 5.0 - i
        more = tl.sum(sums[i], 0) - tl.where(highest <= -fewer, own, 0.0) + spent
        better = (more < 1) & (more > left)
        depth = tl.where(better, fewer, depth)
        left = tl.where(better, more, left)
    return depth


@triton.jit(do_not_specialize=["K", "children", "leaves", "u_step", "room"])
def refine(
    minima_ptr,
    starts_ptr,
    center_ptr,
    axes_ptr,
    half_ptr,
    semi_ptr,
    reach_ptr,
    offset_ptr,
    mean_ptr,
    u_ptr,
    common_ptr,
    parent_list_ptr,
    parent_start_ptr,
    parent_count_ptr,
    parent_end_ptr,
    parent_pruned_ptr,
    list_ptr,
    start_ptr,
    count_ptr,
    pruned_ptr,
    rounding: tl.float64,
    share: tl.float64,
    give: tl.float64,
    safe: tl.float64,
    K,
    children,
    leaves,
    u_step,
    room,
    D: tl.constexpr,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
    ROOT: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute the list of a node from that of its parent, if it fits into ``room`` entries; otherwise it is empty.

    Lists of the first level are computed from all components. Those of the leaves prune as many components as possible, those of
    the levels above only components that are far below the limit. For leaves, ``count_ptr`` (2, nodes) also gets the number of
    pairs of point and component.
    """
    t = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BK)
    box = (center_ptr, axes_ptr, half_ptr, semi_ptr, reach_ptr)

    lowest = tl.full((BK,), float("inf"), tl.float64)
    for j in range(0, leaves, BK):
        lowest = tl.minimum(
            lowest, tl.load(minima_ptr + t * leaves + j + lane, mask=j + lane < leaves, other=float("inf"))
        )
    limit = _lower_limit(tl.min(lowest, 0), rounding, share, give)

    p = t // children
    if ROOT:
        size = K.to(tl.int64)
        parent = size * 0
        start = t * size
        before = tl.min(tl.full((BK,), float("-inf"), tl.float64), 0)
    else:
        size = tl.load(parent_count_ptr + p)
        parent = tl.load(parent_start_ptr + p)
        start = children * (tl.load(parent_end_ptr + p) - size) + (t - p * children) * size
        before = tl.load(parent_pruned_ptr + p)
    wanted = (limit < float("inf")) & (start + size <= room)
    count = tl.where(wanted, size, 0)

    # Limits below the smallest bound are equivalent to the smallest bound; a limit of -inf prunes nothing.
    limit = tl.where(limit > -1e308, limit, -1e308)
    most = tl.full((BK,), float("-inf"), tl.float64)
    ties = tl.zeros((BK,), tl.int32)
    safe_sum = tl.zeros((BK,), tl.float64)
    sums = ()
    for i in tl.static_range(5):
        sums = sums + (tl.zeros((BK,), tl.float64),)
    for j in range(0, count, BK):
        inside = j + lane < count
        c = j + lane
        if not ROOT:
            c = tl.load(parent_list_ptr + parent + c, mask=inside, other=0)
        u = _bounds(c, inside, box, t, offset_ptr, mean_ptr, u_ptr, u_step, common_ptr, D, FULL, WIDE)
        ties = tl.where(u > most, 1, ties + (u == most).to(tl.int32))
        most = tl.maximum(most, u)
        if LAST and not SINGLE:
            above = u - limit
            density = tl.exp(tl.minimum(above, 0.0))
            safe_sum += tl.where(above <= -safe, density, 0.0)
            new = ()
            for i in tl.static_range(5):
                new = new + (sums[i] + tl.where(above <= -(6.0 if i == 0 else 5.0 - i), density, 0.0),)
            sums = new
    best = tl.max(most, 0)

    # Bounds of at most this depth below the limit are kept. An estimated limit may be too high; the largest bound is always kept.
    depth = tl.sum(tl.zeros((BK,), tl.float64), 0) + safe
    if LAST and not SINGLE:
        own = tl.sum(tl.where(most == best, ties, 0), 0) * tl.exp(tl.minimum(best - limit, 0.0))
        depth = _depth(safe_sum, sums, best - limit, own, tl.exp(before - limit), depth)

    kept = count * 0
    lost = tl.zeros((BK,), tl.float64)
    top = tl.full((BK,), float("-inf"), tl.float64)
    for j in range(0, count, BK):
        inside = j + lane < count
        c = j + lane
        if not ROOT:
            c = tl.load(parent_list_ptr + parent + c, mask=inside, other=0)
        u = _bounds(c, inside, box, t, offset_ptr, mean_ptr, u_ptr, u_step, common_ptr, D, FULL, WIDE)
        if SINGLE:
            keep = inside & ((u >= limit) | (u >= best))
        else:
            keep = inside & ((u - limit > -depth) | (u >= best))
        dropped = tl.where(keep, float("-inf"), u)
        lost += tl.exp(tl.minimum(dropped - limit, 0.0))
        top = tl.maximum(top, dropped)
        place = tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(list_ptr + start + kept + place, c.to(tl.int32), mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)

    highest = tl.max(top, 0)
    pruned = before
    if SINGLE:
        pruned = tl.maximum(before, highest)
    else:
        total = tl.sum(lost, 0) + tl.exp(before - limit)
        # If exponentials underflow, their number times the largest one is an upper bound.
        bound = tl.maximum(before, highest) + tl.log(count.to(tl.float64) + 1)
        pruned = tl.where(highest > float("-inf"), tl.where(total < 1e-250, bound, tl.log(total) + limit), before)
    tl.store(start_ptr + t, start)
    tl.store(count_ptr + t, kept)
    tl.store(pruned_ptr + t, pruned)
    if LAST:
        rows = tl.load(starts_ptr + t + 1) - tl.load(starts_ptr + t)
        tl.store(count_ptr + tl.num_programs(0) + t, kept * rows)


@triton.jit
def compact(
    list_ptr,
    start_ptr,
    count_ptr,
    end_ptr,
    pruned_ptr,
    index_ptr,
    pointer_ptr,
    floor_ptr,
    rounding: tl.float64,
    allowed: tl.float64,
    BK: tl.constexpr,
):
    """Copy the list of a leaf to its place in a :class:`gmmkeops.reductions.truncation.bounds.Schedule`, and set its floor."""
    t = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BK)
    start = tl.load(start_ptr + t)
    count = tl.load(count_ptr + t)
    end = tl.load(end_ptr + t)
    first = end - count
    for j in range(0, count, BK):
        inside = j + lane < count
        c = tl.load(list_ptr + start + j + lane, mask=inside, other=0)
        tl.store(index_ptr + first + j + lane, c.to(tl.int64), mask=inside)
    if t == 0:
        tl.store(pointer_ptr, first)
    tl.store(pointer_ptr + t + 1, end)
    pruned = tl.load(pruned_ptr + t)
    least = pruned - allowed
    least = least + 2 * rounding * tl.maximum(tl.abs(least), 1.0)
    tl.store(floor_ptr + t, tl.where(pruned > float("-inf"), least, float("-inf")))


@triton.jit(do_not_specialize=["k"])
def check(
    value_ptr,
    g_ptr,
    base_ptr,
    starts_ptr,
    pruned_ptr,
    floor_ptr,
    minima_ptr,
    low_ptr,
    note_ptr,
    base: tl.float64,
    rounding: tl.float64,
    lowest: tl.float64,
    k,
    HAS_BASE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BN: tl.constexpr,
):
    """Compare the minimum of a leaf with its floor, given base-2 log-sum-exps or k largest exponents (N, k).

    Stores the minimum and its lower bound, nats, and six notes (6, leaves): whether the list was too short, the log-ratio of the
    pruned density to the lower bound, minus the smallest and the largest first exponent, base 2, minus the smallest positive size
    of a weight, and the largest one. Their maxima are those of all leaves.
    """
    t = tl.program_id(0).to(tl.int64)
    n0 = tl.load(starts_ptr + t)
    n1 = tl.load(starts_ptr + t + 1)
    dtype = value_ptr.dtype.element_ty
    infinity = tl.full((BN,), float("inf"), dtype)
    smallest = infinity
    least = infinity
    most = -infinity
    light = tl.full((BN,), float("inf"), tl.float64)
    heavy = tl.zeros((BN,), tl.float64)
    for n in range(n0, n1, BN):
        rows = n + tl.arange(0, BN)
        inside = rows < n1
        value = tl.load(value_ptr + rows * k + (k - 1), mask=inside, other=float("inf"))
        first = tl.load(value_ptr + rows * k, mask=inside, other=float("inf"))
        # The running maximum of the kernels begins at -1e38; values that are not greater, and those that are NaN, are no bounds.
        smallest = tl.minimum(smallest, tl.where(value > -9.9e37, value, float("-inf")))
        least = tl.minimum(least, tl.where(first == first, first, float("-inf")))
        most = tl.maximum(most, tl.where(inside & (first == first), first, float("-inf")))
        if WEIGHTED:
            size = tl.abs(tl.load(g_ptr + rows, mask=inside, other=0.0))
            light = tl.minimum(light, tl.where(size > 0, size, float("inf")))
            heavy = tl.maximum(heavy, size)
    if HAS_BASE:
        base = tl.load(base_ptr)
    minimum = base + 0.6931471805599453 * tl.min(smallest, 0).to(tl.float64)
    low = minimum - rounding * tl.maximum(tl.abs(minimum), 1.0)
    low = tl.where(low > lowest, low, float("-inf"))
    pruned = tl.load(pruned_ptr + t)
    floor = tl.load(floor_ptr + t)
    is_long = (minimum >= floor) | (floor == float("-inf"))
    tl.store(minima_ptr + t, minimum)
    tl.store(low_ptr + t, low)
    leaves = tl.num_programs(0)
    tl.store(note_ptr + t, tl.where(is_long, 0.0, 1.0).to(tl.float64))
    tl.store(note_ptr + leaves + t, tl.where(pruned > float("-inf"), pruned - low, float("-inf")))
    tl.store(note_ptr + 2 * leaves + t, -tl.min(least, 0).to(tl.float64))
    tl.store(note_ptr + 3 * leaves + t, tl.max(most, 0).to(tl.float64))
    tl.store(note_ptr + 4 * leaves + t, -tl.min(light, 0))
    tl.store(note_ptr + 5 * leaves + t, tl.max(heavy, 0))
