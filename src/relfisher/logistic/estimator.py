"""Logistic regression by natural gradient steps, as a scikit-learn classifier.

The link is canonical, so the metric of the sigmoid neuron (14) or of the softmax layer (25) is the Hessian of the loss,
and a natural gradient step is a Newton step. The objective is scikit-learn's,

    mean_n -ln p(y_n | x_n) + |W|^2 / (2 C n),

where the intercept is not penalized. Each step solves (G + I / (C n)) d = gradient by conjugate gradients on the metric
as an operator, and is halved until the objective decreases. The preconditioner is computed from a subset of the
samples: the Kronecker product of mean F_n and mean x~_n x~_n', or, for two classes, an earlier metric, which is
recomputed from time to time.

Needs scikit-learn. Axes: `n` samples, `d = in + 1` (`in` without intercept), `k` rows of weights (1 for two classes).
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from relfisher.logistic.newton import LogisticObjective, minimize
from relfisher.validation import check_bool, check_integer, check_interval, check_positive

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import ArrayLike

    Flag: TypeAlias = bool
    Number: TypeAlias = float
    Whole: TypeAlias = int
else:
    # scikit-learn's contract: any type may be passed, and `fit` reports what is wrong with scikit-learn's own errors.
    ArrayLike = Flag = Number = Whole = object

__all__ = ["LogisticRegression"]


class LogisticRegression(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Logistic regression, binary or multinomial: scikit-learn's objective, minimized by natural gradient steps.

    Args:
        C: the inverse of the L2 penalty on the weights, > 0; infinity for no penalty.
        fit_intercept: whether to fit an intercept, which is not penalized.
        tol: the tolerance, > 0; `fit` stops once no entry of the objective's gradient is larger.
        max_iter: the largest number of natural gradient steps.

    Attributes:
        classes_: the labels, sorted.
        coef_: the weights, [1, in] for two classes, else [classes, in].
        intercept_: [1] or [classes].
        n_iter_: the number of steps taken, [1].
        n_features_in_: the number of features, in.
    """

    def __init__(
        self, *, C: Number = 1.0, fit_intercept: Flag = True, tol: Number = 1e-4, max_iter: Whole = 100
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: ArrayLike, y: ArrayLike) -> LogisticRegression:
        """Fit the weights, starting from zero.

        Args:
            X: the samples, [n, in].
            y: the label of each sample, [n], from two or more classes.

        Returns:
            The fitted classifier.

        Raises:
            ValueError: if a parameter is out of range, or there is only one class.
            TypeError: if a parameter is not a number.
        """
        check_interval("C", self.C, 0, math.inf, closed="right")
        check_positive("tol", self.tol)
        check_integer("max_iter", self.max_iter)
        flag: object = self.fit_intercept
        check_bool("fit_intercept", flag.item() if isinstance(flag, np.bool_) else flag)
        samples, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have two or more classes, got one class: {self.classes_[0]!r}")
        x = torch.tensor(samples)
        objective = LogisticObjective(
            x,
            torch.from_numpy(indices),
            classes=len(self.classes_),
            penalty=1 / (float(self.C) * len(x)),
            bias=bool(flag),
        )
        result = minimize(objective, tolerance=float(self.tol), max_steps=int(self.max_iter))
        if not result.converged:
            warnings.warn(
                f"after {result.steps} steps the gradient is {result.gradient_norm:.1e}, not below tol={self.tol:g}: "
                "raise max_iter or tol, or scale the samples",
                ConvergenceWarning,
                stacklevel=2,
            )
        weights = result.weights.numpy()
        features = x.shape[1]
        self.coef_ = np.ascontiguousarray(weights[:, :features])
        self.intercept_ = weights[:, features].copy() if self.fit_intercept else np.zeros(len(weights))
        self.n_iter_ = np.array([result.steps], dtype=np.int32)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the log-odds of the second class, [n], or the scores of all classes, [n, classes]."""
        check_is_fitted(self)
        samples = validate_data(self, X, dtype=np.float64, reset=False)
        scores: NDArray[np.float64] = samples @ self.coef_.T + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most probable label of each sample, [n]."""
        scores = self.decision_function(X)
        indices = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: NDArray[Any] = self.classes_[indices]
        return labels

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of each class, [n, classes]."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the log-probability of each class, [n, classes]."""
        scores = torch.from_numpy(self.decision_function(X))
        if scores.ndim == 1:
            scores = torch.stack([torch.zeros_like(scores), scores], dim=1)
        return torch.log_softmax(scores, dim=1).numpy()
