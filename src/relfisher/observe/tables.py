"""Tables of embeddings by which functions outside of the embeddings multiply: heads that are tied to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from relfisher.layers import Call, EmbeddingLayer, Layer
from relfisher.observe.activations import canonical_name, looks_up
from relfisher.observe.computations import Computations, concerns
from relfisher.observe.hooks import apart
from relfisher.observe.products import Products
from relfisher.observe.trace import Trace

__all__ = ["Tables"]


class Tables(TorchFunctionMode):
    """Sees the products of inputs with tables during a pass, while active.

    Args:
        tables: the tables.
        see: called with each table that is a head, the call with its input, and the output.
        trace: the trace of the pass, if there is one.
        begin: called before with each table that turns out to be a head, to forget what it has looked up.
    """

    def __init__(
        self,
        tables: Iterable[EmbeddingLayer],
        see: Callable[[Layer, Call, Tensor], None],
        trace: Trace | None = None,
        begin: Callable[[Layer], None] | None = None,
    ) -> None:
        super().__init__()
        self._see, self._trace, self._begin = see, trace, begin
        self._watched = [_Watched(table, self._found) for table in tables]
        self._heads: set[Layer] = set()

    @apart  # dynamo must not compile the watching
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for each in self._watched:
            if concerns(each.kept, args) or (kwargs and concerns(each.kept, kwargs.values())):
                with torch._C.DisableTorchFunction():  # what is done here is no use of a tensor
                    each.after(func, args, kwargs, result)
        return result

    def finish(self) -> None:
        """Let a trace no longer refuse tables that are heads and nothing else; those that are both have no metric."""
        mixed = {each for watched in self._watched for each in watched.products.mixed}
        misused = {} if self._trace is None else self._trace.misused
        for head in self._heads:
            if head in mixed:
                misused.setdefault(head, "another function")
            else:
                misused.pop(head, None)

    def _found(self, table: Layer, call: Call, z: Tensor) -> None:
        x, given = call.args
        if self._trace is not None and self._begin is not None and table not in self._heads:
            self._trace.begin_again(table)
            self._begin(table)
        if self._trace is not None and x is given:
            self._trace.takers.follow(x, table)
        self._heads.add(table)
        self._see(table, call, z)


class _Watched:
    """A table, and what is computed from it.

    Args:
        table: the table.
        see: as above.

    Attributes:
        products: the products with it.
        kept: tensors by identity; functions that take none of them do not matter.
    """

    def __init__(self, table: EmbeddingLayer, see: Callable[[Layer, Call, Tensor], None]) -> None:
        self._computations = Computations(table.module)
        self.products = Products([table], self._computations, see)
        self.kept = (*self._computations.kept, *self.products.kept)

    def after(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what a function made of the table, or of what is computed from it."""
        name = canonical_name(func)
        if looks_up(name, kwargs):
            return
        self._computations.after(func, args, kwargs, result)
        if not self.products.after(name, args, kwargs, result):
            self.products.note_use(self._computations.with_data(args, kwargs, result))
