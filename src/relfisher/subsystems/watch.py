"""Which layer feeds which activation: seen once, while the model runs, in modules and in functional code alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode

from relfisher.responses import LinearGaussian, UnitResponse
from relfisher.subsystems.activations import JOINING, RESHAPING, canonical_name, response_of

__all__ = ["ActivationWatch"]


# Reads of an attribute, and what leaves the graph: they take a pre-activation nowhere.
_LOOKS = frozenset(["get", "detach"])


class ActivationWatch(TorchFunctionMode):
    """While active, notes which functions take the pre-activations that it was shown.

    `show(key, z)` registers a layer's output. A layer's response is then the one activation that takes z; it is
    linear if z also goes elsewhere, if nothing takes it (the model's output), or if the taker is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[int, tuple[str, Tensor]] = {}
        self._takers: dict[str, list[tuple[str, UnitResponse | None]]] = {}

    def show(self, key: str, z: Tensor) -> None:
        """Watch what becomes of a layer's output."""
        self._shown[id(z)] = (key, z)
        self._takers.setdefault(key, [])

    @_disable_dynamo  # one pass of a compiled model is watched as it is
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        taken = {id(z): self._shown[id(z)] for z in _tensors([*args, *kwargs.values()]) if id(z) in self._shown}
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
                self._takers[key].append((name, response))
                if in_place:  # an activation stands where there was a pre-activation
                    del self._shown[place]
        return result

    def response(self, key: str) -> UnitResponse:
        """Return the response of a layer that was shown."""
        found = {response for _, response in self._takers.get(key, [])}
        only = found.pop() if len(found) == 1 else None
        return LinearGaussian() if only is None else only

    def untold(self, key: str) -> list[str]:
        """Return the functions that took a layer's output and are neither activations nor known to join or score."""
        return sorted({name for name, response in self._takers.get(key, []) if not response and name not in JOINING})

    def forget(self) -> None:
        """Let the tensors go."""
        self._shown.clear()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the values, and one level inside lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))
