"""The average of the iterates, which a model holds between steps, while its training passes run at the last iterate.

The iterate z takes the steps, and x is its average over the last part of the run. With t iterates so far and a window
of the share a of them,

    x <- x + c (z - x),  c = min(1, 1 / (a t)),

which weighs the i-th iterate in proportion to i^(1/a - 1): polynomial-decay averaging, Shamir & Zhang 2013. Averages of
iterates go back to Polyak & Juditsky 1992. A gradient at z has seen the noise of the steps, which one at x has not.

Only the lead z - x is stored. If weights are changed from outside, x and z move with them. Where a lead in bfloat16 is
rounded, x moves by the error, not z.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relfisher.observe.hooks import Hook, inner_hook
from relfisher.optim.outcome import Outcome
from relfisher.optim.rounding import Rounding
from relfisher.optim.running import RunningStatistics
from relfisher.shards import held, reshard, sharding
from relfisher.structures import Kept

__all__ = ["Averaging", "Lead", "averaged", "iterate", "to_iterate"]


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


class Lead:
    """The lead of z over x of each averaged parameter.

    Args:
        dtype: the dtype of the leads of real parameters; None for that of the parameter.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the lead for a parameter of this shape."""
        return {"lead": Kept(shape, dtype=self.dtype, parted=True)}

    def dtype_for(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of the lead of a parameter."""
        return self.dtype if self.dtype is not None and parameter.is_floating_point() else parameter.dtype

    def complete(self, group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Create the missing leads of a group's parameters."""
        for parameter in group["params"] if group["averaging"] else ():
            if averaged(parameter) and "lead" not in states[parameter]:
                states[parameter]["lead"] = torch.zeros_like(parameter, dtype=self.dtype_for(parameter))


class _Averages(NamedTuple):
    """Averaged parameters of a group, of those in parts what this process holds, and their leads in the state.

    The leads are all in the precision of their parameters, or all in a lower one.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    leads: list[Tensor]

    @property
    def is_low(self) -> bool:
        """Whether the leads are in a lower precision."""
        return self.leads[0].dtype != self.parameters[0].dtype

    def negated(self) -> list[Tensor]:
        """Return -x, given that the parameters hold z, in place of the leads if they have the precision."""
        if self.is_low:
            return list(torch._foreach_sub(self.leads, self.parameters))
        torch._foreach_sub_(self.leads, self.parameters)
        return self.leads

    def update(self, means: list[Tensor], outcomes: Sequence[Outcome], rounding: Rounding) -> None:
        """Average the new z, which the parameters hold, into x, and let the parameters hold that.

        Args:
            means: -x before, which is replaced.
            outcomes: those of the step.
            rounding: how leads are rounded.
        """
        torch._foreach_add_(means, self.parameters)
        for outcome in outcomes:
            outcome.multiply(means, 1 - _share(self.group))
            if self.is_low:
                self._store(means, outcome, rounding)
        torch._foreach_sub_(self.parameters, self.leads)

    def _store(self, leads: list[Tensor], outcome: Outcome, rounding: Rounding) -> None:
        """Round new leads; if the step is not taken, the old ones stay."""
        for places in _alike(leads):
            old = [self.leads[place] for place in places]
            new = rounding.rounded(torch.cat([leads[place].flatten() for place in places]), old[0].dtype)
            outcome.restore(new, torch.cat([each.flatten() for each in old]))
            parts = torch.split(new, [each.numel() for each in old])
            torch._foreach_copy_(old, [part.view(each.shape) for part, each in zip(parts, old, strict=True)])


class Averaging:
    """Moves a model's weights between the average and the last iterate.

    A training pass with gradients, of the model or of one of its children, moves the weights to the iterate; the step
    that follows moves them to the new average.

    Args:
        model: the model.
        optimizer: its optimizer. Its groups have the keys "averaging", the window's share of the run, "averaged", the
            number of iterates so far, and "at_iterate". Its states have a "lead" for each averaged parameter.
        lead: how leads are kept.
    """

    def __init__(self, model: nn.Module | None, optimizer: torch.optim.Optimizer, lead: Lead) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._lead = lead
        # What a pass gathers of the weights would be behind, so that the weights move first.
        self._gathering = None if model is None or not sharding(model) else weakref.ref(model)
        self._running = RunningStatistics(nn.Module() if model is None else model)
        children = [] if model is None else [child for child in model.children() if _has_weights(child)]
        hooked = [] if model is None else [model, *children]
        outer, inner = Hook(self._enter, trains=True), inner_hook(model)(self._enter, trains=True)
        self._handles = [
            module.register_forward_pre_hook(outer if module is model else inner, prepend=True) for module in hooked
        ]

    def to_iterate(self) -> None:
        """Put the last iterate into the model."""
        if [None for group in self._groups() if not group["at_iterate"]]:
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
        averages = self._averages(at_iterate=True)
        rounding = Rounding(2 * averages[0].group["iteration"] + 1 if averages else 0)
        kept = [each.negated() for each in averages]
        try:
            yield taken.append
        finally:
            for outcome in taken:
                for group in {id(each.group): each.group for each in averages}.values():
                    group["averaged"] += 1
                    self._running.average(outcome, _share(group))  # of the first group, if they differ
            for each, means in zip(averages, kept, strict=True):
                each.update(means, taken, rounding)
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
        if module.training and any(not group["at_iterate"] for group in self._groups()):  # the first hook moves all
            with torch._C.DisableTorchFunction():
                self.to_iterate()
                self._running.remember()

    @torch.no_grad()
    def _move(self, change: Callable[[list[Tensor], list[Tensor]], None], *, at_iterate: bool) -> None:
        """Change the weights by their leads, which are 0 before the first step, where they are not moved yet."""
        gathering = None if self._gathering is None else self._gathering()
        if gathering is not None and any(group["at_iterate"] != at_iterate for group in self._groups()):
            reshard(gathering)
        for each in self._averages(at_iterate=not at_iterate):
            if each.group["averaged"]:
                change(each.parameters, each.leads)
        for group in self._groups():
            group["at_iterate"] = at_iterate

    def _averages(self, *, at_iterate: bool) -> list[_Averages]:
        """Return the averages of each group that is at the iterate, or is not."""
        optimizer = self._optimizer()
        states = {} if optimizer is None else optimizer.state
        found: list[_Averages] = []
        for group in self._groups():
            if group["at_iterate"] == at_iterate:
                precise, low = _Averages(group, [], []), _Averages(group, [], [])
                for parameter in group["params"]:
                    state = states.get(parameter)
                    lead = None if state is None else state.get("lead")
                    dtype = self._lead.dtype_for(parameter)
                    if lead is None:
                        if not averaged(parameter):
                            continue
                        lead = states[parameter]["lead"] = torch.zeros_like(parameter, dtype=dtype)  # it was frozen
                    elif lead.dtype != dtype or lead.device != parameter.device:
                        lead = states[parameter]["lead"] = lead.to(parameter.device, dtype)
                    own = precise if dtype == parameter.dtype else low
                    own.parameters.append(held(parameter))
                    own.leads.append(held(lead))
                found += [own for own in (precise, low) if own.parameters]
        return found

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups that are averaged; none once the optimizer is gone."""
        optimizer = self._optimizer()
        return [] if optimizer is None else [group for group in optimizer.param_groups if group["averaging"]]


def _has_weights(module: nn.Module) -> bool:
    """Return whether a pass of a module depends on weights, its own or those of modules inside."""
    return next(module.parameters(), None) is not None


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of tensors of each device and dtype."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), []).append(place)
    return list(places.values())


def _share(group: Mapping[str, Any]) -> float:
    """Return the share of the last iterate of a group in its average."""
    return min(1.0, 1 / float(group["averaging"] * group["averaged"]))
