"""Rows of residuals with their derivatives by all parameters, for a step of all parameters at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relfisher.optim.rowwise import RowDerivatives, Tape, trained_parts
from relfisher.shapes import Float

__all__ = ["Rows", "drawn_rows", "scaled_parts", "signs"]


@dataclass(frozen=True)
class Rows:
    """Rows of residuals [n], their derivatives by each layer, and by all other parameters, [n, others]."""

    residuals: Float[Tensor, " n"]
    layers: list[RowDerivatives]
    others: Float[Tensor, "n e"]

    def gram(self, dtype: torch.dtype) -> Float[Tensor, "n n"]:
        """Return the inner products J J' of all rows below the diagonal and on it, computed in a precision."""
        others = self.others.to(dtype)
        total = others @ others.mT
        for layer in self.layers:
            total = total + layer.to(dtype).gram()
        return total

    def combined(self, shares: Float[Tensor, " n"]) -> tuple[list[Tensor], Tensor]:
        """Return J' shares, for each layer as [out, d] and for all other parameters as [others]."""
        return [layer.combined(shares) for layer in self.layers], shares @ self.others

    def along(self, layers: Sequence[Tensor], others: Float[Tensor, " e"]) -> Float[Tensor, " n"]:
        """Return J times a direction, given for each layer as [out, d] and for all other parameters as [others]."""
        total = self.others @ others
        for rows, direction in zip(self.layers, layers, strict=True):
            total = total + rows.along(direction)
        return total

    @classmethod
    def joined(cls, groups: Sequence[Rows]) -> Rows:
        """Return all rows of several groups."""
        layers = []
        for of_layer in zip(*(group.layers for group in groups), strict=True):
            most = max(each.left.shape[1] for each in of_layer)
            lefts = torch.cat([_filled(each.left, most) for each in of_layer])
            layers.append(RowDerivatives(lefts, torch.cat([_filled(each.right, most) for each in of_layer])))
        return cls(
            torch.cat([group.residuals for group in groups]), layers, torch.cat([each.others for each in groups])
        )


def scaled_parts(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return residuals as [n, columns] each, scaled so that the loss is the sum of all squares."""
    return [part.reshape(len(part) if part.ndim else 1, -1) / math.sqrt(part.numel()) for part in parts]


def signs(part: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs in the shape of residuals."""
    return (torch.randint(2, part.shape, generator=generator) * 2 - 1).to(part)


def drawn_rows(
    parts: Sequence[Tensor],
    tape: Tape,
    layers: Sequence[nn.Linear],
    others: Sequence[Tensor],
    samples: int,
    generator: torch.Generator,
) -> Rows:
    """Return at most about `samples` rows, whose squares add up to the loss on average.

    If there are more residuals, those of a row are added up with random signs; of more rows, some are drawn.

    Args:
        parts: residuals, from `scaled_parts`, of a model that is recorded.
        tape: the records.
        layers: the layers of the tape.
        others: parameters outside of the layers.
        samples: the number.
        generator: draws signs and rows.

    Returns:
        The rows.
    """
    if sum(part.numel() for part in parts) > samples:
        parts = [(part * signs(part, generator)).sum(1, keepdim=True) for part in parts]
    columns = [column for part in parts for column in part.unbind(1)]
    share = samples / sum(map(len, columns))
    groups = []
    for column in columns:
        found = [_matched(each, column, layer) for each, layer in zip(tape.backward(column.sum()), layers, strict=True)]
        rows = Rows(column.detach(), found, _slopes(column, others))
        groups.append(rows if share >= 1 else _some(rows, max(1, round(share * len(column))), generator))
    return Rows.joined(groups)


def _some(rows: Rows, count: int, generator: torch.Generator) -> Rows:
    """Return some rows drawn from all, with the factor that lets them stand for all."""
    chosen = torch.randperm(len(rows.residuals), generator=generator)[:count].to(rows.residuals.device)
    factor = math.sqrt(len(rows.residuals) / count)
    layers = [layer.picked(chosen, factor) for layer in rows.layers]
    return Rows(factor * rows.residuals[chosen], layers, factor * rows.others[chosen])


def _matched(found: Sequence[RowDerivatives], residuals: Tensor, layer: nn.Linear) -> RowDerivatives:
    """Return the derivatives by a layer at the rows of residuals, out of all rows that the layer was given."""
    count, shape = len(residuals), (layer.out_features, layer.in_features + len(trained_parts(layer)) - 1)
    lefts, rights = [], []
    for each in found:
        left, right = each.left, each.right
        if len(left) != count:
            (used,) = (left.flatten(1).any(1) & right.flatten(1).any(1)).nonzero(as_tuple=True)
            if len(used) == 0:
                continue
            if len(used) != count:
                raise ValueError(
                    f"the closure returns {count} rows of residuals that depend on {len(used)} rows of a layer's "
                    "inputs, but without a learning rate, a row of residuals must depend on one row of the inputs: "
                    "give lr"
                )
            left, right = left[used], right[used]
        lefts.append(left)
        rights.append(right)
    if not lefts:
        return RowDerivatives(*(residuals.detach().new_zeros(count, 1, size) for size in shape))
    if len(lefts) == 1:
        return RowDerivatives(lefts[0], rights[0])
    return RowDerivatives(torch.cat(lefts, 1), torch.cat(rights, 1))


def _slopes(residuals: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return the derivatives [n, others] of all residuals by some numbers, by a backward pass for each number."""
    weights = torch.zeros_like(residuals, requires_grad=True)
    found = torch.autograd.grad(residuals, others, weights, create_graph=True, allow_unused=True) if others else []
    columns = []
    for other, each in zip(others, found, strict=True):
        if each is None or not each.requires_grad:
            columns += [torch.zeros_like(residuals)] * other.numel()
        else:
            columns += [torch.autograd.grad(one, weights, retain_graph=True)[0] for one in each.flatten()]
    return torch.stack(columns, 1).detach() if columns else residuals.detach().new_zeros(len(residuals), 0)


def _filled(side: Tensor, count: int) -> Tensor:
    """Return one side of derivatives, with products of 0 up to some number."""
    if side.shape[1] == count:
        return side
    return torch.cat([side, side.new_zeros(len(side), count - side.shape[1], side.shape[2])], 1)
