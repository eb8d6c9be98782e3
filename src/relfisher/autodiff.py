"""Definition 1 for any subsystem, by automatic differentiation: the reference for every closed form.

A subsystem is a function of its parameters. Everything else that it uses, inputs and other parameters alike, is the
reference theta_f. `relative_fisher` computes (9), `fisher` the global metric (5), `observed_fisher` the Hessian form
(3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.func import functional_call, hessian, jacrev, jvp, vjp, vmap

from relfisher.evaluation import evaluation_mode
from relfisher.memory import check_fits
from relfisher.metric import DenseMetric, Metric
from relfisher.responses import Response
from relfisher.shapes import Float
from relfisher.validation import check_finite, check_floating, check_interval

__all__ = ["PullbackMetric", "as_function", "fisher", "observed_fisher", "relative_fisher"]

Parameters = Tensor | Mapping[str, Tensor]


class PullbackMetric(Metric):
    """The metric J' F J of the parameters of a pre-activation z(theta), J = dz / dtheta by automatic differentiation.

    A product takes one forward-mode and one reverse-mode pass. The matrix is formed only if it is requested.

    Args:
        pre_activation: the function from flat parameters [D] to z [n, out].
        theta: the flat parameters.
        response: the response of the subsystem given z.
        parameter_shape: the shape of the parameters; None for [D].
    """

    def __init__(
        self,
        pre_activation: Callable[[Tensor], Tensor],
        theta: Float[Tensor, "D"],
        response: Response,
        parameter_shape: tuple[int, ...] | None = None,
    ) -> None:
        z = _rows(pre_activation(theta)).detach()
        super().__init__(parameter_shape or (theta.numel(),), z.shape[0], theta.dtype, theta.device)
        self._pre_activation = lambda parameters: _rows(pre_activation(parameters))
        self._theta = theta
        self._out = z.shape[1]
        self.information = response.operator(z)

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        pull = vjp(self._pre_activation, self._theta)[1]

        def column(vector: Tensor) -> Tensor:
            field = jvp(self._pre_activation, (self._theta,), (vector,))[1]
            image: Tensor = pull(self.information.apply(field))[0]
            return image / self.samples

        product: Tensor = vmap(column, in_dims=1, out_dims=1)(vectors)
        return product.detach()

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self._theta.numel()

    def _jacobian(self) -> Float[Tensor, "n out D"]:
        numbers = self.samples * self._out * self._theta.numel()
        check_fits("the Jacobian of all samples", numbers, self.dtype, self.device, "use @ or fewer samples")
        jacobian: Tensor = jacrev(self._pre_activation)(self._theta)
        return jacobian.detach()

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        jacobian = self._jacobian()
        image = self.information.apply(jacobian.permute(2, 0, 1)).reshape(self.shape[0], -1)
        return (image @ jacobian.reshape(-1, self.shape[0]) / self.samples).unsqueeze(0)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal of J' F J."""
        field = self._jacobian().permute(2, 0, 1)
        return (field * self.information.apply(field)).sum((1, 2)) / self.samples


