"""Compare and balance the metrics of a model's layers: section 4 as library calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from relfisher.autodiff import fisher
from relfisher.layers import Layer, layers_of
from relfisher.metric import Metric
from relfisher.observe import metric_of, observe
from relfisher.responses import Response
from relfisher.validation import check_instance, check_integer

__all__ = ["Comparison", "LayerComparison", "Spectrum", "balance", "compare", "unbalance"]


@dataclass(frozen=True)
class Spectrum:
    """Summary numbers of a metric's spectrum.

    Attributes:
        rank: the number of eigenvalues that do not count as 0, as in `Metric.rank`.
        trace: the sum of the eigenvalues.
        top: the largest eigenvalues, in descending order.
        condition_number: the ratio of the largest eigenvalue to the smallest one that counts for the rank.
    """

    rank: int
    trace: float
    top: tuple[float, ...]
    condition_number: float

    @classmethod
    def of(cls, metric: Metric, top: int) -> Spectrum:
        """Return the spectrum of a metric, keeping the `top` largest eigenvalues."""
        values = metric.eigvalsh().flip(0)
        rank = metric.rank()
        return cls(rank, float(values.sum()), tuple(values[:top].tolist()), metric._condition_in_range())


@dataclass(frozen=True)
class LayerComparison:
    """A layer's relative metric (RFIM) and its block of the global metric (FIM).

    Attributes:
        name: the name of the layer.
        response: the response of its units, in the last call if they differ between calls.
        parameters: the number of parameters, D.
        relative: the spectrum of the RFIM.
        global_block: the spectrum of the layer's diagonal block of the FIM.
    """

    name: str
    response: Response
    parameters: int
    relative: Spectrum
    global_block: Spectrum


@dataclass(frozen=True)
class Comparison:
    """The comparison of all layers, in the order in which the forward pass reached them; `str` returns a table."""

    layers: tuple[LayerComparison, ...]

    def __iter__(self) -> Iterator[LayerComparison]:
        return iter(self.layers)

    def __str__(self) -> str:
        head = f"{'layer':<16}{'D':>8}  {'metric':<6}{'rank':>8}{'trace':>12}{'largest':>12}{'condition':>12}"
        lines = [head]
        for layer in self.layers:
            for label, spectrum in (("RFIM", layer.relative), ("FIM", layer.global_block)):
                lines.append(
                    f"{layer.name:<16}{layer.parameters:>8}  {label:<6}{spectrum.rank:>8}{spectrum.trace:>12.4g}"
                    f"{spectrum.top[0]:>12.4g}{spectrum.condition_number:>12.4g}"
                )
        return "\n".join(lines)


def compare(model: nn.Module, inputs: Any, response: Response, top: int = 5) -> Comparison:
    """Compare each linear layer's relative metric with its block of the global metric. Section 4.

    The rank of a hidden layer's RFIM is at most n * out. The rank of the global metric is at most n times the number of
    independent outcomes of `response`. For the output layer, if it is called once, the two metrics are equal.

    Args:
        model: the model. What one of its linear layers returns is its output [n, out] or [n, positions, out], possibly
            reshaped, and the pre-activation of the response. Positions count as samples.
        inputs: the arguments of the model, with n samples: a tensor, or a tuple of arguments.
        response: the response of the model's output, which is also that of the output layer. The response of every
            other layer is that of the activation after it.
        top: the number of largest eigenvalues to keep.

    Returns:
        The comparison, with one row per layer that the forward pass reached.

    Raises:
        ValueError: if a layer is parametrized, so that its parameters are not its weight and bias, or tied to another
            module, or no linear layer returns the model's output.
    """
    check_integer("top", top)
    table = []
    for name, (layer, said, relative) in _relative_metrics(model, inputs, response).items():
        prefix = f"{name}." if name else ""
        names = [f"{prefix}{key}" for key, _ in layer.module.named_parameters()]
        block = fisher(model, inputs, response, names)
        table.append(
            LayerComparison(name, said, relative.shape[0], Spectrum.of(relative, top), Spectrum.of(block, top))
        )
    return Comparison(tuple(table))


def _relative_metrics(model: nn.Module, inputs: Any, response: Response) -> dict[str, tuple[Layer, Response, Metric]]:
    """Return each linear layer that was reached, the response of its last call, and its relative metric, by name."""
    check_instance("model", model, nn.Module)
    check_instance("response", response, Response)
    layers = _plain_layers(model)
    seen = observe(model, layers, inputs)
    if not any(call.is_output for calls in seen.values() for call in calls):
        named = ", ".join(map(repr, seen)) or "none"
        raise ValueError(
            "model must return the output of a linear layer, since that is the layer whose response is `response`; it "
            f"returns the output of none of the layers that ran ({named})"
        )
    said = {
        name: [replace(call, response=response) if call.is_output else call for call in calls]
        for name, calls in seen.items()
    }
    return {name: (layers[name], calls[-1].response, metric_of(layers[name], calls)) for name, calls in said.items()}


def _plain_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the linear layers by name, after checking that none is parametrized, and none tied."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    taken = [name for name, module in modules.items() if parametrize.is_parametrized(module)]
    if taken:
        raise ValueError(f"model must not be parametrized, but {', '.join(taken)} is: call unbalance first")
    owners: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False):
            owners.setdefault(parameter, []).append(key)
    tied = [" and ".join(names) for names in owners.values() if len(names) > 1]
    if tied:
        raise ValueError(f"model must not tie parameters, but these are one: {'; '.join(tied)}")
    return {name: layer for name, module in modules.items() for layer in layers_of(name, module)}


class _Scaled(nn.Module):
    """The parametrization weight = scale * phi; the metric of phi is scale^2 times the metric of the weight."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, phi: Tensor) -> Tensor:
        return phi * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.scale


def balance(model: nn.Module, inputs: Any, response: Response) -> dict[str, float]:
    """Reparametrize each linear layer so that the largest eigenvalue of its metric is 1. Section 4.

    Each layer's weight and bias become scale * phi, as torch parametrizations, where scale is 1 / sqrt(largest
    eigenvalue). The model computes the same function, and its parameters are the phi. A step of bounded length in phi
    then changes each layer's response by a bounded amount. `unbalance` is the inverse.

    Args:
        model: the model, which is changed in place; create the optimizer afterwards.
        inputs: the arguments of the model: a tensor, or a tuple of arguments.
        response: the response of the model's output, which is also that of the output layer, as in `compare`.

    Returns:
        The scale of each layer, by name.

    Raises:
        ValueError: as in `compare`, or if the metric of a layer is zero.
    """
    layers = _relative_metrics(model, inputs, response)
    scales: dict[str, float] = {}
    for name, (_, _, metric) in layers.items():
        largest = float(metric.eigvalsh(1))
        if not largest > 0:
            raise ValueError(f"the metric of {name!r} is zero on these inputs, so that it cannot be scaled to 1")
        scales[name] = largest**-0.5
    for name, scale in scales.items():
        module = layers[name][0].module
        for key in [key for key, _ in module.named_parameters()]:
            parametrize.register_parametrization(module, key, _Scaled(scale))
    return scales


def unbalance(model: nn.Module) -> None:
    """Undo `balance`: turn the parameters back into weights and biases, keeping their current values."""
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: Any = module.parametrizations
        for key in list(parametrizations):
            if any(isinstance(step, _Scaled) for step in parametrizations[key]):
                with torch.no_grad():
                    parametrize.remove_parametrizations(module, key, leave_parametrized=True)
