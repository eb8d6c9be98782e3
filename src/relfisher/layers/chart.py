"""Weights that are computed from what is trained: parametrizations of torch, weight and spectral normalization.

A weight W(theta) has the metric of a weight that is trained itself. Pulled back to theta it is J' G J, where J is
the derivative of W: in equation (5) the scores of theta are J' times those of W. With the gradient J' g, its natural
gradient is

    (J' G J)^+ J' g = J^+ G^-1 g

wherever theta reaches every change of W, as in weight normalization. So the gradient is taken from theta to W by least
squares, becomes a step of W there, and is taken back by least squares: the smallest change of theta that makes it. If
theta cannot make it, as in spectral normalization, which fixes a norm of W, its change is the nearest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["Chart", "Computed", "Leaf", "Recorded", "chart_of"]

# Conjugate gradients end after so many steps, or at this share of the first slope. By this, directions of theta that
# change W by less than about a thousandth of others are left alone, such as the scale of a standardized weight.
_STEPS = 24
_EXACT = 1e-3

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Chart(ABC):
    """How a weight is computed from the tensors that are trained.

    Args:
        attribute: the weight's name in its module, such as "weight".
        names: the names of the trained tensors in the module, the one that is most like the weight first.
        shape: the shape of the weight.
    """

    attribute: str
    names: tuple[str, ...]
    shape: torch.Size

    @abstractmethod
    def value(self, module: nn.Module, trained: Sequence[Tensor]) -> Tensor:
        """Return the weight for values of the trained tensors; nothing is changed."""

    def gradient(self, module: nn.Module, trained: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradient g of the weight, given J' g for the trained tensors."""
        pulled, pushed = self._derivative(module, trained)
        return _least_squares(lambda each: pulled(each[0]), lambda each: (pushed(each),), tuple(gradients))[0]

    def steps(self, module: nn.Module, trained: Sequence[Tensor], step: Tensor) -> list[Tensor]:
        """Return the smallest changes of the trained tensors that change the weight by a step, or nearly so."""
        pulled, pushed = self._derivative(module, trained)
        return list(_least_squares(lambda each: (pushed(each),), lambda each: pulled(each[0]), (step,)))

    def _derivative(
        self, module: nn.Module, trained: Sequence[Tensor]
    ) -> tuple[Callable[[Tensor], Tensors], Callable[[Tensors], Tensor]]:
        """Return the products with J' and with J."""
        with torch.enable_grad():
            inputs = [each.detach().requires_grad_() for each in trained]
            weight = self.value(module, inputs)
            dual = torch.zeros_like(weight, requires_grad=True)
            gradients = torch.autograd.grad(weight, inputs, dual, create_graph=True, materialize_grads=True)

        def pulled(change: Tensor) -> Tensors:
            given = change.to(weight.dtype)
            return torch.autograd.grad(weight, inputs, given, retain_graph=True, materialize_grads=True)

        def pushed(changes: Tensors) -> Tensor:
            return torch.autograd.grad(gradients, dual, changes, retain_graph=True, materialize_grads=True)[0]

        return pulled, pushed


class _Parametrized(Chart):
    """A parametrization of torch, or several in a row."""

    def value(self, module: nn.Module, trained: Sequence[Tensor]) -> Tensor:
        """Return the weight, without changing the buffers of a spectral normalization."""
        steps = module.get_submodule(f"parametrizations.{self.attribute}")
        training = [each for each in steps.modules() if each.training]
        originals = {name.rpartition(".")[2]: each for name, each in zip(self.names, trained, strict=True)}
        for each in training:
            each.training = False
        try:
            weight: Tensor = functional_call(steps, originals, ())
        finally:
            for each in training:
                each.training = True
        return weight


