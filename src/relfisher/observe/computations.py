"""Tensors that a module computes from its own parameters alone, such as a standardized or a masked weight."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from relfisher.layers import Chart, Computed, Leaf, Recorded, own_parameters
from relfisher.observe.activations import canonical_name, without_wrapper
from relfisher.observe.tensors import all_tensors, tensors_in

__all__ = ["Computations", "concerns"]

# A program that is longer is none: a loop, maybe, of unknown length.
_LONGEST = 64

# These draw random numbers, so that they compute something else the next time.
_RANDOM = ("dropout", "bernoulli", "rrelu", "gumbel_softmax")


class Computations:
    """What the functions inside of one call of a module make of its parameters and buffers.

    Args:
        module: the module.

    Attributes:
        kept: parameters, buffers and what is computed from them, by identity.
    """

    def __init__(self, module: nn.Module) -> None:
        own = own_parameters(module)
        self._trained = {name: each for name, each in own.items() if each.requires_grad}
        kept = {**own, **dict(module.named_buffers(recurse=False))}
        self._nodes: dict[int, tuple[Leaf | Computed, Tensor]] = {
            id(each): (Leaf(name), each) for name, each in kept.items()
        }
        self.kept = (self._nodes,)
        self._versions: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def after(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what a function made of parameters, buffers and constants alone."""
        given = list(all_tensors([*args, *kwargs.values()]))
        if not any(id(each) in self._nodes for each in given):
            return
        made = result if isinstance(result, tuple) else (result,)
        size = 1 + sum(self._sizes.get(id(each), 0) for each in given)
        changed = {id(each) for each in made}  # by this function, at most
        known = all(self.holds(each, id(each) in changed) for each in given) and not _changes(func, args, kwargs)
        if not known or size > _LONGEST or not all(isinstance(each, Tensor) and each.requires_grad for each in made):
            for each in [*made, *args[: canonical_name(func) == "setitem"]]:
                self._nodes.pop(id(each), None)  # what it was may have been overwritten
            return
        options = tuple(sorted((name, self._operand(each)) for name, each in kwargs.items()))
        operands = tuple(self._operand(each) for each in args)
        if canonical_name(func) == "get":  # an attribute, such as `mT`, whose getter cannot be copied
            func, operands = getattr, (*operands, func.__self__.__name__)  # type: ignore[attr-defined]  # a method
        node = Computed(without_wrapper(func), operands, options)
        for place, each in enumerate(made):
            self._nodes[id(each)] = (node if made is not result else Computed(_item, (node, place), ()), each)
            self._versions[id(each)] = each._version
            self._sizes[id(each)] = size

    def holds(self, tensor: Tensor, changes: int = 0) -> bool:
        """Return whether a tensor is a parameter or buffer, or computed from them alone.

        Args:
            tensor: any tensor.
            changes: how often it may have been changed in place since.
        """
        return (
            id(tensor) in self._nodes and tensor._version - self._versions.get(id(tensor), tensor._version) <= changes
        )

    def with_data(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Tensor]:
        """Return the tensors that a function takes, if there are data among them, and its result depends on parameters.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            result: the result.
        """
        if not any(each.requires_grad for each in tensors_in(result if isinstance(result, tuple) else [result])):
            return []
        given = list(tensors_in([*args, *kwargs.values()]))
        return [] if all(self.holds(each) for each in given) else given

    def names(self, tensor: Tensor) -> set[str]:
        """Return the names of the parameters and buffers that a tensor is, or is computed from."""
        node = self._nodes.get(id(tensor), (None,))[0]
        return set() if node is None else {node.name} if isinstance(node, Leaf) else node.leaves

    def chart(self, tensor: Any) -> Chart | None:
        """Return how a tensor is computed from one parameter of its shape, and maybe others; None if it is not."""
        node = self._nodes.get(id(tensor), (None,))[0]
        if not isinstance(node, Computed) or not self.holds(tensor):
            return None
        names = [name for name in self._trained if name in node.leaves]
        alike = [name for name in names if self._trained[name].shape == tensor.shape]
        if len(alike) != 1:
            return None
        others = (name for name in names if name != alike[0])
        return Recorded(alike[0], (alike[0], *others), tensor.shape, node)

    def _operand(self, given: Any) -> Any:
        if isinstance(given, list | tuple):
            return tuple(self._operand(each) for each in given)
        return self._nodes[id(given)][0] if isinstance(given, Tensor) else given


def concerns(kept: Iterable[Container[int]], values: Iterable[Any]) -> bool:
    """Return whether a tensor is among the values, also in lists and tuples, that is kept by its identity."""
    for value in values:
        place = id(value)
        for each in kept:
            if place in each:
                return True
        if isinstance(value, list | tuple) and concerns(kept, value):
            return True
    return False


def _item(several: tuple[Tensor, ...], place: int) -> Tensor:
    return several[place]


def _changes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function draws random numbers, or changes running statistics."""
    name = canonical_name(func)
    running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
    return any(each in name for each in _RANDOM) or (name in ("batch_norm", "instance_norm") and running is not None)
