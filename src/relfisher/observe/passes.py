"""The forward pass of a thread: each thread has one of its own, so that none observes what another does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from relfisher.layers import Call, EmbeddingLayer, Layer
from relfisher.observe.activations import Responses
from relfisher.observe.hooks import callers
from relfisher.observe.tables import Tables
from relfisher.observe.trace import Trace

__all__ = ["Pass", "counts", "is_computed", "is_recomputed"]


class Pass(threading.local):
    """The forward pass of the model that runs in the present thread.

    Attributes:
        model: the model; None outside of its own forward pass.
        inputs: its inputs.
        trace: its trace; None if it is not traced.
        tables: the watch of tables; None if none are watched.
        ran: the layers that ran in the traced pass, in order.
        random_states: the states of the generators before calls whose random numbers will be replayed.
        mask: the positions that count; None for all.
        masking: for each call inside `masked`, whether the mask was applied.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.inputs: list[Any] = []
        self.trace: Trace | None = None
        self.tables: Tables | None = None
        self.ran: dict[Layer, None] = {}
        self.random_states: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self.mask: Tensor | None = None
        self.masking: list[bool] = []
        self._stance: AbstractContextManager[None] | None = None  # of the compiler
        self._failed: Trace | None = None  # the trace that ended by an error, whose hooks are still there

    def start_trace(self, layers: Iterable[Layer], responses: Responses) -> Trace | None:
        """Start the trace of the pass; return None if it is traced already, is for evaluation, or there is no pass."""
        if self.model is None or self.trace is not None or not torch.is_grad_enabled():
            return None
        if self._failed is not None:
            self._failed.remove_hooks()
            self._failed = None
        self.trace = Trace(layers, self.model, running=True, inputs=self.inputs, responses=responses)
        return self.trace.__enter__()

    def start_tables(
        self,
        tables: Sequence[EmbeddingLayer],
        see: Callable[[Layer, Call, Tensor], None],
        begin: Callable[[Layer], None],
    ) -> None:
        """Watch tables until the pass ends, unless some are watched."""
        if tables and self.tables is None:
            self.tables = Tables(tables, see, self.trace, begin)
            self.tables.__enter__()  # type: ignore[no-untyped-call]  # torch's mode is not annotated

    def run_eagerly(self) -> None:
        """Let a compiled model run without its compiled form until the pass ends."""
        self._stance = torch.compiler.set_stance("force_eager")

    def is_inside(self, entered: nn.Module, abandon: Callable[[], list[TorchFunctionMode]]) -> bool:
        """Return whether a pass goes on when a module is entered; end one that was left by an interrupt.

        Args:
            entered: the module, whose own call does not count.
            abandon: returns the modes of others that the interrupt has left.
        """
        if self.model is None:
            return False
        calls = sum(frame.f_code is _CALL and frame.f_locals.get("self") is self.model for frame in callers())
        if calls > int(entered is self.model):
            return True
        stale: list[TorchFunctionMode | None] = [*abandon(), self.tables, self.trace]
        self.end(KeyboardInterrupt())
        _take_off(stale)
        return False

    def end(self, error: BaseException | None = None) -> tuple[Trace | None, list[Layer]]:
        """End the pass, maybe by an error; return its trace, without tensors, and the layers that ran in it."""
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        trace, ran = self.trace, list(self.ran)
        tables = self.tables
        self.model, self.inputs, self.trace, self.tables, self.ran = None, [], None, None, {}
        if tables is not None:
            tables.finish()
            tables.__exit__(None, error, None)  # type: ignore[no-untyped-call]  # torch's mode is not annotated
        if trace is not None:
            trace.__exit__(None, error, None)
            trace.forget()
            self._failed = trace if error is not None else None
        return trace, ran


_CALL = nn.Module._call_impl.__code__


def _take_off(stale: Collection[TorchFunctionMode | None]) -> None:
    """Take modes off the stack, and keep all others in their order."""
    count = _len_torch_function_stack()
    kept = [_pop_mode() for _ in range(count)]  # type: ignore[no-untyped-call]  # torch has no types here
    for mode in reversed(kept):
        if mode not in stale:
            _push_mode(mode)  # type: ignore[no-untyped-call]  # as above


def counts(layer: Layer, z: Tensor) -> bool:
    """Return whether gradients can flow back through this output, outside of torch.func transforms."""
    if not z.requires_grad or not any(parameter.requires_grad for parameter in layer.parameters):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(z)


def is_recomputed() -> bool:
    """Return whether a backward pass is running: what is called in it was called before."""
    return torch._C._current_graph_task_id() != -1


def is_computed(given: Tensor) -> bool:
    """Return whether the input of a part was computed; in a backward pass, the graph before it is cut off."""
    return given.grad_fn is not None or (given.requires_grad and is_recomputed())
