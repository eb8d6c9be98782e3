"""The record of one layer: its role and structure, and its parameters as one matrix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer, keepers
from relfisher.observe import Role
from relfisher.optim.assignment import Rule, Rules, rule_for
from relfisher.optim.routes import to_owners
from relfisher.shapes import Float
from relfisher.shards import all_whole, held, is_part, made_whole, parted, whole
from relfisher.structures import Structure

__all__ = ["LayerView", "Record", "dense", "gathered", "is_computed", "named"]


class LayerView(NamedTuple):
    """A layer as the optimizer sees it.

    Attributes:
        name: the name of the layer.
        role: its role in the model's forward pass; None before the first pass.
        structure: the structure of its metric; None before the role is known, or if the layer is refused.
        group: the index of its group in `param_groups`.
    """

    name: str
    role: Role | None
    structure: Structure | None
    group: int


class Record:
    """The data of an optimizer about one layer; only `Curvature` writes it.

    Args:
        layer: the layer.
        rules: the rules among which that is that chooses its structure, as for `rule_for`.
        not_owned: the names of the parameters that are not owned by this optimizer.

    Attributes:
        role: its role in the model's forward pass; None until it is known.
        structure: the structure of its metric; None until the role is known, or if the layer is refused.
        trainable_before: the parts that were trained at the last update; None before the first update.
        told_without_metric: whether there was a warning that it has a gradient but was not seen.
        metric_in_use: the metric tensor of the state that was last found to fit the structure.
        gathered: whole gradients of the parameters of which each process holds a part, while they are needed.
    """

    def __init__(self, layer: Layer, rules: Rules, not_owned: frozenset[str]) -> None:
        self.layer = layer
        self._rules = rules
        self.not_owned = not_owned
        self.role: Role | None = None
        self.structure: Structure | None = None
        self.trainable_before: list[bool] | None = None
        self.told_without_metric = False
        self.metric_in_use: Tensor | None = None
        self.gathered: list[Tensor | None] = []

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def rule(self) -> Rule:
        """The rule that chooses its structure, as far as its kind is known."""
        return rule_for(self.layer, self._rules)

    @property
    def is_refused(self) -> bool:
        """Whether the layer turned out to have no metric."""
        return self.role is not None and self.role.refused is not None

    @property
    def owned(self) -> list[Tensor]:
        """The parameters that this optimizer trains."""
        if not self.not_owned:
            return self.layer.parameters
        pairs = zip(self.layer.names, self.layer.parameters, strict=True)
        return [parameter for name, parameter in pairs if name not in self.not_owned]

    @property
    def owned_names(self) -> list[str]:
        """The names in the model of the parameters that this optimizer trains."""
        pairs = zip(self.layer.names, self.layer.parameter_names, strict=True)
        return [full for name, full in pairs if name not in self.not_owned]

    @property
    def key(self) -> Tensor:
        """The parameter whose state is the layer's: one that is owned, since torch saves no others."""
        return next(iter(self.owned), self.layer.weight) if self.not_owned else self.layer.weight

    @property
    def is_idle(self) -> bool:
        """Whether the layer is trainable, but none of its parts has a gradient."""
        free = [parameter for parameter in self.owned if parameter.requires_grad]
        return bool(free) and all(parameter.grad is None for parameter in free)

    def trainable(self) -> list[bool]:
        """Return, for each parameter, whether it is trained."""
        if not self.not_owned:
            return [parameter.requires_grad for parameter in self.layer.parameters]
        pairs = zip(self.layer.names, self.layer.parameters, strict=True)
        return [parameter.requires_grad and name not in self.not_owned for name, parameter in pairs]

    def frozen(self) -> Tensor | None:
        """Return a mask [d] of the columns that are not trained; None if all are trained."""
        trainable = [any(own) for _, own in self.layer.by_part(self.trainable())]
        if all(trainable):
            return None
        device = self.layer.weight.device
        stuck = torch.tensor([not each for each in trainable], device=device)
        return stuck.repeat_interleave(torch.tensor(self.layer.widths, device=device))

    def gradients(self, moving: Sequence[Any]) -> list[Tensor | None]:
        """Return the whole loss gradients of the parameters that move; None for others.

        Args:
            moving: the result of `moving`.
        """
        given = self.gathered or [None if each is None else each.grad for each in moving]
        pairs = zip(moving, given, strict=True)
        return [None if own is None or each is None else dense(whole(each)) for own, each in pairs]

    def gradient(self) -> Float[Tensor, "*g out d"] | None:
        """Return the loss gradient as one matrix, with 0 for parts not owned; None if no part has a gradient."""
        found = self.gradients(self.moving())
        if all(gradient is None for gradient in found):
            return None
        with self._whole_values():
            return self.layer.gradient(found)

    def changes(self, step: Float[Tensor, "*g out d"]) -> list[tuple[Tensor, Tensor]]:
        """Return what this process holds of the owned parts that have a gradient, each with its change by a step."""
        moving = self.moving()
        if not self.is_in_parts:
            pairs = zip(self.layer.seen(moving), self.layer.steps(step, moving), strict=True)
            return [(target, change) for target, change in pairs if target is not None and change is not None]
        pairs = zip(moving, self.whole_changes(step), strict=True)
        return [(held(parameter), held(parted(own, parameter))) for parameter, own in pairs if own is not None]

    def whole_changes(self, step: Float[Tensor, "*g out d"]) -> list[Tensor | None]:
        """Return the change of each parameter by a step; None for those that are not owned or have no gradient."""
        changes = [None if each is None else step.new_zeros(each.shape) for each in self.moving()]
        with self._whole_values():
            steps = self.layer.steps(step, changes)
        for target, change in zip(self.layer.seen(changes), steps, strict=True):
            if target is not None:
                target.add_(change)
        return changes

    def replace_gradient(self, gradient: Float[Tensor, "*g out d"]) -> None:
        """Replace the gradients of the owned parts that have one by a matrix."""
        moving = self.moving()
        for parameter in moving:
            if parameter is not None:
                parameter.grad = dense(parameter.grad)
        found = [None if parameter is None else whole(parameter.grad) for parameter in moving]
        with self._whole_values():
            changes = self.layer.steps(gradient, found)
        for target, change in zip(self.layer.seen(found), changes, strict=True):
            if target is not None:
                target.copy_(change)
        for parameter, each in zip(moving, found, strict=True):
            if each is not None and each is not parameter.grad:
                held(parameter.grad).copy_(held(parted(each, parameter)))

    @property
    def is_in_parts(self) -> bool:
        """Whether each process holds a part of the parameters."""
        return is_part(self.layer.weight)

    def _whole_values(self) -> AbstractContextManager[None]:
        """Return a context in which a weight that is computed from parameters can be."""
        needed = self.is_in_parts and is_computed(self.layer)
        return made_whole(keepers(self.layer.module)) if needed else nullcontext()

    def moving(self) -> list[Any]:
        """Return the parameters, and None for those that are not owned or have no gradient."""
        parameters = self.layer.parameters
        if not self.not_owned:
            return [None if parameter.grad is None else parameter for parameter in parameters]
        pairs = zip(self.layer.names, parameters, strict=True)
        return [None if each.grad is None or name in self.not_owned else each for name, each in pairs]


