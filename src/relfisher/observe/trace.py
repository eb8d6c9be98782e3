"""Trace the data flow of one forward pass: which activation follows a layer, and which layer follows that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from relfisher.layers import Call, Layer, LinearLayer
from relfisher.observe.activations import (
    JOINING,
    RESHAPING,
    Responses,
    canonical_name,
    is_softmax_call,
    looks_up,
    response_of,
    response_of_module,
)
from relfisher.observe.hooks import Hook
from relfisher.responses import LinearGaussian, UnitResponse

__all__ = ["Trace", "tensors_in"]


# Attribute reads, functions that leave the graph, and those that take a shape alone do not consume a pre-activation.
_LOOKS = frozenset([
    *("get", "detach"),
    *(f"{name}_like" for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")),
    *(f"new_{name}" for name in ("empty", "full", "ones", "tensor", "zeros")),
])

# These keep units along the last axis, if its length is unchanged; dropout preserves their mean.
_CARRYING = frozenset("dropout contiguous clone to type float double half bfloat16 view reshape flatten".split())


class _Consumer(NamedTuple):
    """A function that took a pre-activation: its name, its response, and whether it is a softmax over the units."""

    name: str
    response: UnitResponse | None
    softmax: bool


@dataclass(eq=False)
class _Call:
    """A call of a layer: the functions that took its output, and the identity of the output before it is reshaped."""

    layer: Layer
    consumers: list[_Consumer] = field(default_factory=list)
    output: int = 0

    def units(self, z: Tensor) -> int | None:
        """Return the number of units along axis 1 of the output or a part of it; None if other things lie there."""
        axis = self.layer.unit_axis
        return self.layer.out if id(z) == self.output and axis is not None and axis % z.ndim == 1 else None


#: Tensors by their identity, and the calls that they are of.
_Watched = dict[int, tuple[_Call, Tensor]]


class Trace(TorchFunctionMode):
    """Records which functions take the registered pre-activations, while active, in the thread that started it.

    `show(layer, z)` registers a layer's output. If a single activation is all that takes z, it determines the layer's
    response. The response is linear if z also goes elsewhere, if nothing takes it (the model's output), or if the
    function is not known.

    Args:
        layers: layers whose weights are traced as well.
        root: the model; it is searched for modules that count as activations.
        running: True if the model's forward pass has already begun.
        inputs: the model's inputs.
        responses: responses by activation.

    Attributes:
        misused: layers whose parameters were used with data outside the calls of their module, mapped to the name of
            the function, such as an embedding that also scores the outputs. Looking tokens up in the weight of a
            linear layer is allowed; see `discover`.
    """

    def __init__(
        self,
        layers: Iterable[Layer] = (),
        root: nn.Module | None = None,
        *,
        running: bool = False,
        inputs: Iterable[Any] = (),
        responses: Responses | None = None,
    ) -> None:
        super().__init__()
        self.misused: dict[Layer, str] = {}
        self._responses = responses or {}
        self._layers: dict[nn.Module, list[Layer]] = {}
        self._running: list[nn.Module] = [root] if running and root is not None else []
        self._handles: list[RemovableHandle] = []
        # Parameters, and tensors computed from parameters alone.
        self._weights: dict[int, tuple[Layer, Tensor]] = {}
        for layer in layers:
            self._layers.setdefault(layer.module, []).append(layer)
        for module in self._layers:
            self._find_weights(module)
        self._activations: dict[nn.Module, UnitResponse] = {}
        for module in root.modules() if root is not None else ():
            response = response_of_module(module, self._responses)
            if response is not None and module not in self._layers:
                self._activations[module] = response
        # User-defined activations that are being called, the versions of their inputs, and what was watched before:
        # what happens inside does not count as a consumer of it.
        self._inside: list[tuple[nn.Module, dict[int, int], _Watched, _Watched]] = []
        # Unfinished calls, their outputs and the versions of these.
        self._shown_calls: dict[Layer, tuple[_Call, Tensor, int]] = {}
        self._shown: _Watched = {}
        self._calls: dict[Layer, list[_Call]] = {}
        self._activated: _Watched = {}
        # The linear layer of each function that took a layer's activated units; None for any other function.
        self._followers: dict[Layer, list[Layer | None]] = {}
        # The model's inputs, and tensors computed from them without parameters.
        self._raw: dict[int, Tensor] = {id(tensor): tensor for tensor in tensors_in(inputs)}
        self._reading: set[Layer] = set()

    def __enter__(self) -> Trace:
        """Start tracing."""
        enter, leave = Hook(self.enter, own_thread=True), Hook(self._leave, own_thread=True)
        begin, end = Hook(self._enter_activation, own_thread=True), Hook(self._leave_activation, own_thread=True)
        for module in self._layers:
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        for module in self._activations:
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(end, with_kwargs=True, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop tracing."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        while self._handles:
            self._handles.pop().remove()

    def _find_weights(self, module: nn.Module) -> None:
        """Register the current tensors of a module as its layers' parameters."""
        for layer in self._layers[module]:
            self._weights.update({id(parameter): (layer, parameter) for parameter in layer.parameters})

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module that has layers is called."""
        self._running.append(module)
        self._find_weights(module)
        if any(id(tensor) in self._raw for tensor in tensors_in([*args, *kwargs.values()])):
            self._reading.update(layer for layer in self._layers[module] if not layer.operation)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if module in self._running:
            del self._running[self._running.index(module) :]
        for layer in self._layers[module]:
            shown = self._shown_calls.pop(layer, None)
            final = None if shown is None or output is None else layer.output(output)
            if shown is not None and final is not None:
                with torch._C.DisableTorchFunction():
                    self._replace(*shown, final)

    def _enter_activation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = tensors_in([*args, *kwargs.values()])
        versions = {id(z): z._version for z in tensors if id(z) in self._shown}
        self._inside.append((module, versions, self._shown, self._activated))
        self._shown, self._activated = {}, {}

    def _leave_activation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        places = [place for place, entered in enumerate(self._inside) if entered[0] is module]
        if not places:
            return
        _, versions, shown, activated = self._inside[places[-1]]
        del self._inside[places[-1] :]
        self._shown, self._activated = {**self._shown, **shown}, {**self._activated, **activated}
        if not isinstance(output, Tensor):
            return
        for tensor in list(tensors_in([*args, *kwargs.values()])):
            if id(tensor) in activated:
                self._followers.setdefault(activated[id(tensor)][0].layer, []).append(None)
            if id(tensor) in versions:
                call = shown[id(tensor)][0]
                response = self._activations[module]
                call.consumers.append(_Consumer(type(module).__name__, response, softmax=False))
                if output is tensor or tensor._version != versions[id(tensor)]:  # it stands where z was
                    self._shown.pop(id(tensor), None)
                self._activated[id(output)] = (call, output)

    def _replace(self, call: _Call, z: Tensor, version: int, final: Tensor) -> None:
        """Continue with the output after other hooks: the same values, maybe in another tensor, or different ones."""
        if z._version != version:
            return  # changed in place, which the trace has seen
        if final is z or (z.shape == final.shape and torch.equal(z.detach(), final.detach())):
            call.consumers.clear()  # uses inside hooks do not count
            call.output = id(final)
            self._shown[id(final)] = (call, final)
        elif id(final) not in self._shown:
            call.consumers.append(_Consumer("a forward hook", None, softmax=False))

    def show(self, layer: Layer, call: Call, z: Tensor) -> None:
        """Register the output of a call of a layer."""
        if layer.operation and any(id(each) in self._raw for each in tensors_in(call.args)):
            self._reading.add(layer)
        shown = _Call(layer, output=id(z))
        self._calls.setdefault(layer, []).append(shown)
        if not layer.operation:  # what a module returns may be something else
            self._shown_calls[layer] = shown, z, z._version
        self._shown[id(z)] = (shown, z)

    @_disable_dynamo  # dynamo must not compile the tracing
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in([*args, *kwargs.values()]))
        given = [id(each) for each in tensors]
        taken = {place: self._shown[place] for place in given if place in self._shown}
        units = [self._activated[place] for place in given if place in self._activated]
        versions = {place: z._version for place, (_, z) in taken.items()}
        result = func(*args, **kwargs)
        name = canonical_name(func)
        self._note_weights(name, kwargs, tensors, result)
        self._note_raw(tensors, result)
        if name in RESHAPING and args and id(args[0]) in taken:
            call = taken[id(args[0])][0]
            for part in tensors_in(result if isinstance(result, tuple | list) else [result]):
                self._shown[id(part)] = (call, part)
        elif name not in _LOOKS and any(leaf.is_floating_point() for leaf in tensors_in([result])):
            for place, (call, z) in taken.items():
                in_place = z._version != versions[place]
                if result is z and not in_place:
                    continue  # a cast to the dtype that it already has
                first = bool(args) and args[0] is z
                response = response_of(func, args, kwargs, self._responses, call.units(z)) if first else None
                call.consumers.append(_Consumer(name, response, is_softmax_call(name, z, args, kwargs)))
                if in_place:  # the pre-activation was overwritten by the activation
                    del self._shown[place]
                if response is not None:
                    self._activated[id(result)] = (call, result)
            for call, activated in units:
                self._follow(call, activated, name, args, result)
        return result

    def _note_weights(self, name: str, kwargs: Mapping[str, Any], tensors: Sequence[Tensor], result: Any) -> None:
        """Record which parameters a function took outside the calls of their own module.

        A function of parameters alone, such as a penalty on their size, is harmless.
        """
        taken = [self._weights[id(each)][0] for each in tensors if id(each) in self._weights and each.requires_grad]
        outside = [layer for layer in taken if layer.module not in self._running]
        if not outside or not torch.is_grad_enabled():
            return
        parts = tensors_in(result if isinstance(result, tuple | list) else [result])
        made = [each for each in parts if each.is_floating_point() and each.requires_grad and each.ndim]
        if not made:
            return
        if any(id(each) not in self._weights for each in tensors):
            for layer in outside:
                if not (isinstance(layer.module, nn.Linear) and looks_up(name, kwargs)):
                    self.misused.setdefault(layer, name)
        else:
            self._weights.update({id(each): (outside[0], each) for each in made if id(each) not in self._weights})

    def _note_raw(self, tensors: Sequence[Tensor], result: Any) -> None:
        """Record tensors that are computed from the model's inputs and constants, without parameters."""
        raw = [id(each) in self._raw for each in tensors]
        constant = (not each.requires_grad and not isinstance(each, nn.Parameter) for each in tensors)
        if any(raw) and all(is_raw or other for is_raw, other in zip(raw, constant, strict=True)):
            parts = tensors_in(result if isinstance(result, tuple | list) else [result])
            self._raw.update({id(each): each for each in parts})

    def _follow(self, call: _Call, activated: Tensor, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Record the function that takes the activated units of a layer."""
        if name in _CARRYING and isinstance(result, Tensor) and result.shape[-1:] == activated.shape[-1:]:
            self._activated[id(result)] = (call, result)
        else:
            linear = name == "linear" and len(args) > 1 and args[0] is activated
            follower = self._weights.get(id(args[1]), (None,))[0] if linear else None
            self._followers.setdefault(call.layer, []).append(follower if isinstance(follower, LinearLayer) else None)

    def response(self, layer: Layer) -> UnitResponse:
        """Return the response of a registered layer."""
        return _only(self._consumers(layer)) or LinearGaussian()

    def responses(self, layer: Layer) -> list[UnitResponse]:
        """Return the response of each call of a registered layer."""
        return [_only(call.consumers) or LinearGaussian() for call in self._calls.get(layer, [])]

    def _consumers(self, layer: Layer) -> list[_Consumer]:
        return [consumer for call in self._calls.get(layer, []) for consumer in call.consumers]

    def unresolved(self, layer: Layer) -> list[str]:
        """Return the functions that took a layer's output and are neither activations nor listed in `JOINING`."""
        consumers = self._consumers(layer)
        return sorted({each.name for each in consumers if not each.response and each.name not in JOINING})

    def following(self, layer: Layer) -> Layer | None:
        """Return the linear layer that takes a layer's activated units, if nothing else does."""
        if _only(self._consumers(layer)) is None:
            return None
        followers = set(self._followers.get(layer, []))
        return followers.pop() if len(followers) == 1 else None

    def is_output(self, layer: Layer) -> bool:
        """Return whether no function took a layer's output."""
        return layer in self._calls and not self._consumers(layer)

    def is_softmax(self, layer: Layer) -> bool:
        """Return whether a layer's outputs went into a softmax over its units, and nowhere else."""
        consumers = self._consumers(layer)
        return bool(consumers) and all(consumer.softmax for consumer in consumers)

    def reads_input(self, layer: Layer) -> bool:
        """Return whether a layer read the model's inputs, or tensors computed from them without parameters."""
        return layer in self._reading

    def forget(self) -> None:
        """Release the tensors."""
        self._shown.clear()
        self._activated.clear()
        self._weights.clear()
        self._shown_calls.clear()
        self._raw.clear()
        self._inside.clear()


def _only(consumers: Sequence[_Consumer]) -> UnitResponse | None:
    """Return the response that all consumers make; None if they differ."""
    found = [consumer.response for consumer in consumers]
    return found[0] if found and all(each == found[0] for each in found) else None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the values, including those inside lists and tuples, one level deep."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))
