"""Embeddings: linear layers with one-hot inputs, whose metric is the diagonal of token frequencies."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.chart import Chart
from relfisher.layers.linear import LinearLayer, linear_rows, whole
from relfisher.layers.samples import Rows, Sampling
from relfisher.layers.table import TABLE, one_hot, table_rows

__all__ = ["EmbeddingBagLayer", "EmbeddingLayer", "EmbeddingOperation", "TableLayer"]


class TableLayer(Layer):
    """The table of an embedding: G = I (x) diag(frequencies), exactly.

    Positions that hold `padding_idx` are ignored.
    """

    structures = TABLE
    sampled = False

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight as one layer; none with `max_norm` or `scale_grad_by_freq`."""
        if module.max_norm is not None or module.scale_grad_by_freq:
            return []
        tokens, out = module.weight.shape
        return [cls(name, module, (Part("weight", torch.t),), (out, tokens))]

    @property
    def fan_in(self) -> int:
        """Return 1: a sample has one token."""
        return 1

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the sparse one-hot inputs and the outputs."""
        return table_rows(self, call, sampling, self.module.padding_idx)


class EmbeddingLayer(TableLayer):
    """The table of an embedding, or of a head that is tied to it by a function.

    The first pass shows whether a function outside of the embedding multiplies inputs by the table, as in
    `linear(h, embed.weight)`. Then the layer is that head: the metric is that of a linear layer with this weight, and
    what is looked up is ignored.
    """

    kinds: ClassVar[Kinds] = (nn.Embedding,)

    @property
    def settled(self) -> bool:
        """Whether it is known which of the two it is."""
        return "_settled" in vars(self)

    @property
    def is_linear(self) -> bool:
        """Whether it is a head."""
        return self.parts[0].view is whole

    @property
    def operation(self) -> str | None:
        """A function that multiplies by the table of a head; None if it is none."""
        return "linear" if self.is_linear else None

    @property
    def fan_in(self) -> int:
        """The number of inputs of a unit that one sample may have."""
        return self.d if self.is_linear else 1

    @property
    def bias(self) -> None:
        """None: the bias of a head that is a function is not the embedding's."""
        return None

    def settle_as(self, *, turned: bool, with_bias: bool, chart: Chart | None) -> bool:
        """Take on the form of a head, unless it is settled that it is none.

        Args:
            turned: True if the table is taken as [in, out], which is no head.
            with_bias: whether its bias is added.
            chart: how the weight is computed from the table; a head has the table itself.

        Returns:
            Whether it has this form.
        """
        is_head = not turned and not with_bias and chart is None
        found = is_head and self.settle((Part("weight", whole),), tuple(self.weight.shape))
        if found:
            vars(self).update(structures=LinearLayer.structures, sampled=True)
        return found

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the inputs and the outputs of a head, or the sparse one-hot inputs and the outputs."""
        return linear_rows(self, call, sampling) if self.is_linear else super().rows(call, sampling)


class EmbeddingOperation(TableLayer):
    """The table of an embedding with a forward pass of its own, which passes it to `torch.nn.functional.embedding`."""

    kinds: ClassVar[Kinds] = ()

    @property
    def operation(self) -> str:
        """The function."""
        return "embedding"


class EmbeddingBagLayer(TableLayer):
    """A bag of embeddings: each bag is a sample, and its input holds the token counts.

    The diagonal ignores which tokens occur together; the shared block does not.
    Bags with mode "max" have no layer, since they are not linear in their inputs.
    """

    kinds: ClassVar[Kinds] = (nn.EmbeddingBag,)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight as one layer."""
        return [] if module.mode == "max" else super().found_in(name, module)

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the sparse counts (or sums of weights, or means) and the outputs. A mask covers whole bags."""
        names = ("input", "offsets", "per_sample_weights")
        given: dict[str, Any] = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        tokens, weights = given["input"], given.get("per_sample_weights")
        z = self.pre_activation(call)
        count, device = z.shape[0], z.device
        exact = torch.promote_types(z.dtype, torch.float32)
        if tokens.ndim == 2:
            bags = torch.arange(count, device=device).repeat_interleave(tokens.shape[1])
        else:
            places = torch.arange(len(tokens), device=device)
            bags = torch.searchsorted(given["offsets"].long(), places, right=True) - 1
        tokens = tokens.reshape(-1)
        values = (
            torch.ones(len(tokens), dtype=exact, device=device) if weights is None else weights.detach().reshape(-1)
        )
        if self.module.include_last_offset:  # torch does not check that the last offset is the end
            inside = bags < count
            bags, tokens, values = bags[inside], tokens[inside], values[inside]
        if self.module.padding_idx is not None:
            real = tokens != self.module.padding_idx
            bags, tokens, values = bags[real], tokens[real], values[real]
        if self.module.mode == "mean":
            sizes = torch.bincount(bags, minlength=count).clamp(min=1)
            values = values / sizes[bags]
        x = one_hot(bags, tokens, (count, self.d), values)
        keep = sampling.kept((count,))
        return Rows(x, z) if keep is None else Rows(x.index_select(0, keep.nonzero().squeeze(1)), z[keep])
