"""Kernel that computes log-sum-exps and responsibilities from the exponents of a tile, (components, points) in row-major order.

A program owns some points. Each of its numbers is first added to a running maximum and sum for its place in a block of
components and points, so that threads exchange numbers only once. Differences of exponents are computed in their dtype, and
exponentials in float32.
"""

import triton
import triton.language as tl

__all__ = ["softmax"]


@triton.jit(do_not_specialize=["K", "N"])
def softmax(
    e_ptr,
    l_ptr,
    g_ptr,
    K,
    N,
    depth,
    LEAST: tl.constexpr,
    SHARES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the log-sum-exps (N,) of exponents (K, N), nats; with ``SHARES``, overwrite these by weighted responsibilities."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    valid = n < N
    dtype = e_ptr.dtype.element_ty
    m = tl.full((BK, BN), LEAST, dtype)
    s = tl.zeros((BK, BN), tl.float32)
    for k0 in range(0, K, BK):
        inside = (k0 + k < K)[:, None] & valid[None, :]
        place = (k0 + k).to(tl.int64)[:, None] * N + n[None, :]
        e = tl.load(e_ptr + place, mask=inside, other=float("-inf"))
        t = tl.maximum(m, e)
        s = s * tl.exp((m - t).to(tl.float32)) + tl.exp((e - t).to(tl.float32))
        m = t
    largest = tl.max(m, 0)
    total = tl.sum(s * tl.exp((m - largest[None, :]).to(tl.float32)), 0)
    tl.store(l_ptr + n, largest + tl.log(total).to(dtype), mask=valid)
    if SHARES:
        scale = 1.0 / total.to(dtype)
        if WEIGHTED:
            scale = scale * tl.load(g_ptr + n, mask=valid, other=0.0).to(dtype)
        for k0 in range(0, K, BK):
            inside = (k0 + k < K)[:, None] & valid[None, :]
            place = (k0 + k).to(tl.int64)[:, None] * N + n[None, :]
            difference = (tl.load(e_ptr + place, mask=inside, other=float("-inf")) - largest[None, :]).to(tl.float32)
            r = tl.where(difference < -depth, 0.0, tl.exp(difference))
            tl.store(e_ptr + place, r.to(dtype) * scale[None, :], mask=inside)
