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

# So many units in the last place of the weight are noise.
_NOISE = 4

# The relative error of <u, J J' u> in low precision.
_AGREEING = 0.1

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

    def gradient(self, module: nn.Module, trained: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the gradient g of the weight, given J' g for the trained tensors; None for those that are fixed."""
        derivative = _Derivative(self, module, trained, gradients)
        given = tuple(_precise(each) for each in gradients if each is not None)
        backward, forward = derivative.pulled, derivative.pushed
        return _least_squares(lambda each: backward(each[0]), lambda each: (forward(each),), given, derivative.eps)[0]

    def steps(
        self, module: nn.Module, trained: Sequence[Tensor], step: Tensor, moving: Sequence[Any]
    ) -> list[Tensor | None]:
        """Return the smallest changes of the trained tensors that change the weight by a step, or nearly so.

        Those that do not move are None in `moving`, and have None as the change.
        """
        derivative = _Derivative(self, module, trained, moving)
        backward, forward = derivative.pulled, derivative.pushed
        given = (_precise(step),)
        found = _least_squares(lambda each: (forward(each),), lambda each: backward(each[0]), given, derivative.eps)
        rest = iter(found)
        return [None if each is None else next(rest) for each in moving]

    def is_differentiable(self, module: nn.Module) -> bool:
        """Return whether the weight has the derivative that the steps need: products with J and J' that agree."""
        parameters = [_stored(module, name) for name in self.names]
        try:
            derivative = _Derivative(self, module, parameters, parameters)
            shape, device = self.shape, parameters[0].device
            wave = torch.linspace(-1, 1, shape.numel(), device=device).sin().view(shape)
            pulled = derivative.pulled(wave)
            size = _square(pulled)
            product = float((derivative.pushed(pulled) * wave).sum())
        except RuntimeError:  # the derivative of a step cannot be differentiated
            return False
        return abs(product - size) <= _AGREEING * size


class _Derivative:
    """The derivative J of a weight, at the values of the trained tensors that move.

    Args:
        chart: how the weight is computed.
        module: its module.
        trained: the trained tensors.
        moving: None for those that do not move.
    """

    def __init__(self, chart: Chart, module: nn.Module, trained: Sequence[Tensor], moving: Sequence[Any]) -> None:
        with torch.enable_grad():
            every = [each.detach().requires_grad_(at is not None) for each, at in zip(trained, moving, strict=True)]
            self._inputs = [each for each in every if each.requires_grad]
            self._weight = chart.value(module, every)
            self._dual = torch.zeros_like(self._weight, requires_grad=True)
            options = {"create_graph": True, "materialize_grads": True}
            self._gradients = torch.autograd.grad(self._weight, self._inputs, self._dual, **options)
        self.eps = torch.finfo(self._weight.dtype).eps

    def pulled(self, change: Tensor) -> Tensors:
        """Return the product with J'."""
        given = change.to(self._weight.dtype)
        found = torch.autograd.grad(self._weight, self._inputs, given, retain_graph=True, materialize_grads=True)
        return tuple(_precise(each) for each in found)

    def pushed(self, changes: Tensors) -> Tensor:
        """Return the product with J."""
        pairs = zip(self._gradients, changes, strict=True)
        live = [(each, change.to(each.dtype)) for each, change in pairs if each.requires_grad]
        if not live:
            return _precise(torch.zeros_like(self._weight))
        outputs, given = zip(*live, strict=True)
        found = torch.autograd.grad(outputs, self._dual, given, retain_graph=True, materialize_grads=True)
        return _precise(found[0])


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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

    def gradient(self, module: nn.Module, trained: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the sum of the gradient along v, which is that of g, and across v."""
        unit, ratio = self._geometry(trained)
        across, along = gradients
        found = torch.zeros_like(unit) if across is None else ratio * across
        return found if along is None else found + unit * along

    def steps(
        self, module: nn.Module, trained: Sequence[Tensor], step: Tensor, moving: Sequence[Any]
    ) -> list[Tensor | None]:
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
    forward: Callable[[Tensors], Tensors], backward: Callable[[Tensors], Tensors], target: Tensors, eps: float
) -> Tensors:
    """Return nearly the smallest x that makes A x nearest to a target, by conjugate gradients (Hestenes, Stiefel 1952).

    Args:
        forward: the product with A.
        backward: the product with A'.
        target: the target.
        eps: the precision of the products.
    """
    rest = list(target)
    slope = list(backward(target))
    x, direction = [torch.zeros_like(each) for each in slope], slope
    size = _square(slope)
    small = size * max(_EXACT, _NOISE * eps) ** 2
    for _ in range(_STEPS):
        if size <= small:
            break
        image = forward(tuple(direction))
        curvature = _square(image)
        if curvature == 0:
            break
        length = size / curvature
        x = [each + length * along for each, along in zip(x, direction, strict=True)]
        rest = [each - length * along for each, along in zip(rest, image, strict=True)]
        slope = list(backward(tuple(rest)))
        before, size = size, _square(slope)
        direction = [each + size / before * along for each, along in zip(slope, direction, strict=True)]
    return tuple(x)


def _square(tensors: Sequence[Tensor]) -> float:
    return sum(float(each.double().square().sum()) for each in tensors)
