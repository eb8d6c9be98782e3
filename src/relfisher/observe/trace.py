"""Trace the data flow of one forward pass: which activation follows a layer, and which layer follows that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from relfisher.layers import Call, Layer
from relfisher.observe.activations import Responses, canonical_name, looks_up, response_of_module
from relfisher.observe.hooks import Hook, callers
from relfisher.observe.takers import Shown, Takers
from relfisher.observe.tensors import all_tensors, tensors_in
from relfisher.responses import UnitResponse
from relfisher.shards import sharding

__all__ = ["Trace"]


class Trace(TorchFunctionMode):
    """Records which functions take the registered pre-activations, while active, in the thread that started it.

    `show(layer, call, z)` registers a layer's output.

    Args:
        layers: layers whose weights are traced as well.
        root: the model; it is searched for modules that count as activations.
        running: True if the model's forward pass has already begun.
        inputs: the model's inputs.
        responses: responses by activation.

    Attributes:
        takers: the functions that take the outputs.
        hidden: layers that ran without gradients inside a function of autograd, such as that of activation
            checkpointing with `use_reentrant=True`, which runs them again for the gradients. They are registered, too.
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
        self.hidden: dict[Layer, None] = {}
        self.takers = Takers(responses or {}, lambda weight: self._weights.get(id(weight), (None,))[0])
        self._layers: dict[nn.Module, list[Layer]] = {}
        self._running: list[nn.Module] = [root] if running and root is not None else []
        self._handles: list[RemovableHandle] = []
        # Parameters, and tensors computed from parameters alone.
        self._weights: dict[int, tuple[Layer, Tensor]] = {}
        for layer in layers:
            self._layers.setdefault(layer.module, []).append(layer)
        for module in self._layers:
            self._find_weights(module)
        self._gathering = [] if root is None else sharding(root)
        self._activations: dict[nn.Module, UnitResponse] = {}
        for module in root.modules() if root is not None else ():
            response = response_of_module(module, responses or {})
            if response is not None and module not in self._layers:
                self._activations[module] = response
        # User-defined activations that are being called, and what they take.
        self._inside: list[tuple[nn.Module, Any]] = []
        # The outputs of unfinished calls, and their versions.
        self._unfinished: dict[Layer, tuple[Shown, int]] = {}
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
        for module in self._gathering:
            self._handles += self._hooked(module)
        for module in self._activations:
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(end, with_kwargs=True, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop tracing."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        if not any(raised):
            self.remove_hooks()

    def remove_hooks(self) -> None:
        """Remove the hooks, which an error leaves there: torch goes through them then, and they must not change."""
        while self._handles:
            self._handles.pop().remove()

    def _find_weights(self, module: nn.Module) -> None:
        """Register the current tensors of a module as its layers' parameters."""
        for layer in self._layers[module]:
            self._weights.update({id(parameter): (layer, parameter) for parameter in layer.parameters})

    def _hooked(self, module: nn.Module) -> list[RemovableHandle]:
        """Hook a module that gathers its parameters, before and after its own hook, which replaces tensors by others.

        The parameters are other ones during a pass, and so are the inputs that have gradients.

        Returns:
            The handles of the hooks.
        """
        given: list[list[Tensor]] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(list(all_tensors([args, kwargs])))
            self.takers.set_aside()

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for each in self._layers.keys() & set(module.modules()):
                self._find_weights(each)
            self.takers.take_back()
            with torch._C.DisableTorchFunction():
                for old, new in zip(given.pop(), all_tensors([args, kwargs]), strict=False):
                    if new is not old:
                        self._note_raw([old], new)
                        self.takers.pass_on(old, new)

        first, last = Hook(before, own_thread=True), Hook(after, own_thread=True)
        return [
            module.register_forward_pre_hook(first, with_kwargs=True, prepend=True),
            module.register_forward_pre_hook(last, with_kwargs=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module that has layers is called."""
        self._running.append(module)
        self._find_weights(module)
        if any(id(tensor) in self._raw for tensor in tensors_in([*args, *kwargs.values()])):
            self._reading.update(layer for layer in self._layers[module] if not layer.operation)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if module in self._running:
            del self._running[self._running.index(module) :]
        if output is not None and not torch.is_grad_enabled() and _is_hidden():
            self._show_hidden(module, output)
        for layer in self._layers[module]:
            shown, version = self._unfinished.pop(layer, (None, 0))
            final = None if shown is None or output is None else layer.output(output)
            if shown is not None and final is not None and shown.tensor._version == version:
                with torch._C.DisableTorchFunction():
                    self.takers.show_instead(shown, final)

    def _show_hidden(self, module: nn.Module, output: object) -> None:
        for layer in self._layers[module]:
            z = None if layer.operation else layer.output(output)
            if z is not None:
                self.hidden[layer] = None
                if layer.followed:
                    self.takers.show(layer, z)

    def _enter_activation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside.append((module, self.takers.before(tensors_in([*args, *kwargs.values()]))))
        self.takers.set_aside()

    def _leave_activation(self, module: nn.Module, args: object, kwargs: object, output: Any) -> None:
        if all(entered is not module for entered, _ in self._inside):
            return
        entered = None
        while entered is not module:  # those inside of it were left by an error
            entered, taken = self._inside.pop()
            self.takers.take_back()
        if isinstance(output, Tensor):
            self.takers.after_activation(type(module).__name__, self._activations[module], output, taken)

    def show(self, layer: Layer, call: Call, z: Tensor) -> None:
        """Register the output of a call of a layer."""
        if layer.operation and any(id(each) in self._raw for each in tensors_in(call.args)):
            self._reading.add(layer)
        shown = self.takers.show(layer, z)
        if not layer.operation:  # what a module returns may be something else
            self._unfinished[layer] = shown, z._version

    @_disable_dynamo  # dynamo must not compile the tracing
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in([*args, *kwargs.values()]))
        taken = self.takers.before(tensors)
        result = func(*args, **kwargs)
        self._note_weights(canonical_name(func), kwargs, tensors, result)
        self._note_raw(tensors, result)
        self.takers.after(func, args, kwargs, result, taken)
        return result

    def _note_weights(self, name: str, kwargs: Mapping[str, Any], tensors: Sequence[Tensor], result: Any) -> None:
        """Record which parameters a function took outside the calls of their own module.

        A function of parameters alone, such as a penalty on their size, is harmless.
        """
        taken = [self._weights[id(each)][0] for each in tensors if id(each) in self._weights and each.requires_grad]
        outside = [layer for layer in taken if layer.module not in self._running]
        if not outside or not torch.is_grad_enabled():
            return
        parts = all_tensors(result)
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
        if not any(raw):
            return
        if not torch.is_grad_enabled() and _is_hidden():  # nothing has a gradient there
            constant: Iterable[bool] = (False for _ in tensors)
        else:
            constant = (not each.requires_grad and not isinstance(each, nn.Parameter) for each in tensors)
        if all(is_raw or other for is_raw, other in zip(raw, constant, strict=True)):
            parts = all_tensors(result)
            self._raw.update({id(each): each for each in parts})

    def reads_input(self, layer: Layer) -> bool:
        """Return whether a layer read the model's inputs, or tensors computed from them without parameters."""
        return layer in self._reading

    def begin_again(self, layer: Layer) -> None:
        """Forget the calls of a layer, since it is another one than was thought."""
        self.takers.begin_again(layer)
        self._unfinished.pop(layer, None)
        self._reading.discard(layer)

    def forget(self) -> None:
        """Release the tensors."""
        self.takers.forget()
        self._weights.clear()
        self._unfinished.clear()
        self._raw.clear()
        self._inside.clear()


def _is_hidden() -> bool:
    """Return whether the forward pass of a function of autograd is running."""
    frames = ((frame, frame.f_code.co_varnames) for frame in callers())
    return any(names and isinstance(frame.f_locals.get(names[0]), FunctionCtx) for frame, names in frames)