@dataclass(frozen=True)
class _WeightNormed(Chart):
    """Weight normalization, W = g v / |v|, in both forms of torch; its least squares in closed form.

    Args:
        attribute: as above.
        names: v and g.
        shape: as above.
        dim: the axis of the norms; -1 for one norm of the whole weight.
    """

    dim: int

    def value(self, module: nn.Module, trained: Sequence[Tensor]) -> Tensor:
        """Return g v / |v|."""
        direction, length = trained
        return direction * (length / self._norm(direction))

    def gradient(self, module: nn.Module, trained: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Return the sum of the gradient along v, which is that of g, and across v."""
        unit, ratio = self._geometry(trained)
        return unit * gradients[1] + ratio * gradients[0]

    def steps(self, module: nn.Module, trained: Sequence[Tensor], step: Tensor) -> list[Tensor]:
        """Return the step across v, and along it."""
        unit, ratio = self._geometry(trained)
        product = step * unit
        kept = [axis for axis in range(step.ndim) if axis != self.dim]
        along = product.sum() if self.dim == -1 else product.sum(kept, keepdim=True)
        return [ratio * (step - along * unit), along.expand_as(trained[1])]

    def _norm(self, direction: Tensor) -> Tensor:
        return torch.norm_except_dim(direction, 2, self.dim)

    def _geometry(self, trained: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return v / |v|, and |v| / g; 0 where g is, since there v changes nothing."""
        direction, length = (each.detach() for each in trained)
        norm = self._norm(direction)
        return direction / norm, torch.where(length == 0, 0.0, norm / length)


class _SpectralNormed(Chart):
    """`torch.nn.utils.spectral_norm`, for the singular vectors that the module has."""

    def value(self, module: nn.Module, trained: Sequence[Tensor]) -> Tensor:
        """Return W / u' W v."""
        (weight,) = trained
        matrix = _hook(module, SpectralNorm, self.attribute).reshape_weight_to_matrix(weight)
        left, right = (module.get_buffer(f"{self.attribute}_{each}") for each in "uv")
        scaled: Tensor = weight / (left @ matrix @ right)
        return scaled


@dataclass(frozen=True)
class Leaf:
    """A parameter or buffer of a module.

    Args:
        name: its name in the module.
    """

    name: str

    def of(self, values: Mapping[str, Tensor]) -> Any:
        """Return its value."""
        return values[self.name]


@dataclass(frozen=True)
class Computed:
    """What a function made of parameters, buffers and constants. Compares by value.

    Args:
        function: the function.
        args: its positional arguments, with leaves and computed ones among them.
        options: its other arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def of(self, values: Mapping[str, Tensor]) -> Any:
        """Return the result for values of the leaves."""
        options = {name: _evaluated(each, values) for name, each in self.options}
        return self.function(*(_evaluated(each, values) for each in self.args), **options)

    @property
    def leaves(self) -> set[str]:
        """The names of the leaves."""
        given = _flat([*self.args, *(each for _, each in self.options)])
        found = (each.leaves if isinstance(each, Computed) else {each.name} for each in given if _is_node(each))
        return set().union(*found)


def _is_node(given: object) -> bool:
    return isinstance(given, Leaf | Computed)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, tuple) else (value,))]


def _evaluated(given: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(given, tuple):
        return tuple(_evaluated(each, values) for each in given)
    return given.of(values) if _is_node(given) else given


@dataclass(frozen=True)
class Recorded(Chart):
    """What the forward pass of a module computes from its own parameters and buffers, and then uses as a weight.

    Args:
        attribute: as above.
        names: as above.
        shape: as above.
        program: what it computes.
    """

    program: Computed

    def value(self, module: nn.Module, trained: Sequence[Tensor]) -> Tensor:
        """Return the weight, with the other parameters and buffers as they are."""
        given = {name: _stored(module, name) for name in self.program.leaves}
        weight: Tensor = self.program.of(given | dict(zip(self.names, trained, strict=True)))
        return weight


def _stored(module: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    found = owner._parameters.get(key)
    return owner.get_buffer(key) if found is None else found.detach()


def chart_of(module: nn.Module, attribute: str) -> Chart | None:
    """Return how a weight of a module is computed from what is trained; None if it is trained itself, or not known.

    Args:
        module: any module.
        attribute: the name of a parameter that a module of this class has.
    """
    weight = getattr(module, attribute, None)
    if not isinstance(weight, Tensor):
        return None
    if parametrize.is_parametrized(module, attribute):
        inside = f"parametrizations.{attribute}"
        steps: Any = module.get_submodule(inside)
        if [type(step) for step in steps] == [_WeightNorm]:
            pair = f"{inside}.original1", f"{inside}.original0"
            return _WeightNormed(attribute, pair, weight.shape, steps[0].dim)
        originals = dict(steps.named_parameters(recurse=False))
        names = sorted(originals, key=lambda name: -originals[name].numel())
        return _Parametrized(attribute, tuple(f"{inside}.{name}" for name in names), weight.shape)
    hook = _hook(module, WeightNorm, attribute)
    if hook is not None:
        return _WeightNormed(attribute, (f"{attribute}_v", f"{attribute}_g"), weight.shape, hook.dim)
    if _hook(module, SpectralNorm, attribute) is not None:
        return _SpectralNormed(attribute, (f"{attribute}_orig",), weight.shape)
    return None


def _hook(module: nn.Module, kind: type[Any], attribute: str) -> Any:
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, kind) and hook.name == attribute), None)


def _least_squares(
    forward: Callable[[Tensors], Tensors], backward: Callable[[Tensors], Tensors], target: Tensors
) -> Tensors:
    """Return nearly the smallest x that makes A x nearest to a target, by conjugate gradients (Hestenes, Stiefel 1952).

    Args:
        forward: the product with A.
        backward: the product with A'.
        target: the target.
    """
    rest = list(target)
    slope = list(backward(target))
    x, direction = [torch.zeros_like(each) for each in slope], slope
    size = _square(slope)
    small = size * _EXACT**2
    for _ in range(_STEPS):
        if size <= small:
            break
        image = forward(tuple(direction))
        length = size / _square(image)
        x = [each + length * along for each, along in zip(x, direction, strict=True)]
        rest = [each - length * along for each, along in zip(rest, image, strict=True)]
        slope = list(backward(tuple(rest)))
        before, size = size, _square(slope)
        direction = [each + size / before * along for each, along in zip(slope, direction, strict=True)]
    return tuple(x)


def _square(tensors: Sequence[Tensor]) -> float:
    return sum(float(each.double().square().sum()) for each in tensors)
