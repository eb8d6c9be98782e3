"""The metrics of section 3, computed from tensors: a neuron, a layer, a softmax head, two layers.

Shapes follow torch: `weight` [out, in], `bias` [out], x [n, in]. The parameters of a metric are the matrix
(weight, bias) [out, in + 1], neuron-major with the bias last, or the weight alone if there is no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.information import PulledBack
from relfisher.metric.layer import LayerMetric
from relfisher.responses import Categorical, Response, UnitResponse
from relfisher.shapes import Float
from relfisher.validation import check_finite, check_floating, check_instance, check_matrix

__all__ = ["layer_metric", "neuron_metric", "softmax_metric", "two_layer_metric"]


def neuron_metric(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | float | None,
    response: UnitResponse,
) -> LayerMetric:
    """Return the metric of one neuron, mean_n nu_f(w, x_n) x~_n x~_n'. Equations (12), (14), (16), (18), (20), (21).

    Args:
        x: the neuron's inputs, [n, in].
        weight: its weights, [in].
        bias: its bias, one number; None for a neuron without a bias.
        response: the response of the neuron, such as `SigmoidBernoulli()`.

    Returns:
        A metric of shape [in + 1, in + 1], or [in, in] without a bias.

    Raises:
        ValueError: if the shapes do not match, or a value is not finite.
        TypeError: if a tensor is not of a floating-point dtype, or the dtypes differ.
    """
    check_floating("weight", weight)
    if weight.ndim != 1:
        raise ValueError(f"weight must have shape [in], got {list(weight.shape)}; for a layer use layer_metric")
    if isinstance(bias, Tensor) and bias.numel() != 1:
        raise ValueError(f"bias must be one number, got shape {list(bias.shape)}")
    shift = weight.new_tensor([bias]) if isinstance(bias, (int, float)) else bias
    return layer_metric(x, weight.unsqueeze(0), None if shift is None else shift.reshape(1), response)


def layer_metric(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response: Response,
) -> LayerMetric:
    """Return the metric of a layer. Equations (22) for a linear response, (23) for unit responses, (25) for softmax.

    Args:
        x: the layer's inputs, [n, in].
        weight: the layer's weight, [out, in].
        bias: its bias, [out]; None for a layer without a bias.
        response: the response of the layer.

    Returns:
        A metric of shape [D, D], D = out * (in + 1), or out * in without a bias.

    Raises:
        ValueError: if the shapes do not match, or a value is not finite.
        TypeError: if a tensor is not of a floating-point dtype, or the dtypes differ.
    """
    check_instance("response", response, Response)
    z = _pre_activation(x, weight, bias)
    return LayerMetric(response.operator(z), x.detach(), bias=bias is not None)


def softmax_metric(x: Tensor, weight: Tensor, bias: Tensor | None) -> LayerMetric:
    """Return the metric of a softmax layer. Equation (25).

    The metric is singular: adding the same vector to the weights of all classes does not change the response.

    Args:
        x: the layer's inputs, [n, in].
        weight: the layer's weight, [out, in], one row per class.
        bias: its bias, [out]; None for a layer without a bias.

    Returns:
        A metric of shape [D, D], D = out * (in + 1), or out * in without a bias.

    Raises:
        ValueError: if the shapes do not match, or a value is not finite.
        TypeError: if a tensor is not of a floating-point dtype, or the dtypes differ.
    """
    return layer_metric(x, weight, bias, Categorical())


def two_layer_metric(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: UnitResponse,
    next_weight: Tensor,
    next_bias: Tensor | None,
    response: Response,
) -> LayerMetric:
    """Return the metric of a layer's parameters with respect to the response of the next layer. Equation (26).

    The hidden layer is deterministic, h = f(z); the next layer's parameters are part of the reference. Block (i, j) is
    mean_n c_i' F_n c_j f'(z_ni) f'(z_nj) x~_n x~_n', where c_i is the i-th column of the next layer's weight. Equations
    (26) and (81) are printed with nu_f in place of f'. The two are equal for tanh and sigmoid units, but not in general
    for (P)ReLU and ELU units, where nu_f = f'^2 / sigma^2.

    Args:
        x: the inputs of the first layer, [n, in].
        weight: the first layer's weight, [out, in].
        bias: its bias, [out]; None for a layer without a bias.
        activation: the response that defines the hidden activation f; its noise is not used.
        next_weight: the next layer's weight, [next, out].
        next_bias: its bias, [next]; None for a layer without a bias.
        response: the response of the next layer.

    Returns:
        A metric of the first layer's parameters, of shape [D, D], D = out * (in + 1), or out * in without a bias.

    Raises:
        ValueError: if the shapes do not match, or a value is not finite.
        TypeError: if a tensor is not of a floating-point dtype, or the dtypes differ.
    """
    check_instance("activation", activation, UnitResponse)
    check_instance("response", response, Response)
    z = _pre_activation(x, weight, bias)
    check_matrix("next_weight", next_weight, None, weight.shape[0], "[next, out]")
    following = _pre_activation(activation.activation(z), next_weight, next_bias, "next_")
    information = PulledBack(response.operator(following), next_weight.detach(), activation.slope(z))
    return LayerMetric(information, x.detach(), bias=bias is not None)


def _pre_activation(x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> Float[Tensor, "n out"]:
    """Check shapes, dtypes and values, and return z = W x + b."""
    check_matrix(f"{prefix}weight", weight, None, None, "[out, in]")
    out, inputs = weight.shape
    check_matrix("x", x, None, inputs, "[n, in]")
    _check_one_dtype(x, f"{prefix}weight", weight)
    if bias is not None:
        check_floating(f"{prefix}bias", bias)
        _check_one_dtype(x, f"{prefix}bias", bias)
        if tuple(bias.shape) != (out,):
            raise ValueError(f"{prefix}bias must have shape [out] = [{out}], got {list(bias.shape)}")
        check_finite(f"{prefix}bias", bias)
    z = torch.nn.functional.linear(x, weight, bias).detach()
    check_finite(f"the {prefix.replace('_', ' ')}pre-activation", z)
    return z


def _check_one_dtype(x: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"x and {name} must have one dtype, got {x.dtype} and {tensor.dtype}")
