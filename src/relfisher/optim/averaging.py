"""The average of the iterates, which a model holds between steps, while its training passes run at the last iterate.

The iterate z takes the steps, and x is its average over the last part of the run. With t iterates so far and a window
of the share a of them,

    x <- x + c (z - x),  c = min(1, 1 / (a t)),

which weighs the i-th iterate in proportion to i^(1/a - 1): polynomial-decay averaging, Shamir & Zhang 2013. Averages of
iterates go back to Polyak & Juditsky 1992. A gradient at z has seen the noise of the steps, which one at x has not.

Only the lead z - x is stored. If weights are changed from outside, x and z move with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.observe.hooks import Hook
from relfisher.optim.outcome import Outcome
from relfisher.optim.running import RunningStatistics
from relfisher.shards import held, reshard, sharding
from relfisher.structures import Kept

__all__ = ["Averaging", "averaged", "iterate", "to_iterate"]


def averaged(parameter: Tensor) -> bool:
    """Return whether a parameter is averaged: if it is trained, and not in half precision, too coarse for it."""
    return parameter.requires_grad and torch.finfo(parameter.dtype).bits > 16


def to_iterate(optimizer: torch.optim.Optimizer) -> None:
    """Put the last iterate into the model, which the next step does anyway; other optimizers have no other weights."""
    averaging = getattr(optimizer, "_averaging", None)
    if isinstance(averaging, Averaging):
        averaging.to_iterate()


def iterate(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return what a parameter is at the last iterate, given that the model holds the average."""
    lead = optimizer.state[parameter].get("lead") if parameter in optimizer.state else None
    return parameter.detach() if lead is None else parameter.detach() + lead


class Averaging:
    """Moves a model's weights between the average and the last iterate.

    A training pass with gradients, of the model or of one of its children, moves the weights to the iterate; the step
    that follows moves them to the new average.

    Args:
        model: the model.
        optimizer: its optimizer. Its groups have the keys "averaging", the window's share of the run, "averaged", the
            number of iterates so far, and "at_iterate". Its states have a "lead" for each averaged parameter.
    """

    def __init__(self, model: nn.Module | None, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        # What a pass gathers of the weights would be behind, so that the weights move first.
        self._gathering = None if model is None or not sharding(model) else weakref.ref(model)
        self._running = RunningStatistics(nn.Module() if model is None else model)
        hooked = [] if model is None else [model, *model.children()]
        self._handles = [module.register_forward_pre_hook(Hook(self._enter), prepend=True) for module in hooked]

    @staticmethod
    def declares(shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the lead of z over x for a parameter of this shape."""
        return {"lead": Kept(shape, parted=True)}

    @staticmethod
    def complete(group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Create the missing leads of a group's parameters."""
        for parameter in group["params"] if group["averaging"] else ():
            if averaged(parameter) and "lead" not in states[parameter]:
                states[parameter]["lead"] = torch.zeros_like(parameter)

    def to_iterate(self) -> None:
        """Put the last iterate into the model."""
        self._move(torch._foreach_add_, at_iterate=True)

    def to_average(self) -> None:
        """Put the average into the model."""
        self._move(torch._foreach_sub_, at_iterate=False)

    def skip(self) -> None:
        """Put the average into the model, as it was before the passes of a step that is not taken."""
        self.to_average()
        self._running.restore()

    @contextmanager
    def stepping(self) -> Iterator[Callable[[Outcome], None]]:
        """Average the iterate that a step makes.

        Yields:
            A function to call with the outcome of the step; without it the average stays as it is.
        """
        self.to_iterate()
        taken: list[Outcome] = []
        optimizer = self._optimizer()
        if optimizer is not None:
            for group in self._groups():
                self.complete(group, optimizer.state)  # parameters that were frozen so far
        averages = self._averages(at_iterate=True)
        for _, params, leads in averages:  # for the time of the step, the leads hold -x
            torch._foreach_sub_(leads, params)
        try:
            yield taken.append
        finally:
            for group, params, leads in averages:
                torch._foreach_add_(leads, params)
                for outcome in taken:
                    group["averaged"] += 1
                    new = min(1.0, 1 / (group["averaging"] * group["averaged"]))
                    outcome.multiply(leads, 1 - new)
                    self._running.average(outcome, new)  # of the first group, if they differ
                torch._foreach_sub_(params, leads)
            for group in self._groups():
                group["at_iterate"] = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Put the average into the model for a while."""
        moved = any(group["at_iterate"] for group in self._groups())
        self.to_average()
        try:
            yield
        finally:
            if moved:
                self.to_iterate()

    def close(self) -> None:
        """Put the average into the model, and remove the hooks."""
        self.to_average()
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: object) -> None:
        waits = any(not group["at_iterate"] for group in self._groups())  # the first hook of a pass moves all weights
        if waits and module.training and torch.is_grad_enabled():
            with torch._C.DisableTorchFunction():
                self.to_iterate()
                self._running.remember()

    @torch.no_grad()
    def _move(self, change: Callable[[list[Tensor], list[Tensor]], None], *, at_iterate: bool) -> None:
        """Change the weights by their leads, which are 0 before the first step, where they are not moved yet."""
        gathering = None if self._gathering is None else self._gathering()
        if gathering is not None and any(group["at_iterate"] != at_iterate for group in self._groups()):
            reshard(gathering)
        for group, params, leads in self._averages(at_iterate=not at_iterate):
            if group["averaged"]:
                change(params, leads)
        for group in self._groups():
            group["at_iterate"] = at_iterate

    def _averages(self, *, at_iterate: bool) -> list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]:
        """Return each group with an average that is at the iterate, or is not, with its parameters and their leads.

        Of parameters in parts, it is the part that this process holds.
        """
        optimizer, found = self._optimizer(), []
        for group in self._groups():
            if optimizer is not None and group["at_iterate"] == at_iterate:
                states = [(p, optimizer.state[p]) for p in group["params"] if "lead" in optimizer.state.get(p, {})]
                for parameter, state in states:
                    state["lead"] = state["lead"].to(parameter)
                if states:
                    found.append((group, [held(p) for p, _ in states], [held(state["lead"]) for _, state in states]))
        return found

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups that are averaged; none once the optimizer is gone."""
        optimizer = self._optimizer()
        return [] if optimizer is None else [group for group in optimizer.param_groups if group["averaging"]]
