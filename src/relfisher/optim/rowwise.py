"""The derivatives of single rows of residuals by the weights of linear layers, all of them by one backward pass.

Residuals depend on a weight W by products x W' of rows x and, where they contain derivatives, by products g W of rows
that flow back. Each product adds an outer product to a row's derivative by W: of what entered it, and of the derivative
by what left it. A backward pass that records both for each product has J_n = sum_k l_nk r_nk' for all rows n.

Axes: `n` rows, the first axis of what a layer is given; `k` products of a row, any other positions among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from relfisher.shapes import Float

__all__ = ["RowDerivatives", "Tape", "as_matrix", "as_parts", "has_metric", "taped", "trained_parts"]

#: What it takes to go through all pairs of rows, in multiplications for each pair.
PASS = 128
STRIPE = 128


def has_metric(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a linear layer whose weight is trained and computed from nothing else."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
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


@dataclass(frozen=True)
class RowDerivatives:
    """The derivatives J_n = sum_k left_nk right_nk' of rows by the parameters [out, d] of a layer."""

    left: Float[Tensor, "n k out"]
    right: Float[Tensor, "n k d"]

    def dense(self) -> Float[Tensor, "n out d"]:
        """Return J."""
        return self.left.mT @ self.right

    def gram(self) -> Float[Tensor, "n n"]:
        """Return the inner products of all J_n below the diagonal and on it, without J itself where that is cheaper."""
        (_, k, out), d = self.left.shape, self.right.shape[2]
        if out * d <= k * (k + 1) // 2 * (out + d + PASS):
            return _gram(self.dense().flatten(1))
        total = torch.zeros(())
        for i in range(k):
            for j in range(i, k):
                one = (self.left[:, i] @ self.left[:, j].mT) * (self.right[:, i] @ self.right[:, j].mT)
                total = total + (one if i == j else one + one.mT)
        return total

    def to(self, dtype: torch.dtype) -> RowDerivatives:
        """Return the derivatives in a precision."""
        return RowDerivatives(self.left.to(dtype), self.right.to(dtype))

    def picked(self, chosen: Tensor, factor: float) -> RowDerivatives:
        """Return some rows, times a factor."""
        return RowDerivatives(self.left[chosen] * factor, self.right[chosen])

    def combined(self, shares: Float[Tensor, " n"]) -> Float[Tensor, "out d"]:
        """Return sum_n shares_n J_n."""
        return (self.left * shares[:, None, None]).flatten(0, 1).mT @ self.right.flatten(0, 1)

    def along(self, direction: Float[Tensor, "out d"]) -> Float[Tensor, " n"]:
        """Return the inner products of all J_n with a direction."""
        return ((self.left @ direction) * self.right).sum((1, 2))


class Tape:
    """Records what enters and leaves the products of layers with their weights in a backward pass.

    Args:
        layers: the layers.
        like: a tensor with the precision and the device of the layers.
    """

    def __init__(self, layers: Sequence[nn.Linear], like: Tensor) -> None:
        self._layers = layers
        self._records: dict[int, list[tuple[Tensor, Tensor, bool]]] = {}
        #: Whether a backward pass is recorded now.
        self.records = False
        #: Stands for all weights, so that a backward pass goes to all products and nowhere else.
        self.anchor = like.new_zeros((), requires_grad=True)

    def record(self, weight: Tensor, left: Tensor, right: Tensor, biased: bool) -> None:
        """Record a product."""
        self._records.setdefault(weight.data_ptr(), []).append((left, right, biased))

    def backward(self, total: Tensor) -> list[list[RowDerivatives]]:
        """Return the derivatives of a sum of residuals by each layer, row by row.

        Args:
            total: the sum.

        Returns:
            For each layer, its rows; apart from each other where it was given different numbers of rows.
        """
        self._records, self.records = {}, True
        try:
            torch.autograd.grad(total, self.anchor, retain_graph=True, allow_unused=True)
        finally:
            self.records = False
        found, self._records = [self._of_layer(layer) for layer in self._layers], {}
        return found

    def _of_layer(self, layer: nn.Linear) -> list[RowDerivatives]:
        by_rows: dict[int, list[tuple[Tensor, Tensor, bool]]] = {}
        for left, right, biased in self._records.get(layer.weight.data_ptr(), []):
            rows = 1 if left.ndim == 1 else len(left)
            both = [side.detach().reshape(rows, -1, side.shape[-1]) for side in (left, right)]
            by_rows.setdefault(rows, []).append((both[0], both[1], biased))
        return [_stacked(products, len(trained_parts(layer)) > 1) for products in by_rows.values()]


