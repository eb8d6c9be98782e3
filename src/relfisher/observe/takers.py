"""The functions that take pre-activations: which activation they are, and where its units go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.observe.activations import (
    JOINING,
    RESHAPING,
    ROUGH,
    Responses,
    canonical_name,
    is_softmax_call,
    response_of,
)
from relfisher.observe.chains import AFFINE, Chain, Start, continued
from relfisher.observe.tensors import all_tensors, tensors_in
from relfisher.responses import ActivationGaussian, LinearGaussian, UnitResponse

__all__ = ["Shown", "Takers"]

# Attribute reads, functions that leave the graph, and those that take a shape alone do not consume a pre-activation.
_LOOKS = frozenset([
    *("get", "detach"),
    *(f"{name}_like" for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")),
    *(f"new_{name}" for name in ("empty", "full", "ones", "tensor", "zeros")),
])

# These keep units along the last axis, if its length is unchanged; dropout preserves their mean. The full backward
# hooks of a module view its inputs and outputs as themselves.
_CARRYING = frozenset(
    "dropout contiguous clone to type float double half bfloat16 view view_as reshape reshape_as flatten".split()
)


@dataclass(eq=False)
class Consumer:
    """A function that took a pre-activation: its name, its response, and whether it is a softmax over the units.

    It is `final` once something took what it returned, other than a pointwise function that continues it. It is
    `carrying` if it returned the units, scaled by constants or put beside others, so that their gradients are like
    those of what it returned.
    """

    name: str
    response: UnitResponse | None
    softmax: bool = False
    final: bool = False
    carrying: bool = False


@dataclass(eq=False)
class _Call:
    """A call of a layer: the functions that took its output, and the identity of the output before it is reshaped."""

    layer: Layer
    consumers: list[Consumer] = field(default_factory=list)
    output: int = 0

    def units(self, z: Tensor) -> int | None:
        """Return the number of units along axis 1 of the output or a part of it; None if other things lie there."""
        axis = self.layer.unit_axis
        return self.layer.out if id(z) == self.output and axis is not None and axis % z.ndim == 1 else None


@dataclass(eq=False)
class Shown:
    """A pre-activation, or a pointwise function of it.

    Args:
        call: the call that it is of.
        tensor: its values.
        layout: the identity of a tensor whose entries lie in the same order.
        chain: the function.
        consumer: the function as one that took the pre-activation; None for the pre-activation itself.
        known: the response, if an activation took the pre-activation itself and was only scaled since.
    """

    call: _Call
    tensor: Tensor
    layout: int
    chain: Start | Chain = field(default_factory=Start)
    consumer: Consumer | None = None
    known: UnitResponse | None = None

    def go_on(self) -> None:
        """Note that another pointwise function continues it."""
        if self.consumer in self.call.consumers and not self.consumer.final:
            self.call.consumers.remove(self.consumer)

    def end(self, by: Consumer) -> None:
        """Note the function that takes it, other than to continue it."""
        if self.consumer is None:
            self.call.consumers.append(by)
            return
        self.consumer.final = True
        if by.name in ROUGH:
            self.consumer.response = None
        if self.consumer not in self.call.consumers:
            self.call.consumers.append(self.consumer)


class _Before(NamedTuple):
    """What a function is about to take: shown tensors with their versions, and activated units."""

    shown: dict[int, Shown]
    versions: dict[int, int]
    units: list[tuple[_Call, Tensor]]
    carried: list[Consumer]


class Takers:
    """Records the functions that take pre-activations.

    If a single activation is all that takes a layer's output, it determines the layer's response. A chain of pointwise
    functions and constants is one activation. The response is linear if the output also goes elsewhere, if nothing
    takes it (the model's output), or if the function is not known.

    Args:
        responses: responses by activation.
        layer_of: returns the layer that has a weight.
    """

    def __init__(self, responses: Responses, layer_of: Callable[[Tensor], Layer | None]) -> None:
        self._responses, self._layer_of = responses, layer_of
        self._shown: dict[int, Shown] = {}
        self._calls: dict[Layer, list[_Call]] = {}
        self._activated: dict[int, tuple[_Call, Tensor]] = {}
        # What functions returned that carry units, and these functions.
        self._carried: dict[int, tuple[list[Consumer], Tensor]] = {}
        # The layer of the weight of each linear function that took a layer's activated units; None for other functions.
        self._followers: dict[Layer, list[Layer | None]] = {}
        self._aside: list[tuple[dict[int, Shown], dict[int, tuple[_Call, Tensor]]]] = []

    def show(self, layer: Layer, z: Tensor) -> Shown:
        """Register the output of a call of a layer."""
        shown = Shown(_Call(layer, output=id(z)), z, id(z))
        self._calls.setdefault(layer, []).append(shown.call)
        self._shown[id(z)] = shown
        return shown

    def show_instead(self, shown: Shown, final: Tensor) -> None:
        """Continue with an output after other hooks: the same values, maybe in another tensor, or different ones."""
        z, call = shown.tensor, shown.call
        if final is z or (z.shape == final.shape and torch.equal(z.detach(), final.detach())):
            call.consumers.clear()  # uses inside hooks do not count
            call.output = id(final)
            self._shown[id(final)] = replace(shown, tensor=final, layout=id(final))
        elif id(final) not in self._shown:
            call.consumers.append(Consumer("a forward hook", None))

    def pass_on(self, old: Tensor, new: Tensor) -> None:
        """Continue with an input that hooks put in the place of another: the same values, or different ones."""
        taken = self.before([old])
        if old.shape == new.shape and torch.equal(old.detach().to(new.dtype), new.detach()):
            self.after(Tensor.clone, (old,), {}, new, taken)
            return
        for shown in taken.shown.values():
            shown.end(Consumer("a forward hook", None))
        for call, _ in taken.units:
            self._followers.setdefault(call.layer, []).append(None)

    def set_aside(self) -> None:
        """Take nothing until `take_back`: what happens inside of an activation of users does not count."""
        self._aside.append((self._shown, self._activated))
        self._shown, self._activated = {}, {}

    def take_back(self) -> None:
        """Go on with what was set aside last."""
        shown, activated = self._aside.pop()
        self._shown, self._activated = {**self._shown, **shown}, {**self._activated, **activated}

    def before(self, tensors: Iterable[Tensor]) -> _Before:
        """Note what a function is about to take."""
        places = [id(each) for each in tensors]
        shown = {place: self._shown[place] for place in places if place in self._shown}
        versions = {place: each.tensor._version for place, each in shown.items()}
        units = [self._activated[place] for place in places if place in self._activated]
        carried = [own for place in places if place in self._carried for own in self._carried[place][0]]
        return _Before(shown, versions, units, carried)

    def after(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, taken: _Before
    ) -> None:
        """Note what a function of torch made of what it took."""
        name = canonical_name(func)
        self._carry(name, args, result, taken)
        if name in RESHAPING and args and id(args[0]) in taken.shown:
            given = taken.shown[id(args[0])]
            for part in all_tensors(result):
                kept = name in _CARRYING and part.shape == given.tensor.shape
                self._shown[id(part)] = replace(given, tensor=part, layout=given.layout if kept else id(part))
        elif name in _LOOKS or not any(leaf.is_floating_point() for leaf in tensors_in([result])):
            return
        else:
            if self._continue(func, args, kwargs, result, list(taken.shown.values())):
                return
            for place, given in taken.shown.items():
                z, first = given.tensor, bool(args) and args[0] is given.tensor
                if z._version != taken.versions[place]:  # the pre-activation was overwritten by the activation
                    del self._shown[place]
                elif result is z:
                    continue  # a cast to the dtype that it already has
                units = given.call.units(z)
                response = response_of(func, args, kwargs, self._responses, units) if first else None
                softmax, carries = is_softmax_call(name, z, args, kwargs), _carries(name, args)
                consumer = Consumer(name, response, softmax, carrying=carries)
                self._end(given, consumer, result)
                if carries and given.consumer is None:
                    self._carried.setdefault(id(result), ([], result))[0].append(consumer)
        for call, activated in taken.units:
            self._follow(call, activated, name, args, result)

    def _carry(self, name: str, args: tuple[Any, ...], result: Any, taken: _Before) -> None:
        """Note what became of units that functions carry."""
        parts = list(all_tensors(result))
        if name in _LOOKS or not taken.carried or not any(part.is_floating_point() for part in parts):
            return
        if name in RESHAPING or _carries(name, args):
            self._carried.update({id(part): (list(taken.carried), part) for part in parts})
        else:
            for consumer in taken.carried:
                consumer.final = True

    def after_activation(self, name: str, response: UnitResponse, result: Tensor, taken: _Before) -> None:
        """Note what an activation of users made of what it took."""
        for call, _ in taken.units:
            self._followers.setdefault(call.layer, []).append(None)
        for place, given in taken.shown.items():
            if result is given.tensor or given.tensor._version != taken.versions[place]:  # it stands where z was
                self._shown.pop(place, None)
            self._end(given, Consumer(name, response), result)

    def _end(self, given: Shown, consumer: Consumer, result: Any) -> None:
        given.end(consumer)
        if given.consumer is None and consumer.response is not None:
            self._activated[id(result)] = (given.call, result)

    def _continue(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        taken: Sequence[Shown],
    ) -> bool:
        """Register a pointwise function of one pre-activation; return False if the call is none."""
        if not taken or len({(each.call, each.layout) for each in taken}) > 1:
            return False
        chain = continued(func, args, kwargs, {id(each.tensor): each.chain for each in taken})
        if chain is None:
            return False
        first = taken[0]
        scaled = first.known if chain.is_scaling else None
        direct = None
        if isinstance(first.chain, Start) and len(taken) == 1 and args[0] is first.tensor:
            direct = response_of(func, args, kwargs, self._responses, first.call.units(first.tensor))
        response = scaled or direct or (ActivationGaussian(chain) if chain.is_activation else None)
        for each in taken:
            each.go_on()
        consumer = Consumer(canonical_name(func), response, carrying=chain.is_affine)
        first.call.consumers.append(consumer)
        self._shown[id(result)] = Shown(first.call, result, first.layout, chain, consumer, scaled or direct)
        if scaled is not None:
            self._followers.setdefault(first.call.layer, []).append(None)
        elif response is not None:
            self._activated[id(result)] = (first.call, result)
        return True

    def _follow(self, call: _Call, activated: Tensor, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Record the function that takes the activated units of a layer."""
        if name in _CARRYING and isinstance(result, Tensor) and result.shape[-1:] == activated.shape[-1:]:
            self._activated[id(result)] = (call, result)
        else:
            linear = name == "linear" and len(args) > 1 and args[0] is activated
            self._followers.setdefault(call.layer, []).append(self._layer_of(args[1]) if linear else None)

    def follow(self, units: Tensor, layer: Layer) -> None:
        """Note that the last function that took the activated units of a layer was a product with another layer."""
        if id(units) in self._activated:
            self._followers[self._activated[id(units)][0].layer][-1] = layer

    def response(self, layer: Layer) -> UnitResponse:
        """Return the response of a registered layer."""
        return _only(self._consumers(layer)) or LinearGaussian()

    def responses(self, layer: Layer) -> list[UnitResponse]:
        """Return the response of each call of a registered layer."""
        return [_only(call.consumers) or LinearGaussian() for call in self._calls.get(layer, [])]

    def unresolved(self, layer: Layer) -> list[str]:
        """Return the functions that took a layer's output and are neither activations nor listed in `JOINING`."""
        consumers = self._consumers(layer)
        return sorted({each.name for each in consumers if not each.response and each.name not in JOINING})

    def following(self, layer: Layer) -> Layer | None:
        """Return the linear layer that takes a layer's activated units, if nothing else does."""
        if _only(self._consumers(layer)) is None:
            return None
        followers = set(self._followers.get(layer, []))
        only = followers.pop() if len(followers) == 1 else None
        return only if only is not None and only.is_linear else None

    def is_output(self, layer: Layer) -> bool:
        """Return whether no function took a layer's output, other than to carry it to the end."""
        return layer in self._calls and all(each.carrying and not each.final for each in self._consumers(layer))

    def is_softmax(self, layer: Layer) -> bool:
        """Return whether a layer's outputs went into a softmax over its units, and nowhere else."""
        consumers = self._consumers(layer)
        return bool(consumers) and all(consumer.softmax for consumer in consumers)

    def begin_again(self, layer: Layer) -> None:
        """Forget the calls of a layer."""
        self._calls.pop(layer, None)
        self._followers.pop(layer, None)
        self._shown = {place: each for place, each in self._shown.items() if each.call.layer is not layer}
        self._activated = {place: each for place, each in self._activated.items() if each[0].layer is not layer}

    def forget(self) -> None:
        """Release the tensors."""
        self._shown.clear()
        self._activated.clear()
        self._carried.clear()
        self._aside.clear()

    def _consumers(self, layer: Layer) -> list[Consumer]:
        return [consumer for call in self._calls.get(layer, []) for consumer in call.consumers]


def _carries(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether a function puts tensors beside each other, or scales and shifts one by constants or parameters."""
    if name in AFFINE:
        return sum(each.grad_fn is not None for each in tensors_in(args)) == 1
    return name in ("cat", "stack")


def _only(consumers: Sequence[Consumer]) -> UnitResponse | None:
    """Return the response that all consumers make; None if they differ."""
    found = [consumer.response for consumer in consumers]
    return found[0] if found and all(each == found[0] for each in found) else None
