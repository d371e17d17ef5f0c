"""scikit-learn's estimator interface, without scikit-learn.

scikit-learn asks an estimator for a protocol, not for a base class: parameters named as in ``__init__``, attributes
with a trailing underscore after ``fit``, tags. `Estimator` implements the protocol, so that clusterers work in its
pipelines and searches, pass its ``check_estimator``, and need it neither at import nor at run time. Inheriting from its
``BaseEstimator`` where it happens to be installed would make the classes differ from machine to machine and cost its
import (about a second) in ``import nearfar``.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np

# Here, not by `np.random` at the first fit: a module that a thread imports while another forks is locked in the child.
from numpy.random import RandomState

from .arrays import FLOATS, Array, check_matrix, check_points, compute_dtype, dtype_name, is_torch, to_numpy

__all__ = ["Estimator", "check_random_state"]


class Estimator:
    """Parameters, representation and tags of an estimator; validation of the points it is given."""

    _least_rows = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._defaults = {  # type: ignore[attr-defined]
            name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()
        }

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters of ``__init__`` by name."""
        return {name: getattr(self, name) for name in self._defaults}  # type: ignore[attr-defined]

    def set_params(self, **params: Any) -> Any:
        """Set parameters by name; returns the estimator."""
        for name, value in params.items():
            if name not in self._defaults:  # type: ignore[attr-defined]
                known = ", ".join(self._defaults)  # type: ignore[attr-defined]
                raise ValueError(f"{name}: expected a parameter of {type(self).__name__} ({known})")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = []
        for name, default in self._defaults.items():  # type: ignore[attr-defined]
            value = getattr(self, name)
            if isinstance(value, np.ndarray) or is_torch(value):
                changed.append(f"{name}=array{tuple(value.shape)}")
            elif repr(value) != repr(default):
                changed.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=getattr(self, "_estimator_type", None),
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def _check_fitted(self) -> None:
        if self.__sklearn_is_fitted__():
            return
        error: type[Exception] = getattr(sys.modules.get("sklearn.exceptions"), "NotFittedError", AttributeError)
        raise error(f"This {type(self).__name__} instance is not fitted yet: call fit first")

    def _points(self, X: Any, *, reset: bool) -> Array:
        """X as a detached floating matrix of at least one row, and with as many columns as `fit` has seen."""
        X = floating(X, "X")
        if X.ndim != 2:
            hint = "Reshape your data: x.reshape(-1, 1) for one column, x.reshape(1, -1) for one row"
            raise ValueError(f"X: expected shape (n, d), got {tuple(X.shape)}. {hint}")
        name = type(self).__name__
        if X.shape[1] == 0:
            raise ValueError(f"X: 0 feature(s) (shape={tuple(X.shape)}) while a minimum of 1 is required.")
        if X.shape[0] < self._least_rows:
            raise ValueError(f"X: expected at least one row, got shape {tuple(X.shape)}")
        check_points(X=X)
        check_matrix(X, "X")
        if reset:
            self.n_features_in_ = int(X.shape[1])
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {name} is expecting {self.n_features_in_} features as input"
            )
        return X.detach() if is_torch(X) else X


def floating(values: Any, name: str) -> Array:
    """Tensors as they are; anything else as a NumPy array of a floating dtype, also lists, integers and frames."""
    if is_torch(values):
        if values.is_complex():
            raise ValueError(f"{name}: Complex data not supported, got {dtype_name(values)}")
        return values if values.is_floating_point() else values.double()
    if hasattr(values, "tocsr"):
        raise TypeError(f"{name}: expected a dense array, got a sparse one; pass {name}.toarray()")
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise ValueError(f"{name}: Complex data not supported, got {array.dtype}")
    if dtype_name(array) not in FLOATS or not array.dtype.isnative:
        array = array.astype(np.float32 if array.dtype == np.dtype(">f4").newbyteorder("S") else np.float64)
    return np.require(array, requirements="A")


def weights_of(sample_weight: Any, X: Array) -> np.ndarray[Any, Any] | None:
    """Weights of the rows in the compute dtype; None: all 1."""
    if sample_weight is None:
        return None
    if is_torch(sample_weight):
        sample_weight = to_numpy(sample_weight)  # which knows no bfloat16
    weights = np.asarray(sample_weight, compute_dtype(X))
    if weights.ndim == 0:
        weights = np.full(X.shape[0], weights)
    if weights.shape != (X.shape[0],):
        raise ValueError(f"sample_weight: expected shape {(X.shape[0],)} to match X, got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("sample_weight: expected finite numbers that are not negative")
    if not weights.any():
        raise ValueError("sample_weight: expected a positive sum, got all zeros")
    return np.ascontiguousarray(weights)


def check_random_state(seed: Any) -> RandomState:
    """As scikit-learn's: None is NumPy's global generator, an int seeds a new one."""
    if seed is None or seed is np.random:
        return np.random.mtrand._rand
    if isinstance(seed, RandomState):
        return seed
    try:
        return RandomState(seed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"random_state: expected an int, a RandomState or None, got {seed!r}") from error


def convergence_warning() -> type[Warning]:
    """scikit-learn's ConvergenceWarning where scikit-learn is in use, else its base UserWarning."""
    return getattr(sys.modules.get("sklearn.exceptions"), "ConvergenceWarning", UserWarning)