def named(records: Iterable[Record], name: str) -> Record:
    """Return the record of a layer by its name, or raise ValueError if there is none."""
    found = {record.name: record for record in records}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3, cutoff=0.5) or list(found)[:3]
        raise ValueError(f"name must be a layer with a metric, such as {', '.join(map(repr, near))}; got {name!r}")
    return found[name]


def dense(gradient: Tensor | None) -> Tensor:
    """Return the gradient of a parameter that has one, not sparse."""
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def is_computed(layer: Layer) -> bool:
    """Return whether a part of a layer's matrix is computed from parameters."""
    return any(part.chart is not None for part in layer.parts)


@contextmanager
def gathered(records: Iterable[Record], owner: Mapping[Layer, int], group: Any) -> Iterator[None]:
    """Let the records of layers with a metric have whole gradients, which processes send each other together.

    Args:
        records: those of layers whose parameters are in parts.
        owner: the process that needs the gradients of a layer; all processes need those of others.
        group: the group of the processes.

    Yields:
        Nothing.
    """
    kept = [record for record in records if record.structure is not None]
    given = [[parameter.grad for parameter in record.layer.parameters] for record in kept]
    owned = [(each, owner[r.layer]) for r, own in zip(kept, given, strict=True) if r.layer in owner for each in own]
    owned = [(each, rank) for each, rank in owned if each is not None]
    sent = iter(to_owners([each for each, _ in owned], [rank for _, rank in owned], group))
    rest = [each for r, own in zip(kept, given, strict=True) if r.layer not in owner for each in own]
    found = iter(all_whole([each for each in rest if each is not None]))
    for record, own in zip(kept, given, strict=True):
        source: Iterator[Tensor | None] = sent if record.layer in owner else found
        record.gathered = [None if each is None else next(source) for each in own]
    try:
        yield
    finally:
        for record in kept:
            record.gathered = []
