"""Tables of which rows are looked up: linear in one-hot inputs, with the metric I (x) diag(frequencies)."""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.layers.base import Call, Layer, Part
from relfisher.layers.samples import Rows, Sampling

__all__ = ["TABLE", "is_table", "one_hot", "settle_as_table", "table_rows"]

#: The structures of a table, of which only the first takes less than tokens^2 numbers.
TABLE = ("diagonal", "shared")


def is_table(layer: Layer) -> bool:
    """Return whether an operation turned out to look up rows of its matrix."""
    return layer.parts[0].view is torch.t


def settle_as_table(layer: Layer) -> bool:
    """Let a layer take on the form of a table, unless another has settled it.

    Args:
        layer: the layer, of which the first part is a matrix [tokens, units].

    Returns:
        Whether it has this form.
    """
    tokens, units = layer.weight.shape
    settled = layer.settle((Part(layer.parts[0].attribute, torch.t),), (units, tokens))
    if settled:
        vars(layer).update(structures=TABLE, sampled=False)
    return settled


def table_rows(layer: Layer, call: Call, sampling: Sampling, padding_idx: int | None) -> Rows:
    """Return the sparse one-hot inputs [n, tokens] and the outputs [n, units] of a lookup.

    Args:
        layer: the table.
        call: the call, whose input holds the tokens.
        sampling: the selection of samples.
        padding_idx: positions that hold it are ignored; None for no such token.
    """
    tokens, z = call.input().reshape(-1), layer.pre_activation(call).reshape(-1, layer.out)
    keep = sampling.kept(call.input().shape)
    if keep is not None:
        tokens, z = tokens[keep], z[keep]
    if padding_idx is not None:
        real = tokens != padding_idx
        tokens, z = tokens[real], z[real]
    return Rows(one_hot(torch.arange(len(tokens), device=tokens.device), tokens, (len(tokens), layer.d)), z)


def one_hot(rows: Tensor, tokens: Tensor, shape: tuple[int, int], weights: Tensor | None = None) -> Tensor:
    """Return sparse inputs [n, tokens] with the given weights, or 1, at each (row, token)."""
    values = torch.ones(len(tokens), device=tokens.device) if weights is None else weights
    return torch.sparse_coo_tensor(torch.stack([rows, tokens]), values, shape, check_invariants=False)