def relative_fisher(
    subsystem: Callable[..., Any],
    parameters: Parameters,
    response: Response | None = None,
    *,
    outcomes: Sequence[Any] | None = None,
    sampler: Callable[[Any], Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Metric:
    """Return the relative Fisher information metric of a subsystem of your own. Definition 1, equation (9).

    The subsystem is a function of its parameters, of one of three forms:

    - with `response`: `subsystem(parameters)` is the pre-activation [n, out]. The metric is exact and matrix-free.
    - with `outcomes` or `sampler`: `subsystem(parameters, y)` is ln p(y_n), [n] or [n, units]. The metric is exact for
      a finite list of outcomes, each one y for all samples, or a Monte Carlo mean over draws of
      `sampler(parameters)`.
    - otherwise: `subsystem(parameters)` is a `torch.distributions.Distribution` of the response, with the samples along
      its first batch dimension. The metric is exact if the support is finite, in closed form for a `Normal`, and a
      Monte Carlo mean over the distribution's `sample` otherwise.

    Args:
        subsystem: the subsystem, as described above.
        parameters: one tensor, or tensors by name: the point at which the metric is taken.
        response: the response of the subsystem given its pre-activation.
        outcomes: all possible values of y.
        sampler: a function that draws y for all samples at the given parameters.
        draws: the number of Monte Carlo draws of the whole response, at least 2.
        seed: the seed of the draws; the global random state is restored afterwards.

    Returns:
        The metric [D, D], averaged over the n samples and summed over the units of each sample, where D counts the
        parameters in the order in which they are given. A Monte Carlo metric has the standard error of each entry as
        `standard_error`.

    Raises:
        ValueError: if there is no parameter, a parameter is not finite, or more than one of `response`, `outcomes` and
            `sampler` is given.
        TypeError: if none of them is given and the subsystem does not return a distribution.
    """
    if sum(way is not None for way in (response, outcomes, sampler)) > 1:
        raise ValueError("give at most one of response, outcomes and sampler")
    theta, shape, restore = _flatten(parameters)
    if response is not None:
        return PullbackMetric(lambda flat: subsystem(restore(flat)), theta, response, shape)
    if outcomes is not None:
        values = list(outcomes)
        log_prob = lambda flat: torch.stack([subsystem(restore(flat), y) for y in values])  # noqa: E731
        return _enumerated(log_prob, theta, shape)
    if sampler is not None:
        draw = lambda: sampler(restore(theta))  # noqa: E731
        return _sampled(lambda flat, y: subsystem(restore(flat), y), draw, theta, shape, draws, seed)
    distribution = subsystem(restore(theta))
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"subsystem must return a torch.distributions.Distribution, got {type(distribution).__name__}: "
            "give response, outcomes or sampler if it returns a tensor"
        )
    if distribution.has_enumerate_support:
        support = distribution.enumerate_support()
        return _enumerated(lambda flat: subsystem(restore(flat)).log_prob(support), theta, shape)
    if isinstance(distribution, Normal):
        return _normal(lambda flat: subsystem(restore(flat)), theta, shape)
    return _sampled(
        lambda flat, y: subsystem(restore(flat)).log_prob(y), distribution.sample, theta, shape, draws, seed
    )


def fisher(model: nn.Module, inputs: Any, response: Response, names: Sequence[str] | None = None) -> Metric:
    """Return the global Fisher information metric of a model. Equation (5).

    Args:
        model: its output is the pre-activation of the response: logits for `Categorical()`, for instance.
        inputs: the arguments of the model: a tensor, or a tuple of arguments.
        response: the response whose pre-activation is the model's output.
        names: the parameters of the metric; None for all trainable ones. The other parameters are the reference, so
            that the result is a diagonal block of the full metric (proposition 2).

    Returns:
        The metric of the flattened parameters, in the order of `names`, or of `model.named_parameters()`.
    """
    function, parameters = as_function(model, inputs, names)
    return relative_fisher(function, parameters, response)


def observed_fisher(
    subsystem: Callable[..., Any], parameters: Parameters, y: Any, response: Response | None = None
) -> DenseMetric:
    """Return the observed metric, minus the mean Hessian of the log-likelihood at observations. Equation (3).

    Unlike the expected metric, it need not be positive semi-definite.

    Args:
        subsystem: with `response`, `subsystem(parameters)` is the pre-activation [n, out]; without it,
            `subsystem(parameters, y)` is ln p(y_n), [n] or [n, units].
        parameters: one tensor, or tensors by name.
        y: the observed responses.
        response: the response of the subsystem given its pre-activation.

    Returns:
        The matrix [D, D], a mean over samples. Positions of a pre-activation [n, positions, out] count as samples.

    Raises:
        ValueError: if there is no parameter, or a parameter or y is not finite.
    """
    theta, shape, restore = _flatten(parameters)
    if isinstance(y, Tensor) and y.is_floating_point():
        check_finite("y", y)

    def log_likelihood(flat: Tensor) -> Tensor:
        known = restore(flat)
        return (subsystem(known, y) if response is None else response.log_prob(subsystem(known), y)).sum()

    with torch.no_grad():
        terms = subsystem(restore(theta)) if response is not None else subsystem(restore(theta), y)
    samples = _rows(terms).shape[0] if response is not None else len(terms) if terms.ndim else 1
    return DenseMetric(-hessian(log_likelihood)(theta) / samples, shape, samples)


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
        ValueError: if a name is not a parameter of the model, or there is no parameter.
    """
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


def _rows(z: Tensor) -> Float[Tensor, "n out"]:
    """Reshape a pre-activation to [n, out]: positions count as samples, and a vector is one unit."""
    return z.unsqueeze(-1) if z.ndim <= 1 else z.flatten(0, -2)


def _flatten(parameters: Parameters) -> tuple[Tensor, tuple[int, ...], Callable[[Tensor], Any]]:
    """Return the parameters as one vector, their shape, and the function that restores them from a vector."""
    if isinstance(parameters, Tensor):
        check_floating("parameters", parameters)
        check_finite("parameters", parameters)
        shape = tuple(parameters.shape)
        return parameters.detach().reshape(-1), shape or (1,), lambda flat: flat.reshape(shape)
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


def _enumerated(log_prob: Callable[[Tensor], Tensor], theta: Tensor, shape: tuple[int, ...]) -> DenseMetric:
    """Return sum_y p(y) s(y) s(y)', averaged over samples and summed over units, from log-probs [outcomes, n, ...]."""
    weights = log_prob(theta).exp()
    scores: Tensor = jacrev(log_prob)(theta)
    flat = scores.reshape(-1, theta.numel())
    # An outcome of probability 0 contributes nothing, but its score may not be finite.
    flat = torch.where(weights.reshape(-1, 1) > 0, flat, torch.zeros_like(flat))
    samples = weights.shape[1] if weights.ndim > 1 else 1
    return DenseMetric((flat * weights.reshape(-1, 1)).T @ flat / samples, shape, samples)


def _normal(distribution: Callable[[Tensor], Normal], theta: Tensor, shape: tuple[int, ...]) -> DenseMetric:
    """Return the metric of a Gaussian response whose mean and scale may both depend on the parameters."""
    scale = distribution(theta).scale.detach().reshape(-1, 1)
    of_mean: Tensor = jacrev(lambda flat: distribution(flat).loc.expand(distribution(flat).batch_shape))(theta)
    of_scale: Tensor = jacrev(lambda flat: distribution(flat).scale.expand(distribution(flat).batch_shape))(theta)
    mean = of_mean.reshape(-1, theta.numel()) / scale
    spread = of_scale.reshape(-1, theta.numel()) * (math.sqrt(2) / scale)
    samples = of_mean.shape[0] if of_mean.ndim > 1 else 1
    return DenseMetric((mean.T @ mean + spread.T @ spread) / samples, shape, samples)


def _sampled(
    log_prob: Callable[[Tensor, Any], Tensor],
    draw: Callable[[], Any],
    theta: Tensor,
    shape: tuple[int, ...],
    draws: int,
    seed: int,
) -> DenseMetric:
    """Return the mean of s(y) s(y)' over draws of y, with its standard error."""
    check_interval("draws", draws, 2, math.inf)
    total = theta.new_zeros(theta.numel(), theta.numel())
    squares = torch.zeros_like(total)
    samples = 1
    with torch.random.fork_rng(devices=[] if theta.device.type == "cpu" else [theta.device]):
        torch.manual_seed(seed)
        for _ in range(draws):
            y = draw()
            scores: Tensor = jacrev(lambda flat, y=y: log_prob(flat, y))(theta)
            samples = scores.shape[0] if scores.ndim > 1 else 1
            rows = scores.reshape(-1, theta.numel())
            one = rows.T @ rows / samples
            total += one
            squares += one.square()
    mean = total / draws
    variance = (squares / draws - mean.square()).clamp(min=0) * (draws / (draws - 1))
    return DenseMetric(mean, shape, samples, standard_error=(variance / draws).sqrt())
