"""Warnings of the package."""

__all__ = ["ConvergenceWarning", "PrecisionWarning"]


class ConvergenceWarning(UserWarning):
    """A fit stopped at ``max_iter`` before its tolerance was met, or its objective became infinite or NaN.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.ConvergenceWarning):
        ...     result = gk.fit(gk.initialise(x, 3), x, gk.EM(tol=1e-9), max_iter=2)
        >>> result.converged
        False
    """


class PrecisionWarning(UserWarning):
    """The numerical precision is too low for the data, for example float32 coordinates that are coarser than their structure.

    Example:
        >>> import pytest, torch, gmmkeops as gk
        >>> x = 5e6 + torch.linspace(-1, 1, 50).double()[:, None]
        >>> with pytest.warns(gk.PrecisionWarning):
        ...     result = gk.fit(gk.initialise(x, 1), x.float(), gk.EM())
    """
