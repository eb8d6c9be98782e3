"""Attention: the projections of queries, keys and values and that of the heads' outputs are linear layers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from relfisher.moments import augment
from relfisher.subsystems.base import Call, Kinds, Part, Rows, Sampling, Subsystem
from relfisher.subsystems.linear import column, whole

__all__ = ["InputProjectionSubsystem", "OutputProjectionSubsystem"]

_ROLES = ("query", "key", "value")


def _of_role(role: int, width: int, tensor: Tensor) -> Tensor:
    """Return what belongs to queries, keys or values, of a bias that all three are kept in."""
    return tensor.narrow(0, role * width, width).unsqueeze(-1)


def _packed(tensor: Tensor) -> Tensor:
    """Return [3 * out, in] as [3, out, in]."""
    return torch.unflatten(tensor, 0, (3, -1))


def _packed_column(tensor: Tensor) -> Tensor:
    return _packed(tensor).unsqueeze(-1)


class InputProjectionSubsystem(Subsystem):
    """The projections of queries, keys and values: three groups where they are packed, else one role each."""

    kinds: ClassVar[Kinds] = (nn.MultiheadAttention,)
    followed = False

    def __init__(self, name: str, module: Any, parts: list[Part], shape: tuple[int, ...], roles: range) -> None:
        super().__init__(name, module, parts, shape)
        self._roles = roles
        self.suffix = f".{name.rpartition('.')[2]}"

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Subsystem]:
        """Return one subsystem for packed projections, and three for separate ones."""
        width, bias = module.embed_dim, module.in_proj_bias
        ones = int(bias is not None)
        if module.in_proj_weight is not None:
            parts = [Part(module.in_proj_weight, _packed)] + [Part(bias, _packed_column) for _ in range(ones)]
            return [cls(f"{name}.in_proj", module, parts, (3, width, width + ones), range(3))]
        found: list[Subsystem] = []
        for role, weight in enumerate((module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)):
            parts = [Part(weight, whole)] + [Part(bias, partial(_of_role, role, width)) for _ in range(ones)]
            label = f"{name}.{_ROLES[role][0]}_proj"
            found.append(cls(label, module, parts, (width, weight.shape[1] + ones), range(role, role + 1)))
        return found

    def output(self, output: Any) -> Tensor | None:
        """Return the attended values."""
        return super().output(output[0])

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return inputs; what is projected is not seen, and not needed for a linear response."""
        given = {**dict(zip(_ROLES, call.args, strict=False)), **call.kwargs}
        inputs = [sampling.rows(given[_ROLES[role]].detach())[0] for role in self._roles]
        ones = len(self.parts) - 1
        if len(inputs) == 1:
            x = augment(inputs[0], ones)
        else:
            # Fewer keys than queries count for more each: all three groups are averages over as many samples.
            most = max(len(rows) for rows in inputs)
            x = torch.stack([_stretched(augment(rows, ones), most) for rows in inputs])
        return Rows(x, x.new_zeros(1).expand(*x.shape[:-1], self.out))


def _stretched(rows: Tensor, count: int) -> Tensor:
    """Return so many rows with the same mean of squares: zeros at the end make up for a scale."""
    if len(rows) in (0, count):
        return rows if len(rows) else rows.new_zeros(count, rows.shape[1])
    return functional.pad(rows * (count / len(rows)) ** 0.5, (0, 0, 0, count - len(rows)))


class OutputProjectionSubsystem(Subsystem):
    """The projection of what the heads attended to.

    Its input is inside the module's functional call, so that attention runs once more, with the identity in its place
    and the same random numbers, when statistics are due.
    """

    kinds: ClassVar[Kinds] = (nn.MultiheadAttention,)
    suffix = ".out_proj"
    random = True

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Subsystem]:
        """Return the weight and bias as one subsystem."""
        projection = module.out_proj
        biases = [] if projection.bias is None else [Part(projection.bias, column)]
        out, inputs = projection.weight.shape
        parts = [Part(projection.weight, whole), *biases]
        return [cls(name + cls.suffix, module, parts, (out, inputs + len(biases)))]

    def output(self, output: Any) -> Tensor | None:
        """Return the attended values."""
        return super().output(output[0])

    @torch.no_grad()
    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return what the heads attended to, and outputs."""
        module = self.module
        given = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
        given.apply_defaults()
        named = given.arguments
        tensors = [named[role].detach() for role in _ROLES]
        swap = module.batch_first and tensors[0].ndim == 3
        queries, keys, values = (tensor.transpose(0, 1) if swap else tensor for tensor in tensors)
        eye = torch.eye(module.embed_dim, dtype=self.weight.dtype, device=self.weight.device)
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
        x, z = sampling.rows(attended.transpose(0, 1) if swap else attended, self.said(call))
        return Rows(augment(x, len(self.parts) - 1), z)