def _stacked(products: Sequence[tuple[Tensor, Tensor, bool]], with_bias: bool) -> RowDerivatives:
    """Return all products [n, k, *] of the same rows; those with a bias have 1 as their last input."""
    right = torch.cat([each[1] for each in products], 1)
    if with_bias:
        counts = torch.tensor([each[1].shape[1] for each in products])
        ones = torch.tensor([float(each[2]) for each in products]).repeat_interleave(counts).to(right)
        right = torch.cat([right, ones[None, :, None].expand(len(right), -1, 1)], 2)
    return RowDerivatives(torch.cat([each[0] for each in products], 1), right)


@contextmanager
def taped(layers: Sequence[nn.Linear], model: nn.Module) -> Iterator[Tape]:
    """Let all linear layers of a model with the weights of some layers multiply rows so that a tape can record it.

    Args:
        layers: the layers, each with a weight of its own.
        model: the model, which may have further layers with these weights.

    Yields:
        The tape.
    """
    parts = {id(layer.weight): trained_parts(layer) for layer in layers}
    same = [
        each for each in model.modules() if isinstance(each, nn.Linear) and id(each._parameters.get("weight")) in parts
    ]
    tape = Tape(layers, next(model.parameters()))
    for layer in same:
        covered = any(layer.bias is part for part in parts[id(layer.weight)])
        layer.forward = partial(_forward, layer, tape, covered)  # type: ignore[method-assign]  # of this object alone
    try:
        yield tape
    finally:
        for layer in same:
            vars(layer).pop("forward")


def _forward(layer: nn.Linear, tape: Tape, covered: bool, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear's
    """Return what a layer says of rows, with its bias on the tape or not."""
    product = _product(input, layer.weight.detach(), tape, False, covered)
    bias = layer._parameters["bias"]
    if bias is None:
        return product
    return product + (bias.detach() if covered else bias)


def _product(x: Tensor, weight: Tensor, tape: Tape, transposed: bool, biased: bool) -> Tensor:
    made: Tensor = _Product.apply(x, weight, tape.anchor, tape, transposed, biased)  # type: ignore[no-untyped-call]  # torch
    return made


class _Product(torch.autograd.Function):
    """x W', or x W if transposed; a backward pass is made of such products, so that there can be further ones."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, *about: Any) -> Tensor:
        _, _, transposed, _ = about
        return x @ (weight if transposed else weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        x, weight, ctx.tape, ctx.transposed, ctx.biased = inputs[0], inputs[1], *inputs[3:]
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx: Any, along: Tensor | None, *_: Any) -> Tensor | None:
        _, weight = ctx.saved_tensors
        return None if along is None else _product(along, weight, ctx.tape, ctx.transposed, False)

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, *about: Any) -> tuple[Tensor, int]:
        if in_dims[1] is not None or in_dims[0] is None:
            raise ValueError("ResidualRNGD takes vmap over the inputs of a layer, not over its weights")
        # What is mapped over last, the points, comes first in the end.
        return _product(x.movedim(in_dims[0], 0), weight, *about[1:]), 0

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not ctx.tape.records:
            return _product(slopes, weight, ctx.tape, not ctx.transposed, False), None, None, None, None, None
        ctx.tape.record(weight, *((x, slopes) if ctx.transposed else (slopes, x)), ctx.biased)
        wanted = ctx.needs_input_grad[0]
        back = slopes @ (weight.mT if ctx.transposed else weight) if wanted else None
        return back, None, None, None, None, None


def _gram(rows: Tensor) -> Tensor:
    """Return rows @ rows' up to and a little above its diagonal."""
    total = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), STRIPE):
        stop = start + STRIPE
        torch.mm(rows[start:stop], rows[:stop].mT, out=total[start:stop, :stop])
    return total
