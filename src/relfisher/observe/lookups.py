"""Rows that are looked up in a matrix, by `embedding`, an index or `index_select`, as in the table of an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Call, Layer, settle_as_table
from relfisher.observe.activations import looks_up

__all__ = ["Lookup", "Lookups", "lookup"]

See = Callable[[Layer, Call, Tensor], None]

_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class Lookup(NamedTuple):
    """Rows of a matrix.

    Attributes:
        table: the matrix [tokens, units].
        tokens: their places in it, [*].
        padding_idx: the place that stands for no token; None if there is none.
        z: the rows [*, units].
    """

    table: Tensor
    tokens: Tensor
    padding_idx: int | None
    z: Tensor


def lookup(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Lookup | None:
    """Return which rows a function has looked up; None if it did something else, or changed the matrix.

    Args:
        name: the canonical name of the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: the result.
    """
    padding_idx = None
    match name, args:
        case "embedding", _:
            given = {**dict(zip(_EMBEDDING, args, strict=False)), **kwargs}
            tokens, table, padding_idx = given.get("input"), given.get("weight"), given.get("padding_idx")
            if not looks_up(name, given):
                return None
        case "getitem", (Tensor() as table, Tensor() as tokens):
            pass
        case "index_select", (Tensor() as table, 0, Tensor() as tokens) if not kwargs:
            pass
        case _:
            return None
    if not (isinstance(table, Tensor) and isinstance(tokens, Tensor)) or table.ndim != 2:
        return None
    if tokens.dtype not in (torch.int64, torch.int32):
        return None
    return Lookup(table, tokens, padding_idx and padding_idx % len(table), result)


class Lookups:
    """The lookups of rows inside of one call of a module.

    Args:
        see: called with each layer, the call with the tokens, and a tensor that holds the rows.

    Attributes:
        layers: the layers that were looked up.
        mixed: those of them that have another form.
    """

    def __init__(self, see: See) -> None:
        self._see = see
        self._seen: dict[int, Tensor] = {}
        self.layers: set[Layer] = set()
        self.mixed: set[Layer] = set()

    def has(self, found: Lookup | None) -> bool:
        """Return whether a lookup was seen."""
        return found is not None and id(found.z) in self._seen

    def see(self, layer: Layer, found: Lookup, rows: Tensor) -> None:
        """See the rows of a layer, which may have been reshaped, unless they were seen."""
        if self.has(found):
            return
        self._seen[id(found.z)] = found.z
        self.layers.add(layer)
        if settle_as_table(layer):
            self._see(layer, Call((found.tokens,), {"padding_idx": found.padding_idx}, found.z), rows)
        else:
            self.mixed.add(layer)
