"""What processes that share out the work send each other in a step: the steps of all layers, in one message.

Its form follows from who owns which layer, so that all processes know it, whatever gradients they have. It also has
what the owners have to say: whether a step is finite, which batches were dropped and which refreshes failed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from relfisher.layers import Layer
from relfisher.optim.events import Events
from relfisher.optim.health import flags
from relfisher.optim.outcome import Outcome
from relfisher.optim.ranks import Ranks
from relfisher.optim.rules import Move, Step, StepRule
from relfisher.structures import Kept

__all__ = ["Message", "SharedRule"]

_ALIGNED = 16  # bytes

# Messages are made equally long, for one collective, if they are not longer together than by this factor.
_EVEN = 1.25


class _Slot(NamedTuple):
    """Where the step of a layer is in the message of its owner: from which byte to which."""

    start: int
    stop: int


class Message:
    """The form of the messages of a step: a byte for the process, one for each of its layers, and their steps.

    Steps of equal shape and dtype follow each other, so that those of a batch are mostly one tensor.

    Args:
        owner: the process that owns a layer, by its rank.
        world: the number of processes.
        returned: layers whose steps are sent in parts, by another message.

    Attributes:
        owner: the process that owns a layer, by its rank.
        layers: the layers of each process, in the order of its message.
        sizes: the bytes of each message; 0 for a process that owns nothing.
    """

    def __init__(self, owner: Mapping[Layer, int], world: int, returned: Collection[Layer] = ()) -> None:
        self.owner = dict(owner)
        alike: dict[tuple[torch.dtype, tuple[int, ...]], list[Layer]] = {}
        for layer in owner:
            alike.setdefault((layer.dtype, layer.shape), []).append(layer)
        kinds = sorted(alike, key=lambda kind: -kind[0].itemsize)  # each starts at a multiple of its size
        self.layers: list[list[Layer]] = [[] for _ in range(world)]
        for layer in (layer for kind in kinds for layer in alike[kind]):
            self.layers[owner[layer]].append(layer)
        self._slots: dict[Layer, _Slot] = {}
        self.sizes = [0] * world
        for rank, layers in enumerate(self.layers):
            if not layers:
                continue
            place = _aligned(1 + len(layers))
            for layer in (layer for layer in layers if layer not in returned):
                self._slots[layer] = _Slot(place, place + math.prod(layer.shape) * layer.dtype.itemsize)
                place = self._slots[layer].stop
            self.sizes[rank] = _aligned(place)
        if world * max(self.sizes) <= _EVEN * sum(self.sizes):
            self.sizes = [max(self.sizes)] * world

    def __contains__(self, layer: object) -> bool:
        """Return whether the message has the step of a layer."""
        return layer in self._slots

    @property
    def is_even(self) -> bool:
        """Whether all messages are equally long, or made so, since few bytes are in vain."""
        return min(self.sizes) == max(self.sizes)

    def sent(self) -> float:
        """Return the bytes that a process sends on average, if messages go around in rings."""
        return sum(self.sizes) * (1 - 1 / len(self.sizes))

    def parts(self, message: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        """Return the parts of the owner's message for the steps of some layers, [some of them, *g, out, d] each."""
        runs: list[list[_Slot]] = []
        for slot in map(self._slots.__getitem__, layers):
            if runs and runs[-1][-1].stop == slot.start:
                runs[-1].append(slot)
            else:
                runs.append([slot])
        return [
            message[run[0].start : run[-1].stop].view(layers[0].dtype).view(len(run), *layers[0].shape) for run in runs
        ]


def _aligned(place: int) -> int:
    return -(-place // _ALIGNED) * _ALIGNED


class SharedRule(StepRule):
    """A step rule of which each process takes the steps of its own layers, and gets those of the others.

    Args:
        rule: the rule.
        ranks: the processes.
        form: the form of their messages.
        events: what happened to the layers of this process; counts what happened to those of all.
    """

    name = "shared"

    def __init__(self, rule: StepRule, ranks: Ranks, form: Message, events: Events) -> None:
        self._rule, self._ranks, self._form, self._events = rule, ranks, form, events

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return what the rule declares."""
        return self._rule.declares(shape)

    def steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return the steps that the owners computed, all of which can be taken or none."""
        rank, form = self._ranks.rank, self._form
        own = [move for move in moves if form.owner[move.layers[0]] == rank]
        steps = self._rule.checked_steps(own) if own else []
        mine = torch.empty(form.sizes[rank], dtype=torch.uint8, device=self._ranks.device)
        said = [0, *(self._events.own.get(layer, 0) for layer in form.layers[rank])]
        mine[: len(said)] = torch.tensor(said, dtype=torch.uint8)[: len(mine)]
        ours = dict(zip((move.layers for move in own), steps, strict=True))
        for move, step in ((move, ours[move.layers]) for move in own if move.layers[0] in form):
            parts = form.parts(mine, move.layers)
            for part, change in zip(parts, torch.split(step.change(), [len(part) for part in parts]), strict=True):
                part.copy_(change)
        taken = Outcome(flags(own, steps)).taken()
        if taken is not None:  # this process owns something
            mine[0] = ~taken
        messages = self._sent(mine)
        if self._events.possible:
            heads = [every[1 : 1 + len(own)].tolist() for every, own in zip(messages, form.layers, strict=True)]
            pairs = zip(form.layers, heads, strict=True)
            self._events.count({layer: event for own, head in pairs for layer, event in zip(own, head, strict=True)})
        is_finite = torch.cat([mine[:0], *(message[:1] for message in messages)]).eq(0).all()
        return [
            Step(self._received(messages, move), 1.0, is_finite)
            if move.layers[0] in form
            else ours.get(move.layers, Step(move.gradient, 1.0))._replace(is_finite=is_finite)
            for move in moves
        ]

    def _sent(self, mine: Tensor) -> Sequence[Tensor]:
        """Return the messages of all processes, by rank."""
        sizes, group = self._form.sizes, self._ranks.group
        every = mine.new_empty(sum(sizes))
        messages = list(torch.split(every, sizes))
        if self._form.is_even:
            distributed.all_gather_into_tensor(every, mine, group)
            return messages
        messages[self._ranks.rank] = mine
        work = [
            distributed.broadcast(message, group_src=rank, group=group, async_op=True)
            for rank, message in enumerate(messages)
            if len(message)
        ]
        for each in work:
            each.wait()
        return messages

    def _received(self, messages: Sequence[Tensor], move: Move) -> Tensor:
        """Return the steps of the layers of a move, [L, *g, out, d]."""
        parts = self._form.parts(messages[self._form.owner[move.layers[0]]], move.layers)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(move.layers[0].weight.device)
