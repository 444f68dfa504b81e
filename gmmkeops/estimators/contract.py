"""The interface of a scikit-learn estimator by duck typing: parameters, tags, feature names, metadata routing and errors.

scikit-learn is not required; it is imported only if the user has imported it or calls a method that needs it. Reference:
scikit-learn's developer guide, *Developing scikit-learn estimators*.
"""

from __future__ import annotations

import html
import inspect
import sys
from functools import cache
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from gmmkeops._checks import ConvergenceWarning, warn
from gmmkeops.estimators import routing

__all__ = ["Estimator", "NotFittedError", "column_names", "convergence_warning"]

Self = TypeVar("Self", bound="Estimator")


class NotFittedError(ValueError, AttributeError):
    """Error of a method that needs a fitted estimator and is called before ``fit``."""


def _not_fitted(message: str) -> Exception:
    """Create a NotFittedError, of scikit-learn's class if the user has imported scikit-learn."""
    if "sklearn" in sys.modules:
        from sklearn.exceptions import NotFittedError as Theirs

        return Theirs(message)
    return NotFittedError(message)


class Estimator:
    """Base class with scikit-learn's parameter interface. An estimator is fitted if it has the attribute ``mixture_``."""

    @classmethod
    def _names(cls) -> list[str]:
        """Return the names of the parameters."""
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    @classmethod
    def _default(cls, name: str) -> Any:
        """Return the default of a parameter; None if a subclass has no such parameter."""
        parameter = inspect.signature(cls.__init__).parameters.get(name)
        return None if parameter is None else parameter.default

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name.

        Args:
            deep: Ignored, since no parameter is an estimator.
        """
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self: Self, **params: Any) -> Self:
        """Set parameters by name, and return the estimator.

        Raises:
            ValueError: A parameter does not exist.
        """
        names = self._names()
        for name in params:
            if name not in names:
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {self}. Valid parameters are: {sorted(names)!r}."
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if repr(value) != repr(defaults[name].default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _repr_html_(self) -> str:
        """Return scikit-learn's HTML diagram if it is installed, else the one-line representation."""
        try:
            from sklearn.utils import estimator_html_repr
        except ImportError:
            return f"<code>{html.escape(repr(self))}</code>"
        return estimator_html_repr(self)

    def get_metadata_routing(self) -> Any:
        """Return the metadata that the methods request, as a ``sklearn.utils.metadata_routing.MetadataRequest``."""
        return routing.requests(self)

    def set_fit_request(self: Self, *, sample_weight: bool | str | None = routing.UNCHANGED) -> Self:
        """Set whether ``fit`` requests ``sample_weight`` in scikit-learn's metadata routing.

        Args:
            sample_weight: True to request it, False to ignore it, None to raise an error if it is passed, or a string: the
                alias under which it is passed.

        Returns:
            The estimator itself.

        Raises:
            RuntimeError: Metadata routing is not enabled in scikit-learn.
        """
        return routing.request(self, "fit", sample_weight)

    def set_score_request(self: Self, *, sample_weight: bool | str | None = routing.UNCHANGED) -> Self:
        """Set whether ``score`` requests ``sample_weight``; arguments and errors as for :meth:`set_fit_request`."""
        return routing.request(self, "score", sample_weight)

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            estimator_type="density_estimator",
            target_tags=TargetTags(required=False),
            transformer_tags=None,
            regressor_tags=None,
            classifier_tags=None,
            input_tags=InputTags(),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "mixture_")

    def _check_names(self, names: np.ndarray | None) -> None:
        """Compare column names with those of the fit, and warn or raise with the messages of scikit-learn."""
        fitted = getattr(self, "feature_names_in_", None)
        if names is None and fitted is not None:
            warn(
                f"X does not have valid feature names, but {type(self).__name__} was fitted with feature names",
                UserWarning,
            )
        elif names is not None and fitted is None:
            warn(
                f"X has feature names, but {type(self).__name__} was fitted without feature names",
                UserWarning,
            )
        elif names is not None and fitted is not None and list(names) != list(fitted):
            message = "The feature names should match those that were passed during fit.\n"
            unseen, missing = sorted(set(names) - set(fitted)), sorted(set(fitted) - set(names))
            if unseen:
                message += "Feature names unseen at fit time:\n" + "".join(f"- {name}\n" for name in unseen)
            if missing:
                message += "Feature names seen at fit time, yet now missing:\n" + "".join(
                    f"- {name}\n" for name in missing
                )
            if not unseen and not missing:
                message += "Feature names must be in the same order as they were in fit.\n"
            raise ValueError(message)

    def _require_fitted(self) -> None:
        """Raise a NotFittedError if the estimator is not fitted."""
        if not self.__sklearn_is_fitted__():
            raise _not_fitted(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with appropriate arguments before using "
                "this estimator."
            )


def convergence_warning() -> type[Warning]:
    """Return the ConvergenceWarning, as a subclass also of scikit-learn's if the user has imported scikit-learn."""
    if "sklearn" not in sys.modules:
        return ConvergenceWarning
    from sklearn.exceptions import ConvergenceWarning as Theirs

    return _both(Theirs)


@cache
def _both(theirs: type[Warning]) -> type[Warning]:
    """Create a warning class that derives from the classes of both libraries."""
    return type("ConvergenceWarning", (ConvergenceWarning, theirs), {})


def column_names(X: Any) -> np.ndarray | None:
    """Return the column names of a table by the rules of scikit-learn, or None.

    Raises:
        TypeError: Only some of the names are strings.
    """
    columns = getattr(X, "columns", None)
    if columns is None or isinstance(X, (np.ndarray, Tensor)):
        return None
    names = np.asarray(columns, dtype=object)
    kinds = sorted({type(name).__name__ for name in names})
    if kinds == ["str"]:
        return names
    if "str" in kinds:
        raise TypeError(
            "Feature names are only supported if all input features have string names, but your input has "
            f"{kinds} as feature name / column name types. Convert them with X.columns = X.columns.astype(str)."
        )
    return None
