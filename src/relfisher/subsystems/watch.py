"""Which layer feeds which activation, and that which layer: seen once, while the model runs, in modules and in code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode

from relfisher.responses import LinearGaussian, UnitResponse
from relfisher.subsystems.activations import JOINING, RESHAPING, canonical_name, response_of

__all__ = ["ActivationWatch"]


# Reads of an attribute, and what leaves the graph: they take a pre-activation nowhere.
_LOOKS = frozenset(["get", "detach"])

# After these, units are still along the last axis, if it is as long as before; dropout leaves their mean as it was.
_CARRYING = frozenset("dropout contiguous clone to type float double half bfloat16 view reshape flatten".split())


class _Taker(NamedTuple):
    """A function that took a pre-activation: its name, the response that it makes, whether it is a softmax of it."""

    name: str
    response: UnitResponse | None
    softmax: bool


class ActivationWatch(TorchFunctionMode):
    """While active, notes which functions take the pre-activations that it was shown.

    `show(key, z)` registers a layer's output. A layer's response is then the one activation that takes z; it is
    linear if z also goes elsewhere, if nothing takes it (the model's output), or if the taker is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[int, tuple[str, Tensor]] = {}
        self._takers: dict[str, list[_Taker]] = {}
        self._activated: dict[int, tuple[str, Tensor]] = {}
        # The weight of each linear function that took a layer's activated units, None for any other function.
        self._followers: dict[str, list[Tensor | None]] = {}

    def show(self, key: str, z: Tensor) -> None:
        """Watch what becomes of a layer's output."""
        self._shown[id(z)] = (key, z)
        self._takers.setdefault(key, [])

    @_disable_dynamo  # one pass of a compiled model is watched as it is
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [id(each) for each in _tensors([*args, *kwargs.values()])]
        taken = {place: self._shown[place] for place in given if place in self._shown}
        units = [self._activated[place] for place in given if place in self._activated]
        versions = {place: z._version for place, (_, z) in taken.items()}
        result = func(*args, **kwargs)
        name = canonical_name(func)
        if name in RESHAPING and args and id(args[0]) in taken:
            key = taken[id(args[0])][0]
            for part in _tensors(result if isinstance(result, tuple | list) else [result]):
                self.show(key, part)
        elif name not in _LOOKS and any(leaf.is_floating_point() for leaf in _tensors([result])):
            for place, (key, z) in taken.items():
                in_place = z._version != versions[place]
                if result is z and not in_place:
                    continue  # a cast to what it was already
                response = response_of(func, args, kwargs) if args and args[0] is z else None
                self._takers[key].append(_Taker(name, response, _is_softmax(name, z, args, kwargs)))
                if in_place:  # an activation stands where there was a pre-activation
                    del self._shown[place]
                if response is not None:
                    self._activated[id(result)] = (key, result)
            for key, activated in units:
                self._follow(key, activated, name, args, result)
        return result

    def _follow(self, key: str, activated: Tensor, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Note what takes the activated units of a layer."""
        if name in _CARRYING and isinstance(result, Tensor) and result.shape[-1:] == activated.shape[-1:]:
            self._activated[id(result)] = (key, result)
        else:
            linear = name == "linear" and args[0] is activated
            self._followers.setdefault(key, []).append(args[1] if linear else None)

    def response(self, key: str) -> UnitResponse:
        """Return the response of a layer that was shown."""
        found = {taker.response for taker in self._takers.get(key, [])}
        only = found.pop() if len(found) == 1 else None
        return LinearGaussian() if only is None else only

    def untold(self, key: str) -> list[str]:
        """Return the functions that took a layer's output and are neither activations nor known to join or score."""
        takers = self._takers.get(key, [])
        return sorted({taker.name for taker in takers if not taker.response and taker.name not in JOINING})

    def following(self, key: str) -> Tensor | None:
        """Return the weight of the one linear function that takes a layer's activated units, and all that does."""
        if len({taker.response for taker in self._takers.get(key, [])}) != 1:
            return None
        weights = {id(weight): weight for weight in self._followers.get(key, [])}
        return next(iter(weights.values())) if len(weights) == 1 else None

    def is_output(self, key: str) -> bool:
        """Return whether nothing took a layer's output."""
        return self._takers.get(key) == []

    def is_softmax(self, key: str) -> bool:
        """Return whether a layer's outputs went into softmax functions over its units, and nowhere else."""
        takers = self._takers.get(key, [])
        return bool(takers) and all(taker.softmax for taker in takers)

    def forget(self) -> None:
        """Let the activations go."""
        self._shown.clear()
        self._activated.clear()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the values, and one level inside lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def _is_softmax(name: str, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call is a softmax over the last axis of z, or scores such a one."""
    axes = z.dim()
    if not args or args[0] is not z:
        return False
    if name == "cross_entropy":
        return axes == 2
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return name in ("softmax", "log_softmax") and axis in (-1, axes - 1)
