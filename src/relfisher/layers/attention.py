"""Attention: the query, key, value and output projections as linear layers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.linear import column, whole
from relfisher.layers.samples import Rows, Sampling
from relfisher.moments import augment

__all__ = ["InputProjectionLayer", "OutputProjectionLayer"]

_ROLES = ("query", "key", "value")


def _of_role(role: int, width: int, tensor: Tensor) -> Tensor:
    """Return the query, key or value part of a bias that packs all three."""
    return tensor.narrow(0, role * width, width).unsqueeze(-1)


def _packed(tensor: Tensor) -> Tensor:
    """Reshape [3 * out, in] to [3, out, in]."""
    return torch.unflatten(tensor, 0, (3, -1))


def _packed_column(tensor: Tensor) -> Tensor:
    return _packed(tensor).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class InputProjectionLayer(Layer):
    """The query, key and value projections: three groups if they are packed, otherwise one layer per role.

    Args:
        roles: the projections in this layer: 0 for queries, 1 for keys, 2 for values.
    """

    roles: tuple[int, ...] = (0, 1, 2)

    kinds: ClassVar[Kinds] = (nn.MultiheadAttention,)
    followed: ClassVar[bool] = False

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return one layer for packed projections, or three for separate ones."""
        width, ones = module.embed_dim, int(module.in_proj_bias is not None)
        if module.in_proj_weight is not None:
            parts = (Part("in_proj_weight", _packed), Part("in_proj_bias", _packed_column))[: 1 + ones]
            return [cls(name, module, parts, (3, width, width + ones), ".in_proj")]
        found: list[Layer] = []
        for role, label in enumerate(_ROLES):
            weight = f"{label[0]}_proj_weight"
            parts = (Part(weight, whole), Part("in_proj_bias", partial(_of_role, role, width)))[: 1 + ones]
            shape = (width, getattr(module, weight).shape[1] + ones)
            found.append(cls(name, module, parts, shape, f".{label[0]}_proj", roles=(role,)))
        return found

    def output(self, output: Any) -> Tensor | None:
        """Return the attended values."""
        return super().output(output[0])

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the inputs. The pre-activations are not visible, and a linear response does not need them."""
        given = {**dict(zip(_ROLES, call.args, strict=False)), **call.kwargs}
        inputs = [
            sampling.real(_batched(self.module, given[_ROLES[role]].detach(), sampling))[0] for role in self.roles
        ]
        most = max(len(rows) for rows in inputs)
        chosen = sampling.chosen(most, inputs[0].device)
        ones = len(self.parts) - 1
        each = [_stretched(augment(rows, ones), most, chosen) for rows in inputs]
        x = each[0] if len(each) == 1 else torch.stack(each)
        return Rows(x, x.new_zeros(1).expand(*x.shape[:-1], self.out))


def _batched(module: Any, tensor: Tensor, sampling: Sampling) -> Tensor:
    """Return sequences as [batch, length, in]; a single sequence is unchanged."""
    if module.batch_first or tensor.ndim != 3:
        return tensor
    sampling.turn(*tensor.shape[:2])
    return tensor.transpose(0, 1)


def _stretched(rows: Tensor, count: int, chosen: Tensor | None) -> Tensor:
    """Return rows repeated to the given count, or the chosen ones of these, with the same mean square.

    If there are fewer keys than queries, each key gets more weight, so that all groups average over as many samples.
    """
    if len(rows) == count:
        return rows if chosen is None else rows[chosen]
    places = torch.arange(count, device=rows.device) if chosen is None else chosen
    if len(rows) == 0:
        return rows.new_zeros(len(places), rows.shape[-1])
    sources = places * len(rows) // count
    # A row fills the places from the first one that it is the source of up to the first one of the next row.
    firsts = (torch.arange(len(rows) + 1, device=rows.device) * count + len(rows) - 1) // len(rows)
    weights = count / (len(rows) * firsts.diff()[sources].to(rows.dtype))
    return rows[sources] * weights.sqrt().unsqueeze(-1)


class OutputProjectionLayer(Layer):
    """The output projection, applied to the attended values.

    The input of the projection is hidden inside the module's functional call. When statistics are due, attention is
    therefore run again with the identity as the projection and with the same random numbers.
    """

    kinds: ClassVar[Kinds] = (nn.MultiheadAttention,)
    random: ClassVar[bool] = True

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight and bias as one layer."""
        out, inputs = module.out_proj.weight.shape
        ones = int(module.out_proj.bias is not None)
        parts = (Part("out_proj.weight", whole), Part("out_proj.bias", column))[: 1 + ones]
        return [cls(name, module, parts, (out, inputs + ones), ".out_proj")]

    def output(self, output: Any) -> Tensor | None:
        """Return the attended values."""
        return super().output(output[0])

    @torch.no_grad()
    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the attended values and the outputs."""
        module = self.module
        given = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
        given.apply_defaults()
        named = given.arguments
        tensors = [named[role].detach() for role in _ROLES]
        swap = module.batch_first and tensors[0].ndim == 3
        queries, keys, values = (tensor.transpose(0, 1) if swap else tensor for tensor in tensors)
        weight = self.weight
        eye = torch.eye(module.embed_dim, dtype=weight.dtype, device=weight.device)
        with call.random_numbers():
            attended, _ = functional.multi_head_attention_forward(
                queries,
                keys,
                values,
                module.embed_dim,
                module.num_heads,
                module.in_proj_weight,
                module.in_proj_bias,
                module.bias_k,
                module.bias_v,
                module.add_zero_attn,
                module.dropout,
                eye,
                None,
                training=module.training,
                use_separate_proj_weight=module.in_proj_weight is None,
                q_proj_weight=module.q_proj_weight,
                k_proj_weight=module.k_proj_weight,
                v_proj_weight=module.v_proj_weight,
                **{name: value for name, value in named.items() if name not in _ROLES},
            )
        said = _batched(module, self.pre_activation(call), sampling)
        x, z = sampling.rows(attended.transpose(0, 1) if attended.ndim == 3 else attended, said)
        return Rows(augment(x, len(self.parts) - 1), z)
