"""The operations on parameters inside the forward passes of their modules, on the steps that need them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from relfisher.layers import Call, Layer, LinearOperation, SpreadOperation
from relfisher.observe.activations import canonical_name
from relfisher.observe.computations import Computations, concerns
from relfisher.observe.hooks import Hook, apart
from relfisher.observe.products import Products
from relfisher.observe.roles import Role
from relfisher.observe.spreads import Spreads

__all__ = ["Operations", "is_inside"]

See = Callable[[Layer, Call, Tensor], None]


class Operations:
    """Observes the operations of layers that have an `operation`.

    Args:
        layers: the layers of each module.
        wanted: tells whether the calls of a module are needed.
        see: called with each layer, the call of its operation and the output.
        own_thread: as for `Hook`.
        hook: the class of the hooks.
    """

    def __init__(
        self,
        layers: Mapping[nn.Module, Sequence[Layer]],
        wanted: Callable[[nn.Module], bool],
        see: See,
        *,
        own_thread: bool = False,
        hook: type[Hook] = Hook,
    ) -> None:
        self._layers, self._wanted, self._see = layers, wanted, see
        self._own_thread, self._hook = own_thread, hook
        self._here = _Here()

    def watch(self, module: nn.Module) -> list[RemovableHandle]:
        """Hook a module; its calls are watched inside of a trace, which begins before and ends afterwards."""
        enter, leave = (self._hook(each, own_thread=self._own_thread) for each in (self._enter, self._leave))
        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True, prepend=True),
        ]

    def abandon(self) -> list[TorchFunctionMode]:
        """Forget the watches that an interrupt has left open, and return them."""
        opened, self._here.open = self._here.open, []
        return [watch for _, watch in opened if watch is not None]

    def missed(self) -> dict[Layer, Role]:
        """Return the layers whose modules ran since the last call, without an operation on their parameters."""
        watched, self._here.watched = self._here.watched, {}
        both, self._here.both = self._here.both, set()
        return {layer: _unseen_role(layer, is_both=layer in both) for layer, found in watched.items() if not found}

    def _enter(self, module: nn.Module, _: object) -> None:
        watch = None
        if torch.is_grad_enabled() and self._wanted(module):
            watch = _Watch(self._layers[module], self._found)
            self._pause(module, paused=True)
            self._here.watched = dict.fromkeys(self._layers[module], False) | self._here.watched
            watch.__enter__()  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        self._here.open.append((module, watch))

    def _found(self, layer: Layer, call: Call, z: Tensor) -> None:
        self._here.watched[layer] = True
        self._see(layer, call, z)

    def _leave(self, module: nn.Module, *_: object) -> None:
        if self._here.open and self._here.open[-1][0] is module:
            watch = self._here.open.pop()[1]
            if watch is not None:
                mixed = watch.finish() | _sharing(self._layers[module])
                self._here.watched.update(dict.fromkeys(mixed, False))
                self._here.both |= mixed & watch.looked_up
                watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above
                self._pause(module, paused=False)

    def _pause(self, module: nn.Module, *, paused: bool) -> None:
        """Pause the watch of a module that calls itself, or go on with it."""
        outer = next((watch for opened, watch in reversed(self._here.open) if opened is module and watch), None)
        if outer is not None:
            outer.paused = paused


class _Here(threading.local):
    """What runs in the present thread: modules with their watches, and which watched layers were found, and alike.

    Those of `both` were looked up and used in another way as well.
    """

    def __init__(self) -> None:
        self.open: list[tuple[nn.Module, _Watch | None]] = []
        self.watched: dict[Layer, bool] = {}
        self.both: set[Layer] = set()


class _Watch(TorchFunctionMode):
    """Finds the calls of layers' operations with their parameters."""

    def __init__(self, layers: Sequence[Layer], see: See) -> None:
        super().__init__()
        matrices = [layer for layer in layers if isinstance(layer, LinearOperation)]
        vectors = [layer for layer in layers if isinstance(layer, SpreadOperation)]
        self._layers = [layer for layer in layers if layer not in (*matrices, *vectors)]
        self._computations = Computations(layers[0].module)
        self._products = Products(matrices, self._computations, see)
        self._spreads = Spreads([*matrices, *vectors], self._computations, see)
        self._kept = (*self._computations.kept, *self._products.kept, *self._spreads.kept)
        self._see = see
        self._seen: set[Layer] = set()
        self._mixed: set[Layer] = set()
        self.paused = False

    @apart  # dynamo must not compile the watching
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or not (concerns(self._kept, args) or (kwargs and concerns(self._kept, kwargs.values()))):
            return func(*args, **kwargs)
        name = canonical_name(func)
        self._products.before(name, args, kwargs)
        self._spreads.before(func, name, args, kwargs)
        result = func(*args, **kwargs)
        self._computations.after(func, args, kwargs, result)
        with torch._C.DisableTorchFunction():  # what is done here is no use of a tensor
            if not (
                self._products.after(name, args, kwargs, result)
                or self._spreads.after(func, name, args, kwargs, result)
            ):
                used = self._computations.with_data(args, kwargs, result)
                self._products.note_use(used)
                self._spreads.note_use(used)
        for layer in [layer for layer in self._layers if layer.operation == name]:
            call, before = Call(args, kwargs, result), layer.parts
            if layer.is_of(call, self._computations.chart):
                if layer in self._seen and layer.parts != before:
                    self._mixed.add(layer)
                self._seen.add(layer)
                self._see(layer, call, result)
        return result

    def finish(self) -> set[Layer]:
        """See what the module returned; return the layers that it used in different ways."""
        self._products.finish()
        self._spreads.finish()
        return self._products.mixed | self._spreads.mixed | self._mixed

    @property
    def looked_up(self) -> set[Layer]:
        """The layers of which rows were looked up."""
        return self._spreads.lookups.layers


def _sharing(layers: Sequence[Layer]) -> set[Layer]:
    """Return the layers of a module that turned out to have a parameter in common."""
    owners: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.names if layer.settled else ():
            owners.setdefault(name, []).append(layer)
    return {layer for each in owners.values() if len(each) > 1 for layer in each}


def is_inside(layer: Layer, others: Iterable[Layer]) -> bool:
    """Return whether the weight of a layer is used to compute that of another one."""
    named = {layer.parts[0].attribute}
    return any(named < set(other.names) for other in others if other.module is layer.module)


def _unseen_role(layer: Layer, *, is_both: bool) -> Role:
    """Return the role of a layer whose module ran without its operation, or looked rows up in it and did more."""
    missing = f"pass it to {layer.operation}"
    if is_both:
        missing = "only look up its rows: use nn.Embedding, by which a function may multiply as well"
    elif isinstance(layer, LinearOperation | SpreadOperation):
        missing = "look up its rows, multiply inputs by it or add it to them, or not always in the same way"
    return Role(layer.own_response, refused=f"its module does not {missing}")
