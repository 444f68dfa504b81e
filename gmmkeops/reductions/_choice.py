"""What runs: which engine, and whether points are put into boxes first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmmkeops._arguments import as_choice, as_fraction, as_integer
from gmmkeops._checks import as_points
from gmmkeops.reductions import _keops
from gmmkeops.reductions._boxes import Cloud
from gmmkeops.reductions._exponents import Exponents
from gmmkeops.reductions._truncation import Truncation

__all__ = ["BACKENDS", "arrange", "engine", "may_arrange"]

BACKENDS = ("auto", "keops", "dense")

# Dimensions up to which points are halved into small boxes without labels.
_FEW = 4
# What truncation may cost where nobody has said: what the dtype's rounding would lose anyway, nats per point.
_EPSILON = {torch.float32: 1e-6, torch.float64: 1e-12}

_warned: set[str] = set()


def engine(problem: Any, backend: str = "auto", *, features: int = 0, full: bool = True) -> str:
    """Which engine will run: ``"dense"`` or ``"keops"``.

    On a CPU the dense tiles are the faster engine everywhere; on CUDA the KeOps formulas are for few dimensions (up to 6
    with full factors, 16 with diagonal ones), where a tile's matrix products are too thin to fill the device.

    Args:
        problem: The points (N, D), checked exponents, or a device.
        backend: ``"auto"``, ``"keops"`` or ``"dense"``.
        features: D, when only a device is given.
        full: Whether factors are full matrices, when no exponents are given.

    Raises:
        ValueError: The backend's name is unknown.

    Warns:
        UserWarning: Once for each reason, when KeOps was asked for, or is the faster engine, and cannot run; dense runs
            instead.

    Example:
        >>> import torch, gmmkeops as gk
        >>> gk.reductions.engine(torch.zeros(5, 3))
        'dense'
    """
    as_choice(backend, "backend", BACKENDS)
    if isinstance(problem, Exponents):
        problem, full = problem.x, problem.is_full
    if isinstance(problem, Tensor):
        problem, features = problem.device, problem.shape[1]
    device: torch.device = problem
    if backend == "dense" or (backend == "auto" and not (device.type == "cuda" and features <= (6 if full else 16))):
        return "dense"
    reason = _keops.unavailable(device)
    if reason is None:
        return "keops"
    if reason not in _warned:
        _warned.add(reason)
        wanted = "was asked for" if backend == "keops" else "is the faster engine here"
        warnings.warn(f"KeOps {wanted} but {reason}; using the dense engine.", UserWarning, stacklevel=3)
    return "dense"


def arrange(
    x: Any,
    components: int,
    truncate: float | None = None,
    *,
    sweeps: int = 1,
    labels: Callable[[], Tensor] | None = None,
) -> Tensor | Truncation:
    r"""Points in the order of a tree of boxes, for sweeps that leave out what no point of a box can feel.

    Every reduction takes the result in the place of the points, and answers in the order of the points. A sweep then gives
    :math:`0 \le \ell_{true} - \ell_{kept} \le -\log(1 - \varepsilon)` at each point, certified by bounds, not hoped for;
    labels, the largest exponents and moments of hard assignments are exact.

    Args:
        x: Points (N, D).
        components: K of the mixtures that will be looked at.
        truncate: ε in (0, 1); 0 for exact sweeps over all components. None decides: 1e-6 for float32 points and 1e-12 for
            float64 ones, which rounding hides, where it pays.
        sweeps: How many sweeps are to come, which decides whether arranging pays.
        labels: Finds the likely component of each point (N,), int64. In more than four dimensions boxes are made of points
            with one label, since halving does not make them small there; it is called only if that pays.

    Returns:
        The points themselves, or a :class:`Truncation`.

    Raises:
        TypeError, ValueError: Bad points, or a truncation that is no number from 0 to 1.

    Example:
        >>> import torch, gmmkeops as gk
        >>> x = torch.linspace(0, 1, 4096)[:, None]
        >>> cloud = gk.reductions.arrange(x, 64, 1e-4)
        >>> means = torch.linspace(0, 1, 64)[:, None]
        >>> sums = gk.reductions.moments(cloud, torch.zeros(64), means, torch.full((1, 1), 64.0))
        >>> cloud.share < 0.5, 0 <= cloud.certificate <= 1e-4 * 1.0001
        (True, True)
    """
    x = as_points(x)
    truncate = as_fraction(truncate, "truncate")
    components, sweeps = as_integer(components, "components", 1), as_integer(sweeps, "sweeps", 0)
    labels = None if x.shape[1] <= _FEW else labels
    if truncate == 0 or (truncate is None and not _pays(x, components, sweeps, labels is not None)):
        return x
    # Two components' worth, within what makes a good tile; a label of its own is cut as little as can be.
    rows = min(4096, max(1024 if labels is None else 2048, 2 * len(x) // components))
    cloud = Cloud.tree(x.detach(), rows) if labels is None else Cloud.grouped(x.detach(), labels(), rows)
    return Truncation(cloud, _EPSILON[x.dtype] if truncate is None else truncate)


def _pays(x: Tensor, components: int, sweeps: int, labelled: bool) -> bool:
    """Whether arranging points (N, D) for so many sweeps is likely to be worth it, with labels or without."""
    N, D = x.shape
    if labelled:
        # Short lists only pay in tiles with work for more than their own making: about a thousand rows in 20 dimensions.
        return components >= 16 and N * components >= 1_000_000 and sweeps >= 8 and 20_000 * components <= N * D
    return D <= _FEW and components >= 64 and N * components >= 10_000_000 and components * sweeps >= 1000


def may_arrange(rows: int, components: int, dimensions: int) -> bool:
    """Whether a fit of so many points would arrange them by itself.

    Args:
        rows: Number of points N.
        components: Number of components K.
        dimensions: Number of columns D.

    Returns:
        Whether boxes may pay; where they may, the first lists of a fit decide.

    Example:
        >>> import gmmkeops as gk
        >>> gk.reductions.may_arrange(10**6, 1000, 3), gk.reductions.may_arrange(1000, 5, 3)
        (True, False)
    """
    return any(_pays(torch.empty(rows, dimensions, device="meta"), components, 1 << 20, few) for few in (False, True))
