"""Which layer feeds which activation, and that which layer: seen once, while the model runs, in modules and in code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from relfisher.responses import LinearGaussian, UnitResponse
from relfisher.subsystems.activations import JOINING, RESHAPING, canonical_name, response_of
from relfisher.subsystems.base import Subsystem

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

    Args:
        layers: whose weights are watched, too.
        running: the module that is being called already.

    Attributes:
        misused: layers whose parameters met data outside the calls of their module, as those of an embedding that
            scores the outputs in a function, too; and the function that took them. In the weight of a linear layer
            tokens may be looked up; see `discover`.
    """

    def __init__(self, layers: Iterable[Subsystem] = (), running: nn.Module | None = None) -> None:
        super().__init__()
        self.misused: dict[Subsystem, str] = {}
        self._layers: dict[nn.Module, list[Subsystem]] = {}
        self._running: list[nn.Module] = [] if running is None else [running]
        self._handles: list[RemovableHandle] = []
        # Parameters, and what was made of them alone.
        self._weights: dict[int, tuple[Subsystem, Tensor]] = {}
        for layer in layers:
            self._layers.setdefault(layer.module, []).append(layer)
            self._weights.update({id(parameter): (layer, parameter) for parameter in layer.parameters})
        # Outputs of calls that go on, their versions, and how many takers there were before them.
        self._said: dict[str, tuple[Tensor, int, int]] = {}
        self._shown: dict[int, tuple[str, Tensor]] = {}
        self._takers: dict[str, list[_Taker]] = {}
        self._activated: dict[int, tuple[str, Tensor]] = {}
        # The weight of each linear function that took a layer's activated units, None for any other function.
        self._followers: dict[str, list[Tensor | None]] = {}

    def __enter__(self) -> ActivationWatch:
        """Start to watch."""
        for module in self._layers:
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop it."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        while self._handles:
            self._handles.pop().remove()

    @_disable_dynamo
    def _enter(self, module: nn.Module, args: object) -> None:
        self._running.append(module)

    @_disable_dynamo
    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if module in self._running:
            del self._running[self._running.index(module) :]
        for layer in self._layers[module]:
            said = self._said.pop(layer.name, None)
            final = None if said is None or output is None else layer.output(output)
            if said is not None and final is not None:
                with torch._C.DisableTorchFunction():
                    self._replace(layer.name, *said, final)

    def _replace(self, key: str, z: Tensor, version: int, takers: int, final: Tensor) -> None:
        """Go on with what other hooks made of an output: the same values, maybe in another tensor, or others."""
        if z._version != version:
            return  # they changed it in place, which was seen
        if final is z or (z.shape == final.shape and torch.equal(z.detach(), final.detach())):
            del self._takers[key][takers:]  # what hooks look at goes nowhere
            self._note(key, final)
        elif id(final) not in self._shown:
            self._takers[key].append(_Taker("a forward hook", None, softmax=False))

    def show(self, key: str, z: Tensor) -> None:
        """Watch what becomes of a layer's output."""
        self._said[key] = z, z._version, len(self._takers.get(key, ()))
        self._note(key, z)

    def _note(self, key: str, z: Tensor) -> None:
        self._shown[id(z)] = (key, z)
        self._takers.setdefault(key, [])

    @_disable_dynamo  # one pass of a compiled model is watched as it is
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors([*args, *kwargs.values()]))
        given = [id(each) for each in tensors]
        taken = {place: self._shown[place] for place in given if place in self._shown}
        units = [self._activated[place] for place in given if place in self._activated]
        versions = {place: z._version for place, (_, z) in taken.items()}
        result = func(*args, **kwargs)
        name = canonical_name(func)
        self._note_weights(name, kwargs, tensors, result)
        if name in RESHAPING and args and id(args[0]) in taken:
            key = taken[id(args[0])][0]
            for part in _tensors(result if isinstance(result, tuple | list) else [result]):
                self._note(key, part)
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

    def _note_weights(self, name: str, kwargs: dict[str, Any], tensors: Sequence[Tensor], result: Any) -> None:
        """Note which parameters a function took outside the calls of their own module.

        What takes parameters alone, as a penalty on their size does, says nothing of their samples.
        """
        taken = [self._weights[id(each)][0] for each in tensors if id(each) in self._weights and each.requires_grad]
        outside = [layer for layer in taken if layer.module not in self._running]
        if not outside or not torch.is_grad_enabled():
            return
        parts = _tensors(result if isinstance(result, tuple | list) else [result])
        made = [each for each in parts if each.is_floating_point() and each.requires_grad and each.ndim]
        if not made:
            return
        if any(id(each) not in self._weights for each in tensors):
            for layer in outside:
                if not (isinstance(layer.module, nn.Linear) and _looks_up(name, kwargs)):
                    self.misused.setdefault(layer, name)
        else:
            self._weights.update({id(each): (outside[0], each) for each in made if id(each) not in self._weights})

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
        self._weights.clear()
        self._said.clear()


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


def _looks_up(name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether a function looks tokens up, and changes neither the weight nor the gradient in doing so."""
    return name == "embedding" and kwargs.get("max_norm") is None and not kwargs.get("scale_grad_by_freq")
