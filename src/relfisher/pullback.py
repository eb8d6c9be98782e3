"""The metric of a pre-activation that is any differentiable function of the parameters, without forming a matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from relfisher.evaluation import differentiable
from relfisher.memory import check_fits
from relfisher.metric import Metric
from relfisher.responses import Response, UnitResponse
from relfisher.shapes import Float
from relfisher.validation import check_finite

__all__ = ["PullbackMetric", "as_rows"]


def as_rows(z: Tensor, response: Response | None = None) -> Float[Tensor, "n out"]:
    """Reshape a pre-activation to [n, out]: positions count as samples, and a vector is one unit.

    Args:
        z: the pre-activation.
        response: its response, if it is known.

    Returns:
        A matrix.

    Raises:
        ValueError: if z is a vector, and the response is one of several units.
    """
    if z.ndim <= 1 and response is not None and not isinstance(response, UnitResponse):
        raise ValueError(
            f"the pre-activation of {type(response).__name__} must be [n, out], got {list(z.shape)}: give one "
            "sample an axis of its own"
        )
    return z.unsqueeze(-1) if z.ndim <= 1 else z.flatten(0, -2)


class PullbackMetric(Metric):
    """The metric J' F J of the parameters of a pre-activation z(theta), J = dz / dtheta by automatic differentiation.

    J is the derivative by reverse mode, as in training: a row of `padding_idx`, whose gradient is 0, is frozen. A
    product takes one pass backwards, one through the derivative of that pass, and no matrix. Where torch does not have
    that derivative, as for `EmbeddingBag`, it takes the Jacobian of all samples.

    Args:
        pre_activation: the function from flat parameters [D] to z [n, out], or [n, positions, out].
        theta: the flat parameters.
        response: the response of the subsystem given z.
        parameter_shape: the shape of the parameters; None for [D].
        samples: the number of samples to average over; None for n, or n * positions.

    Raises:
        ValueError: if the pre-activation or the metric is not finite, or is one vector for a response of several units.
        TypeError: if the dtype is not float32 or float64.
    """

    #: None: the metric is exact.
    standard_error: Tensor | None = None
    _semidefinite = True

    def __init__(
        self,
        pre_activation: Callable[[Tensor], Tensor],
        theta: Float[Tensor, "D"],
        response: Response,
        parameter_shape: tuple[int, ...] | None = None,
        samples: int | None = None,
    ) -> None:
        rows: Callable[[Tensor], Tensor] = lambda parameters: as_rows(pre_activation(parameters), response)  # noqa: E731
        self._pre_activation = differentiable()(rows)
        self._theta = theta
        z = self._pre_activation(theta).detach()
        super().__init__(parameter_shape or (theta.numel(),), samples or z.shape[0], theta.dtype, theta.device)
        check_finite("the pre-activation", z)
        self._zeros = torch.zeros_like(z)
        self.information = response.operator(z)
        self._check_products()

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        pull = vjp(self._pre_activation, self._theta)[1]
        push = vjp(lambda field: pull(field)[0], self._zeros)[1]

        def column(vector: Tensor) -> Tensor:
            image: Tensor = pull(self.information.apply(push(vector)[0]))[0]
            return image / self.samples

        try:
            product: Tensor = vmap(column, in_dims=1)(vectors).T
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            jacobian = self._jacobian()
            image = self.information.apply((jacobian @ vectors).movedim(-1, 0))
            product = torch.einsum("noD,kno->Dk", jacobian, image) / self.samples
        return product.detach()

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self._theta.numel()

    def _jacobian(self) -> Float[Tensor, "n out D"]:
        numbers = self._zeros.numel() * self._theta.numel()
        check_fits("the Jacobian of all samples", numbers, self.dtype, self.device, "use @ or fewer samples")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # some of torch's backward passes
            jacobian: Tensor = jacrev(self._pre_activation)(self._theta)
        return jacobian.detach()

    def _field(self) -> Float[Tensor, "D n out"]:
        """Return the derivative by each parameter."""
        return self.information.contrasts(self._jacobian().permute(2, 0, 1))

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        field = self._field()
        image = self.information.apply(field).reshape(self.shape[0], -1)
        return (image @ field.reshape(self.shape[0], -1).T / self.samples).unsqueeze(0)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal of J' F J."""
        field = self._field()
        return (field * self.information.apply(field)).sum((1, 2)) / self.samples
