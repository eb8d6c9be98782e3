"""The average of the iterates, which a model holds between steps, while its training passes run at the last iterate.

The iterate z takes the steps, and x is its average over the last part of the run. With t iterates so far and a window
of the share a of them,

    x <- x + c (z - x),  c = min(1, 1 / (a t)),

which weighs the i-th iterate in proportion to i^(1/a - 1): polynomial-decay averaging, Shamir & Zhang 2013. Averages of
iterates go back to Polyak & Juditsky 1992. A gradient at z has seen the noise of the steps, which one at x has not.

Only the lead z - x is stored. If weights are changed from outside, x and z move with them. But where the average is to
come back after a pass without a step, and the weights were changed since the pass, they may be others that were loaded:
they stay, and the lead is 0. A group whose average was off starts a new one. Where a lead in bfloat16 is rounded, x
moves by the error, not z.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relfisher.observe.entries import roots_of
from relfisher.observe.hooks import Hook, inner_hook
from relfisher.observe.tensors import all_tensors
from relfisher.optim.leads import Averages, Lead, share_of_last
from relfisher.optim.outcome import Outcome
from relfisher.optim.rounding import Rounding
from relfisher.optim.running import RunningStatistics
from relfisher.shards import held, reshard, sharding

__all__ = ["Averaging", "to_iterate"]


def to_iterate(optimizer: torch.optim.Optimizer) -> None:
    """Put the last iterate into the model, which the next step does anyway; other optimizers have no other weights."""
    averaging = getattr(optimizer, "_averaging", None)
    if isinstance(averaging, Averaging):
        averaging.to_iterate()


class _Arrival(NamedTuple):
    """Averages that were moved to the iterate, and what tells of each parameter whether it was changed since.

    Attributes:
        averages: the parameters and their leads.
        memory: the values then, in the same memory.
        versions: how often each parameter was changed in place.
    """

    averages: Averages
    memory: list[Tensor]
    versions: list[int]

    def follow(self) -> None:
        """Let the leads of parameters that were changed be 0, unless only their device or dtype was.

        They were changed in place, but not through their `data`, or were given other memory.
        """
        _, parameters, leads = self.averages
        for parameter, lead, memory, version in zip(parameters, leads, self.memory, self.versions, strict=True):
            same = parameter._version == version and parameter.is_set_to(memory)
            if not same and _is_like(parameter, memory):
                lead.zero_()

    def leave(self) -> None:
        """Move the parameters back to the average, those that are on their devices."""
        _, parameters, leads = self.averages
        for parameter, lead, memory in zip(parameters, leads, self.memory, strict=True):
            if _is_like(parameter, memory):
                parameter.sub_(lead)


class Averaging:
    """Moves a model's weights between the average and the last iterate.

    A training pass with gradients, of the model or of any part of it with weights, moves the weights to the iterate;
    the step that follows moves them to the new average. What was computed of the weights before, such as a penalty, is
    differentiated at the iterate. A pass that began in parts that are in evaluation mode stays at the average.

    Args:
        model: the model.
        optimizer: its optimizer. Its groups have the keys "averaging", the window's share of the run, "averaged", the
            number of iterates so far, and "at_iterate". Its states have a "lead" for each averaged parameter.
        lead: how leads are kept.
    """

    def __init__(self, model: nn.Module | None, optimizer: torch.optim.Optimizer, lead: Lead) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._lead = lead
        self._arrivals: list[_Arrival] = []
        self._arrived = False  # at the iterate, all groups, as far as this knows
        self._in_use = False  # at the average, by a part in evaluation mode, maybe in a graph that goes on
        self._steps = 0
        # What a pass gathers of the weights would be behind, so that the weights move first.
        self._gathering = None if model is None or not sharding(model) else weakref.ref(model)
        self._running = RunningStatistics(nn.Module() if model is None else model)
        self._handles = [] if model is None else self._hooked(model)

    def _hooked(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook the calls of a model and of all parts of it that may be called first."""
        roots = roots_of(model)
        parts = [part for part in model.modules() if next(part.parameters(recurse=False), None) is not None]
        parts += [child for root in roots for child in root.children() if _has_weights(child)]
        hooks = dict.fromkeys(parts, inner_hook(model)(self._enter, trains=True))
        hooks |= dict.fromkeys(roots, Hook(self._enter, trains=True))
        return [
            module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for module, hook in hooks.items()
        ]

    def to_iterate(self) -> None:
        """Put the last iterate into the model."""
        if any(not group["at_iterate"] for group in self._groups()):
            self._move(at_iterate=True)

    @torch.no_grad()
    def to_average(self) -> None:
        """Put the average into the model."""
        for arrival in self._arrivals:
            arrival.follow()
            if self._optimizer() is None:  # it took its states along
                arrival.leave()
        self._move(at_iterate=False)

    def skip(self) -> None:
        """Put the average into the model, as it was before the passes of a step that is not taken."""
        self.to_average()
        self._end()
        self._running.restore()

    def loaded(self) -> None:
        """Note that the groups say anew whether the weights are at the iterate."""
        self._arrivals, self._arrived = [], False

    def _end(self) -> None:
        """Note the end of a step."""
        self._arrivals, self._arrived, self._in_use = [], False, False
        self._steps += 1

    @contextmanager
    def stepping(self) -> Iterator[Callable[[Outcome], None]]:
        """Average the iterate that a step makes.

        Yields:
            A function to call with the outcome of the step; without it the average stays as it is.
        """
        self.to_iterate()
        self._start_anew()
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
                    self._running.average(outcome, share_of_last(group))  # of the first group, if they differ
            for each, means in zip(averages, kept, strict=True):
                each.update(means, taken, rounding)
            for group in self._groups():
                group["at_iterate"] = False
            self._end()

    def _start_anew(self) -> None:
        """Forget the averages of groups whose average is off."""
        for group in self._all_groups():
            if group["averaged"] and not group["averaging"]:
                group |= {"averaged": 0, "at_iterate": False}
                for parameter in group["params"]:
                    lead = self._states().get(parameter, {}).get("lead")
                    if lead is not None:
                        held(lead).zero_()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Put the average into the model for a while, or until the step if that comes first."""
        moved = any(group["at_iterate"] for group in self._groups())
        self.to_average()
        steps = self._steps
        try:
            yield
        finally:
            if moved and steps == self._steps:
                self.to_iterate()

    def close(self) -> None:
        """Put the average into the model, and remove the hooks."""
        self.to_average()
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: object, kwargs: object) -> None:
        if self._arrived:
            return
        if not module.training:
            self._in_use |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            return
        with torch._C.DisableTorchFunction():
            if self._in_use and any(given.grad_fn is not None for given in all_tensors([args, kwargs])):
                return
            if any(not group["at_iterate"] for group in self._groups()):  # the first hook moves all
                self._move(at_iterate=True, unseen=True)
                self._running.remember(self._all_groups())
        self._arrived = True

    @torch.no_grad()
    def _move(self, *, at_iterate: bool, unseen: bool = False) -> None:
        """Change the weights by their leads, which are 0 before the first step, where they are not moved yet.

        Args:
            at_iterate: whether they move to the iterate.
            unseen: True hides the change from autograd, which would refuse what was computed of the weights before.
        """
        gathering = None if self._gathering is None else self._gathering()
        if gathering is not None and any(group["at_iterate"] != at_iterate for group in self._groups()):
            reshard(gathering)
        for each in self._averages(at_iterate=not at_iterate):
            moves = each.group["averaged"]
            if at_iterate:
                memory = [parameter.data for parameter in each.parameters]
                if moves:
                    torch._foreach_add_(memory if unseen else each.parameters, each.leads)
                self._arrivals.append(_Arrival(each, memory, [parameter._version for parameter in each.parameters]))
            elif moves:
                torch._foreach_sub_(each.parameters, each.leads)
        for group in self._groups():
            group["at_iterate"] = at_iterate
        if not at_iterate:
            self._arrivals = []
        self._arrived = at_iterate

    def _averages(self, *, at_iterate: bool) -> list[Averages]:
        """Return the averages of each group that is at the iterate, or is not; what is frozen has none any more."""
        states = self._states()
        found: list[Averages] = []
        for group in self._groups():
            if group["at_iterate"] == at_iterate:
                precise, low = Averages(group, [], []), Averages(group, [], [])
                self._lead.complete(group, states)  # some were frozen
                for parameter in group["params"]:
                    lead = states.get(parameter, {}).get("lead")
                    if lead is None:
                        continue
                    if not parameter.requires_grad:
                        if at_iterate:
                            held(parameter).sub_(held(lead))
                        del states[parameter]["lead"]
                        continue
                    dtype = self._lead.dtype_for(parameter)
                    if lead.dtype != dtype or lead.device != parameter.device:
                        lead = states[parameter]["lead"] = lead.to(parameter.device, dtype)
                    own = precise if dtype == parameter.dtype else low
                    own.parameters.append(held(parameter))
                    own.leads.append(held(lead))
                found += [own for own in (precise, low) if own.parameters]
        return found

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups that are averaged."""
        return [group for group in self._all_groups() if group["averaging"]]

    def _all_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the optimizer; none once it is gone."""
        optimizer = self._optimizer()
        return [] if optimizer is None else optimizer.param_groups

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        """Return the states of the optimizer."""
        optimizer = self._optimizer()
        return {} if optimizer is None else optimizer.state


def _is_like(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype


def _has_weights(module: nn.Module) -> bool:
    """Return whether a pass of a module depends on weights, its own or those of modules inside."""
    return next(module.parameters(), None) is not None
