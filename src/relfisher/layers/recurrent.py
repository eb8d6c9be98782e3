"""Recurrent layers: input and recurrent weights as linear layers whose units are gates, shared over time.

Each layer and direction of the module gives two layers: the input weights with x~ = (x_t, 1) and the recurrent weights
with x~ = (h_(t-1), 1). For each, the other is part of the reference. Samples run over sequences and time steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.linear import column, whole
from relfisher.layers.samples import Rows, Sampling
from relfisher.moments import augment
from relfisher.responses import ReLUGaussian, SigmoidBernoulli, TanhBernoulli, UnitResponse
from relfisher.shapes import Float, Num

__all__ = ["CellLayer", "Gates", "RecurrentLayer"]

_SIGMOID, _TANH = SigmoidBernoulli(), TanhBernoulli()
_UNITS: dict[str, tuple[UnitResponse, ...]] = {
    "LSTM": (_SIGMOID, _SIGMOID, _TANH, _SIGMOID),
    "GRU": (_SIGMOID, _SIGMOID, _TANH),
    "RNN_TANH": (_TANH,),
    "RNN_RELU": (ReLUGaussian(),),
}


@dataclass(frozen=True)
class Gates(UnitResponse):
    """Units of several kinds, equally many of each, one kind after another along the last axis of z.

    Args:
        units: the kinds.
        reset: True if z holds the gates (r, z, n) of a GRU and the parameters are its recurrent weights. In the
            pre-activation of the new state these are multiplied by r, so that the information, for given r, is nu r^2.
    """

    units: tuple[UnitResponse, ...]
    reset: bool = False

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the gates."""
        return torch.cat([unit.activation(part) for unit, part in self._parts(z)], dim=-1)

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return their derivatives."""
        return torch.cat([unit.slope(part) for unit, part in self._parts(z)], dim=-1)

    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return each gate's information about its pre-activation, or about the recurrent part of it."""
        parts = [unit.information(part) for unit, part in self._parts(z)]
        if self.reset:
            parts[-1] = parts[-1] * torch.sigmoid(z.chunk(len(self.units), dim=-1)[0]).square()
        return torch.cat(parts, dim=-1)

    def log_prob(self, z: Float[Tensor, "*n"], y: Num[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return ln p(y | z) of each gate."""
        responses = y.chunk(len(self.units), dim=-1)
        pairs = zip(self._parts(z), responses, strict=True)
        return torch.cat([unit.log_prob(part, response) for (unit, part), response in pairs], dim=-1)

    def sample(self, z: Float[Tensor, "*n"], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Draw a response of each gate."""
        return torch.cat([unit.sample(part, generator) for unit, part in self._parts(z)], dim=-1)

    def outcomes(self, out: int) -> None:
        """Return None: the outcomes differ between gates."""
        return

    def _parts(self, z: Tensor) -> list[tuple[UnitResponse, Tensor]]:
        return list(zip(self.units, z.chunk(len(self.units), dim=-1), strict=True))


@dataclass(frozen=True)
class _Sequences:
    """The inputs [length, batch, in], outputs (both directions side by side) and initial states of one layer."""

    inputs: Tensor
    outputs: Tensor
    initial: Tensor


@dataclass(frozen=True, eq=False)
class RecurrentLayer(Layer):
    """The input weights or the recurrent weights of one layer and direction of an RNN, LSTM or GRU.

    The states of lower layers are hidden inside the module's call. When statistics are due, these layers are therefore
    run again, with the same random numbers for the dropout between them.

    Args:
        place: the index of the layer, counted from 0.
        reverse: True for the backward direction.
        recurrent: True for the recurrent weights, False for the input weights.
    """

    place: int = 0
    reverse: bool = False
    recurrent: bool = False

    kinds: ClassVar[Kinds] = (nn.RNN, nn.LSTM, nn.GRU)
    followed: ClassVar[bool] = False
    random: ClassVar[bool] = True

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return two layers for each layer and direction; none with projections, which have a third kind of weight."""
        if module.proj_size:
            return []
        found: list[Layer] = []
        for place in range(module.num_layers):
            for reverse in (False, True)[: 1 + module.bidirectional]:
                label = f"l{place}" + "_reverse" * reverse
                for side in ("ih", "hh"):
                    weight = f"weight_{side}_{label}"
                    parts = (Part(weight, whole), Part(f"bias_{side}_{label}", column))[: 1 + module.bias]
                    out, inputs = getattr(module, weight).shape
                    shape, recurrent = (out, inputs + len(parts) - 1), side == "hh"
                    found.append(cls(name, module, parts, shape, f".{side}_{label}", place, reverse, recurrent))
        return found

    @property
    def own_response(self) -> Gates:
        """The response of the gates."""
        return Gates(_UNITS[self.module.mode], reset=self.recurrent and self.module.mode == "GRU")

    def output(self, output: Any) -> Tensor | None:
        """Return the sequence of outputs."""
        sequence = output[0]
        return super().output(sequence.data if isinstance(sequence, PackedSequence) else sequence)

    @torch.no_grad()
    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the inputs or previous states, and the gates' pre-activations. Packed sequences have no padding."""
        if "layers" not in call.shared:
            call.shared["layers"], call.shared["lengths"] = self._run(call)
        sequences: _Sequences = call.shared["layers"][self.place]
        lengths: Tensor | None = call.shared["lengths"]
        before = self._before(sequences, lengths)
        x, z = before if self.recurrent else sequences.inputs, self._gates(sequences.inputs, before)
        length, batch = x.shape[:2]
        x, z = x.transpose(0, 1), z.transpose(0, 1)
        if lengths is not None:
            real = torch.arange(length, device=x.device) < lengths[:, None]
            x, z = sampling.taken(x[real], z[real])
        elif call.input().ndim == 3:
            if not self.module.batch_first:
                sampling.turn(length, batch)
            x, z = sampling.rows(x, z)
        else:
            x, z = sampling.rows(x.squeeze(0), z.squeeze(0))
        return Rows(augment(x, len(self.parts) - 1), z)

    def _before(self, sequences: _Sequences, lengths: Tensor | None) -> Tensor:
        """Return the previous state of each step, [length, batch, hidden], in this layer's direction."""
        size, start = self.module.hidden_size, sequences.initial[int(self.reverse)].unsqueeze(0)
        outputs = sequences.outputs[..., size * self.reverse : size * (self.reverse + 1)]
        if not self.reverse:
            return torch.cat([start, outputs[:-1]])
        after = torch.cat([outputs[1:], start])
        if lengths is None:
            return after
        ends = torch.arange(len(after), device=after.device)[:, None] + 1 >= lengths
        return torch.where(ends.unsqueeze(-1), start, after)

    def _gates(self, inputs: Tensor, before: Tensor) -> Tensor:
        """Return the pre-activations of all gates."""
        weights = [weight.detach() for weight in self._weights(self.place)[int(self.reverse)]]
        biases = weights[2:] if self.module.bias else [None, None]
        said = functional.linear(inputs, weights[0], biases[0])
        kept = functional.linear(before, weights[1], biases[1])
        return _gates_of(self.module.mode, said, kept)

    def _weights(self, layer: int) -> list[list[nn.Parameter]]:
        """Return the weights of a layer, one list per direction."""
        directions = 1 + self.module.bidirectional
        weights: list[list[nn.Parameter]] = self.module.all_weights
        return weights[layer * directions : (layer + 1) * directions]

    def _run(self, call: Call) -> tuple[list[_Sequences], Tensor | None]:
        """Run the layers one by one. Return the inputs and outputs of each, and the lengths of packed sequences."""
        module, sequence, states = self.module, call.argument(0, "input"), call.argument(1, "hx")
        packed = sequence if isinstance(sequence, PackedSequence) else None
        lengths = None
        if packed is not None:
            padded, lengths = pad_packed_sequence(packed)
            lengths = lengths.to(padded.device)
            current, inputs = packed.data.detach().to(self.weight.dtype), padded.detach().to(self.weight.dtype)
        else:
            inputs = sequence.detach()
            inputs = (
                inputs.unsqueeze(1) if inputs.ndim == 2 else inputs.transpose(0, 1) if module.batch_first else inputs
            )
            inputs = inputs.to(self.weight.dtype)
            current = inputs
        initial = self._initial(states, inputs)
        found = []
        with call.random_numbers(), torch.autocast(self.weight.device.type, enabled=False):
            for layer in range(module.num_layers):
                output = self._one(current, [state[layer] for state in initial], layer, packed)
                outputs = output if packed is None else pad_packed_sequence(packed._replace(data=output))[0]
                found.append(_Sequences(inputs, outputs, initial[0][layer]))
                if layer + 1 < module.num_layers:
                    current = functional.dropout(output, module.dropout, module.training)
                    inputs = current if packed is None else pad_packed_sequence(packed._replace(data=current))[0]
        return found, lengths

    def _initial(self, states: Any, inputs: Tensor) -> list[Tensor]:
        """Return the initial states (and cells), each [layers, directions, batch, hidden]."""
        module = self.module
        shape = (module.num_layers, 1 + module.bidirectional, inputs.shape[1], module.hidden_size)
        count = 2 if module.mode == "LSTM" else 1
        if states is None:
            return [inputs.new_zeros(shape)] * count
        given = states if isinstance(states, tuple) else (states,)
        return [state.detach().to(inputs.dtype).reshape(shape) for state in given]

    def _one(self, current: Tensor, initial: list[Tensor], layer: int, packed: PackedSequence | None) -> Tensor:
        """Run one layer on padded sequences, or on the data of packed ones."""
        module = self.module
        run = getattr(torch._VF, module.mode.lower())
        weights = [weight.detach() for direction in self._weights(layer) for weight in direction]
        if packed is not None and packed.sorted_indices is not None:
            initial = [state.index_select(1, packed.sorted_indices) for state in initial]
        states = initial if module.mode == "LSTM" else initial[0]
        options = (weights, module.bias, 1, 0.0, False, module.bidirectional)
        if packed is None:
            output: Tensor = run(current, states, *options, False)[0]
        else:
            output = run(current, packed.batch_sizes, states, *options)[0]
        return output


@dataclass(frozen=True, eq=False)
class CellLayer(Layer):
    """The input weights or the recurrent weights of an RNNCell, LSTMCell or GRUCell, whose calls are the time steps.

    Args:
        recurrent: True for the recurrent weights, False for the input weights.
    """

    recurrent: bool = False

    kinds: ClassVar[Kinds] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    followed: ClassVar[bool] = False

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return two layers."""
        found: list[Layer] = []
        for side in ("ih", "hh"):
            weight = f"weight_{side}"
            parts = (Part(weight, whole), Part(f"bias_{side}", column))[: 1 + module.bias]
            out, inputs = getattr(module, weight).shape
            found.append(cls(name, module, parts, (out, inputs + len(parts) - 1), f".{side}", side == "hh"))
        return found

    @property
    def own_response(self) -> Gates:
        """The response of the gates."""
        return Gates(_UNITS[self._mode], reset=self.recurrent and self._mode == "GRU")

    @property
    def _mode(self) -> str:
        if isinstance(self.module, nn.RNNCell):
            return f"RNN_{self.module.nonlinearity.upper()}"
        return "LSTM" if isinstance(self.module, nn.LSTMCell) else "GRU"

    def output(self, output: Any) -> Tensor | None:
        """Return the new state."""
        return super().output(output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the inputs or the states, and the gates' pre-activations."""
        module, x, state = self.module, call.input(), call.argument(1, "hx")
        state = state[0] if isinstance(state, tuple) else state
        h = x.new_zeros(*x.shape[:-1], module.hidden_size) if state is None else state.detach()
        with torch.autocast(x.device.type, enabled=False):
            x, h = x.to(self.weight.dtype), h.to(self.weight.dtype)
            said = functional.linear(x, module.weight_ih, module.bias_ih)
            z = _gates_of(self._mode, said, functional.linear(h, module.weight_hh, module.bias_hh))
        inputs, z = sampling.rows(h if self.recurrent else x, z)
        return Rows(augment(inputs, len(self.parts) - 1), z)


def _gates_of(mode: str, said: Tensor, kept: Tensor) -> Tensor:
    """Return the pre-activations of all gates, given what the inputs and the previous states say."""
    if mode != "GRU":
        return said + kept
    reset, update, new = said.chunk(3, dim=-1)
    reset_kept, update_kept, new_kept = kept.chunk(3, dim=-1)
    reset = reset + reset_kept
    return torch.cat([reset, update + update_kept, new + torch.sigmoid(reset) * new_kept], dim=-1)
