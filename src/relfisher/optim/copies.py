"""Copies of a linear layer's weights for each row, so that one backward pass gives the derivatives of every row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["Copies", "as_matrix", "as_parts", "has_metric", "row_copies", "trained_parts"]


class Copies(NamedTuple):
    """The copies [rows, out, d] of a layer's parameters in one call, and the root of the rows that each stands for."""

    layer: nn.Linear
    parameters: Tensor
    weight: float


def has_metric(layer: nn.Linear) -> bool:
    """Return whether the weight of a linear layer is trained, and neither it nor the bias is computed from others."""
    own = layer._parameters
    return "weight" in own and "bias" in own and layer.weight.requires_grad


def trained_parts(layer: nn.Linear) -> list[Tensor]:
    """Return the trained parameters of a linear layer, the weight first."""
    return [part for part in (layer.weight, layer.bias) if part is not None and part.requires_grad]


def as_matrix(parts: Sequence[Tensor]) -> Tensor:
    """Return a weight [out, in] and its bias, if there is one, as [out, d]; any other parameter as it is."""
    return torch.cat([parts[0], parts[1][:, None]], 1) if len(parts) > 1 else parts[0]


def as_parts(matrix: Tensor, block: Sequence[Tensor]) -> list[Tensor]:
    """Return what `as_matrix` joined."""
    return [matrix[:, :-1], matrix[:, -1]] if len(block) > 1 else [matrix]


@contextmanager
def row_copies(layers: Sequence[nn.Linear], samples: int, generator: torch.Generator) -> Iterator[list[Copies]]:
    """Let some rows of each call of the layers use copies of the layer's parameters.

    Yields:
        A list that fills with the copies of each call.
    """
    made: list[Copies] = []

    def spread(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear)
        rows = (inputs[0] if inputs else named["input"]).flatten(0, -2)
        chosen = torch.randperm(len(rows), generator=generator)[:samples].to(rows.device)
        with_bias = len(trained_parts(layer)) > 1
        copies = as_matrix([part.detach() for part in trained_parts(layer)]).expand(len(chosen), -1, -1).clone()
        copies.requires_grad_()
        made.append(Copies(layer, copies, math.sqrt(len(rows) / len(chosen))))
        picked = rows[chosen]
        if with_bias:
            picked = torch.cat([picked, picked.new_ones(len(picked), 1)], 1)
        values = (copies @ picked[:, :, None])[:, :, 0]
        if not with_bias and layer.bias is not None:
            values = values + layer.bias.detach()
        if len(chosen) == len(rows):
            order = torch.argsort(chosen)
            return values[order].view_as(output)
        others = linear(rows, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
        return others.index_copy(0, chosen, values).view_as(output)

    handles = [layer.register_forward_hook(spread, with_kwargs=True) for layer in layers]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()
