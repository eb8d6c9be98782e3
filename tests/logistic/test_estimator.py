import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.utils.estimator_checks import parametrize_with_checks

from relfisher.logistic import LogisticRegression
from relfisher.logistic.newton import LogisticObjective
from relfisher.metric import neuron_metric, softmax_metric
from relfisher.responses import SigmoidBernoulli


@parametrize_with_checks([LogisticRegression()])
def test_scikit_learn_accepts_the_estimator(estimator, check):
    with warnings.catch_warnings():
        # The checks fit unscaled and unlearnable data on purpose.
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def clouds(classes, spread=2.0):
    return make_blobs(n_samples=300, n_features=6, centers=classes, cluster_std=spread, random_state=3)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_weights_agree_with_scikit_learn(classes, C, fit_intercept):
    x, y = clouds(classes)
    ours = LogisticRegression(C=C, fit_intercept=fit_intercept, tol=1e-9).fit(x, y)
    reference = Reference(C=C, fit_intercept=fit_intercept, tol=1e-8, max_iter=1000, solver="newton-cholesky").fit(x, y)
    assert np.allclose(ours.coef_, reference.coef_, atol=1e-5)
    # Without a penalty on them, only the differences of intercepts are determined.
    assert (
        np.allclose(
            ours.intercept_ - ours.intercept_.mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-5
        )
        or classes == 2
    )
    assert np.allclose(ours.predict_proba(x), reference.predict_proba(x), atol=1e-5)
    assert (ours.predict(x) == reference.predict(x)).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_separable_data_converge_from_zero(classes):
    x, y = clouds(classes, spread=0.1)
    ours = LogisticRegression(C=1e4, tol=1e-8).fit(x, y)
    assert ours.n_iter_[0] < 60
    assert ours.score(x, y) == 1
    assert np.isfinite(ours.coef_).all()


def test_too_few_steps_are_told():
    x, y = clouds(2)
    with pytest.warns(ConvergenceWarning, match="after 1 steps the gradient is"):
        LogisticRegression(max_iter=1, tol=1e-10).fit(x, y)


@pytest.mark.parametrize("name", ["C", "tol", "max_iter"])
def test_parameters_out_of_range_are_named(name):
    x, y = clouds(2)
    with pytest.raises(ValueError, match=f"{name} must .*, got 0"):
        LogisticRegression(**{name: 0}).fit(x, y)


def test_parameters_may_be_numbers_of_numpy():
    x, y = clouds(2)
    mine = LogisticRegression(max_iter=np.int64(50), C=np.float32(1), fit_intercept=np.bool_(False)).fit(x, y)
    assert (mine.coef_ == LogisticRegression(max_iter=50, fit_intercept=False).fit(x, y).coef_).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_hessian_is_the_metric(classes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator, dtype=torch.double)
    labels = torch.arange(20) % classes
    objective = LogisticObjective(x, labels, classes=classes, penalty=0.0, bias=True)
    weights = torch.randn(objective.rows, 5, generator=generator, dtype=torch.double)
    vector = torch.randn(objective.rows, 5, generator=generator, dtype=torch.double)
    probabilities = objective.probabilities(objective.scores(weights))
    if classes == 2:
        metric = neuron_metric(x, weights[0, :-1], weights[0, -1], SigmoidBernoulli())
    else:
        metric = softmax_metric(x, weights[:, :-1], weights[:, -1])
    expected = metric.matvec(vector.flatten()).view_as(vector)
    assert torch.allclose(objective.hessian(probabilities, vector), expected, rtol=1e-12)
