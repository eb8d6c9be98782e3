"""The tensors among the arguments or results of a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["all_tensors", "tensors_in"]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the values, including those inside lists and tuples, one level deep."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def all_tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among the values, however deep they are in lists, tuples and dictionaries."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from all_tensors(value)
