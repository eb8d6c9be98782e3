"""Logistic regression by natural gradient steps, as a scikit-learn classifier. Needs scikit-learn."""

from relfisher.logistic.estimator import LogisticRegression

__all__ = ["LogisticRegression"]
