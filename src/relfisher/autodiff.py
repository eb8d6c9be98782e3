"""Definition 1 for any subsystem, by automatic differentiation: the reference for every closed form.

A subsystem is a function of its parameters. Everything else that it uses, inputs and other parameters alike, is the
reference theta_f. `relative_fisher` computes (9), `fisher` the global metric (5), `observed_fisher` the Hessian form
(3).

The last axis of a pre-activation holds units or classes. All axes before it hold samples and positions, and the metric
is a mean over them: logits [n, positions, classes] are n * positions samples. With `samples=n` it is the mean over n
samples of the sum over positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call, grad, jacrev

from relfisher.distributions import coordinates, has_closed_form, samples_of
from relfisher.evaluation import differentiable, evaluation_mode
from relfisher.metric import DenseMetric, Metric
from relfisher.pullback import PullbackMetric, as_rows
from relfisher.responses import Response, UnitResponse
from relfisher.validation import check_callable, check_finite, check_floating, check_instance, check_integer

__all__ = ["as_function", "fisher", "observed_fisher", "relative_fisher"]

Parameters = Tensor | Mapping[str, Tensor]


def relative_fisher(
    subsystem: Callable[..., Any],
    parameters: Parameters,
    response: Response | None = None,
    *,
    outcomes: Sequence[Any] | None = None,
    sampler: Callable[[Any], Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
    samples: int | None = None,
) -> Metric:
    """Return the relative Fisher information metric of a subsystem of your own. Definition 1, equation (9).

    The subsystem is a function of its parameters, of one of three forms:

    - with `response`: `subsystem(parameters)` is the pre-activation [n, out], or [n, positions, out]. The metric is
      exact and matrix-free.
    - with `outcomes` or `sampler`: `subsystem(parameters, y)` is ln p(y), one number per sample [n], or per unit
      [n, units], [n, positions, units]. The metric is exact for a complete list of outcomes, each one y for all
      samples, or a Monte Carlo mean over draws of `sampler(parameters)`.
    - otherwise: `subsystem(parameters)` is a `torch.distributions.Distribution`. Batch axes hold samples and positions;
      the last of several batch axes holds the units of a sample if the distribution is of single numbers, such as
      `Normal` or `Bernoulli`, but not if it is of classes or vectors. `Independent` makes units or positions part of
      one sample. The metric is exact, in closed form, for Bernoulli, Beta, Binomial, Categorical, Cauchy, Chi2,
      Dirichlet, Exponential, Gamma, Geometric, Gumbel, HalfNormal, InverseGamma, Laplace, LogNormal, LogisticNormal,
      LowRankMultivariateNormal, Multinomial, MultivariateNormal, Normal, OneHotCategorical, Poisson and VonMises, for
      `Independent` of any of these, and for a `TransformedDistribution` of them by bijections without parameters. It is
      exact if torch enumerates the support. Otherwise it is a Monte Carlo mean over the distribution's `sample`.

    Args:
        subsystem: the subsystem, as described above.
        parameters: one tensor, or tensors by name: the point at which the metric is taken.
        response: the response of the subsystem given its pre-activation.
        outcomes: all possible values of y.
        sampler: a function that draws y for all samples at the given parameters.
        draws: the number of Monte Carlo draws of the whole response, at least 2.
        seed: the seed of the draws; the global random state is restored afterwards.
        samples: the number to divide the sum over all samples, positions and units by; None for samples times
            positions. With n, the metric is the mean over n samples of the sum over positions.

    Returns:
        The metric [D, D], averaged over samples and positions and summed over units, where D counts the parameters in
        the order in which they are given. Its `standard_error` is None if it is exact, and the standard error of each
        entry if it is a Monte Carlo mean.

    Raises:
        ValueError: if there is no parameter, a parameter is not finite, more than one of `response`, `outcomes` and
            `sampler` is given, or the probabilities of the outcomes do not sum to 1.
        TypeError: if none of them is given and the subsystem does not return a distribution.
    """
    if sum(way is not None for way in (response, outcomes, sampler)) > 1:
        raise ValueError("give at most one of response, outcomes and sampler")
    _check(subsystem, response, samples)
    theta, shape, restore = _flatten(parameters)
    if response is not None:
        return PullbackMetric(lambda flat: subsystem(restore(flat)), theta, response, shape, samples)
    subsystem = differentiable()(subsystem)
    if outcomes is not None:
        values = list(outcomes)
        log_prob = lambda flat: torch.stack([subsystem(restore(flat), y) for y in values])  # noqa: E731
        return _enumerated(log_prob, theta, shape, samples)
    if sampler is not None:
        check_callable("sampler", sampler)
        draw = lambda: sampler(restore(theta))  # noqa: E731
        return _sampled(lambda flat, y: subsystem(restore(flat), y), draw, theta, shape, draws, seed, samples)
    distribution = subsystem(restore(theta))
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"subsystem must return a torch.distributions.Distribution, got {type(distribution).__name__}: "
            "give response, outcomes or sampler if it returns a tensor"
        )
    samples = samples or samples_of(distribution)
    if has_closed_form(distribution):
        jacobian: Tensor = jacrev(lambda flat: coordinates(subsystem(restore(flat)), distribution))(theta)
        rows = jacobian.reshape(-1, theta.numel())
        return DenseMetric(rows.T @ rows / samples, shape, samples)
    if distribution.has_enumerate_support:
        support = distribution.enumerate_support()
        return _enumerated(lambda flat: subsystem(restore(flat)).log_prob(support), theta, shape, samples)
    return _sampled(
        lambda flat, y: subsystem(restore(flat)).log_prob(y), distribution.sample, theta, shape, draws, seed, samples
    )


def fisher(
    model: nn.Module,
    inputs: Any,
    response: Response,
    names: Sequence[str] | None = None,
    *,
    samples: int | None = None,
) -> Metric:
    """Return the global Fisher information metric of a model. Equation (5).

    Args:
        model: its output is the pre-activation of the response: logits [n, classes] or [n, positions, classes] for
            `Categorical()`, for instance.
        inputs: the arguments of the model: a tensor, or a tuple of arguments.
        response: the response whose pre-activation is the model's output.
        names: the parameters of the metric; None for all trainable ones. The other parameters are the reference, so
            that the result is a diagonal block of the full metric (proposition 2).
        samples: as in `relative_fisher`: None for the mean over samples and positions, n for the mean over n samples of
            the sum over positions.

    Returns:
        The metric of the flattened parameters, in the order of `names`, or of `model.named_parameters()`. The row of an
        embedding's `padding_idx` is frozen, so that its entries are 0.

    Raises:
        ValueError: as in `as_function`.
    """
    function, parameters = as_function(model, inputs, names)
    return relative_fisher(function, parameters, response, samples=samples)


def observed_fisher(
    subsystem: Callable[..., Any],
    parameters: Parameters,
    y: Any,
    response: Response | None = None,
    *,
    samples: int | None = None,
) -> DenseMetric:
    """Return the observed metric, minus the mean Hessian of the log-likelihood at observations. Equation (3).

    Unlike the expected metric, it need not be positive semi-definite.

    Args:
        subsystem: with `response`, `subsystem(parameters)` is the pre-activation [n, out] or [n, positions, out];
            without it, `subsystem(parameters, y)` is ln p(y), one number per sample [n], or per unit [n, units],
            [n, positions, units].
        parameters: one tensor, or tensors by name.
        y: the observed responses.
        response: the response of the subsystem given its pre-activation.
        samples: the number to divide the sum over all samples, positions and units by; None for samples times
            positions. With n, the metric is the mean over n samples of the sum over positions.

    Returns:
        The matrix [D, D], a mean over samples and positions and a sum over units.

    Raises:
        ValueError: if there is no parameter, a parameter or y is not finite, or y does not have the shape of the
            pre-activation, or of its samples for responses of several units.
    """
    _check(subsystem, response, samples)
    theta, shape, restore = _flatten(parameters)
    if isinstance(y, Tensor) and y.is_floating_point():
        check_finite("y", y)

    @differentiable()
    def log_likelihood(flat: Tensor) -> Tensor:
        known = restore(flat)
        return (subsystem(known, y) if response is None else response.log_prob(subsystem(known), y)).sum()

    with torch.no_grad():
        terms = subsystem(restore(theta)) if response is not None else subsystem(restore(theta), y)
        if response is not None:
            _check_observations(terms, y, response)
    samples = samples or (as_rows(terms, response).shape[0] if response is not None else _count(terms))
    hessian = jacrev(grad(log_likelihood))(theta)
    return DenseMetric(-(hessian + hessian.mT) / (2 * samples), shape, samples)


def as_function(
    model: nn.Module, inputs: Any, names: Sequence[str] | None = None
) -> tuple[Callable[[Mapping[str, Tensor]], Tensor], dict[str, Tensor]]:
    """Return a model in evaluation mode as a function of its parameters, together with those parameters.

    Args:
        model: the module. Parameters that are not named keep their values, as part of the reference.
        inputs: the arguments of the model: a tensor, or a tuple of arguments.
        names: the names of the parameters; None for all trainable ones.

    Returns:
        The function from parameters by name to the model's output, and the parameters by name.

    Raises:
        ValueError: if a name is not a parameter of the model, there is no parameter, or an embedding has `max_norm` or
            `scale_grad_by_freq`, so that its gradients are not derivatives.
    """
    for name, module in model.named_modules():
        if getattr(module, "scale_grad_by_freq", False) or getattr(module, "max_norm", None) is not None:
            raise ValueError(f"model must have no embedding with max_norm or scale_grad_by_freq, but {name!r} has it")
    own = dict(model.named_parameters())
    chosen = [name for name, parameter in own.items() if parameter.requires_grad] if names is None else list(names)
    missing = [name for name in chosen if name not in own]
    if missing or not chosen:
        raise ValueError(f"names must be parameters of the model ({', '.join(own)}), got {missing or chosen}")
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)

    reference = {name: parameter.detach() for name, parameter in own.items()}

    def function(parameters: Mapping[str, Tensor]) -> Tensor:
        with evaluation_mode(model):
            output: Tensor = functional_call(model, {**reference, **parameters}, arguments)
        return output

    return function, {name: reference[name] for name in chosen}


def _count(log_prob: Tensor) -> int:
    """Return the number of samples and positions of log-probabilities [n], or with the units along the last axis."""
    return math.prod(log_prob.shape[:-1] if log_prob.ndim > 1 else log_prob.shape)


def _check(subsystem: object, response: object, samples: int | None) -> None:
    """Raise unless the arguments of a metric by automatic differentiation have the right types."""
    check_callable("subsystem", subsystem)
    check_instance("response", response, Response, optional=True)
    if samples is not None:
        check_integer("samples", samples)


def _check_observations(z: Tensor, y: Any, response: Response) -> None:
    """Raise ValueError unless there is one observation per unit, or per sample if the response is of several units."""
    given: tuple[int, ...] = tuple(getattr(y, "shape", ()))
    if isinstance(response, UnitResponse):
        wanted = z.shape
        expanded = (1,) * (len(wanted) - len(given)) + given
        fits = len(expanded) == len(wanted) and all(a in (1, b) for a, b in zip(expanded, wanted, strict=True))
    else:
        wanted = z.shape[:-1]
        fits = response.log_prob(z, y).shape == wanted
    if not fits:
        raise ValueError(f"y must have shape {list(wanted)}, got {list(given)}")


def _flatten(parameters: Parameters) -> tuple[Tensor, tuple[int, ...], Callable[[Tensor], Any]]:
    """Return the parameters as one vector, their shape, and the function that restores them from a vector."""
    if isinstance(parameters, Tensor):
        check_floating("parameters", parameters)
        check_finite("parameters", parameters)
        shape = tuple(parameters.shape)
        return parameters.detach().reshape(-1), shape or (1,), lambda flat: flat.reshape(shape)
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must be a tensor or a mapping from names to tensors, got {parameters!r}")
    if not parameters:
        raise ValueError("parameters must not be empty, got no tensor")
    for name, parameter in parameters.items():
        check_floating(f"parameters[{name!r}]", parameter)
        check_finite(f"parameters[{name!r}]", parameter)
    sizes = [parameter.numel() for parameter in parameters.values()]

    def restore(flat: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(flat, sizes)
        named = zip(parameters.items(), pieces, strict=True)
        return {name: piece.reshape(like.shape) for (name, like), piece in named}

    theta = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
    return theta, (theta.numel(),), restore


def _enumerated(
    log_prob: Callable[[Tensor], Tensor], theta: Tensor, shape: tuple[int, ...], samples: int | None
) -> DenseMetric:
    """Return sum_y p(y) s(y) s(y)', averaged over samples and summed over units, from log-probs [outcomes, n, ...]."""
    weights = log_prob(theta).exp()
    total = weights.sum(0)
    if not torch.allclose(total, torch.ones_like(total), rtol=0, atol=max(1e-6, torch.finfo(total.dtype).eps ** 0.5)):
        raise ValueError(
            "outcomes must be all values of y, each once: their probabilities must sum to 1, got sums from "
            f"{float(total.min()):.6g} to {float(total.max()):.6g}"
        )
    scores: Tensor = jacrev(log_prob)(theta)
    # An outcome of probability 0 contributes nothing, but its score may not be finite.
    weights = weights.unsqueeze(-1)
    scores = torch.where(weights > 0, scores.reshape(*weights.shape[:-1], -1), 0)
    eps = torch.finfo(total.dtype).eps
    # A rare outcome hardly changes the sum of the probabilities, but may hold most of the information.
    allowed = eps**0.5 * (weights * scores.abs()).sum(0) + 100 * eps * scores.abs().amax(0)
    if bool(((weights * scores).sum(0).abs() > allowed).any()):
        raise ValueError(
            "outcomes must be all values of y, each once, and their probabilities must sum to 1 at all parameters: "
            "their expected score must be 0, but it is not"
        )
    flat = scores.flatten(0, -2)
    samples = samples or _count(total)
    return DenseMetric((flat * weights.reshape(-1, 1)).T @ flat / samples, shape, samples)


def _sampled(
    log_prob: Callable[[Tensor, Any], Tensor],
    draw: Callable[[], Any],
    theta: Tensor,
    shape: tuple[int, ...],
    draws: int,
    seed: int,
    samples: int | None,
) -> DenseMetric:
    """Return the mean of s(y) s(y)' over draws of y, with its standard error."""
    check_integer("draws", draws, 2)
    check_integer("seed", seed, -(2**63), 2**64 - 1)
    total = theta.new_zeros(theta.numel(), theta.numel())
    squares = torch.zeros_like(total)
    with torch.random.fork_rng(devices=[] if theta.device.type == "cpu" else [theta.device]):
        torch.manual_seed(seed)
        for _ in range(draws):
            y = draw()
            scores: Tensor = jacrev(lambda flat, y=y: log_prob(flat, y))(theta)
            samples = samples or _count(scores[..., 0])
            rows = scores.reshape(-1, theta.numel())
            one = rows.T @ rows / samples
            total += one
            squares += one.square()
    mean = total / draws
    variance = (squares / draws - mean.square()).clamp(min=0) * (draws / (draws - 1))
    return DenseMetric(mean, shape, samples or 1, standard_error=(variance / draws).sqrt())
