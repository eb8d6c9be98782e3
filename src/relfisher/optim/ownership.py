"""Who keeps which tensors in the state of a layer: a structure, a step rule, momentum, the average, AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.assignment import possible
from relfisher.optim.record import Record
from relfisher.structures import Kept, Structure

__all__ = ["Owner", "Ownership"]


@runtime_checkable
class Owner(Protocol):
    """An object that declares tensors in the state of a layer."""

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the tensors for a layer of the shape [*g, out, d], by key."""


class Ownership:
    """The owners of the tensors in the layers' states.

    Args:
        root: True if the factors are roots of the inverse.
        owners: owners of tensors that exist from the start, such as the step rule.
        optional: owners of tensors that may exist, such as the momentum.
        beside: owners of tensors of single parameters, which are in the same states: the average, and AdamW.
    """

    def __init__(
        self, *, root: bool, owners: Sequence[Owner], optional: Sequence[Owner], beside: Sequence[Owner]
    ) -> None:
        self.root = root
        self.owners = tuple(owners)
        self.optional = tuple(optional)
        self.beside_layers = tuple(beside)

    def declares(self, record: Record, *, structures: bool = True) -> dict[str, Kept]:
        """Return all tensors that the state of a layer may contain, by key, with or without its structure's."""
        kept = {"is_head": Kept((), on_host=True, dtype=torch.float32)}
        if not record.layer.settled:  # its shape is not known yet
            return kept
        kept["trainable"] = Kept((len(record.layer.names),), on_host=True, dtype=torch.float32)
        for owner in (*self.owners, *self.optional):
            kept |= owner.declares(record.layer.shape)
        if structures and record.structure is not None:
            kept |= record.structure.declares(record.layer.shape, root=self.root)
        return kept

    def check_keys(self, records: Iterable[Record]) -> None:
        """Raise ValueError if two owners or two layers would keep their tensors in one place."""
        places: dict[int, Record] = {}
        for record in records:
            other = places.setdefault(id(record.key), record)
            if other is not record:
                raise ValueError(
                    f"the layers {other.name!r} and {record.name!r} would keep their metrics with one parameter: a "
                    "layer needs a part of its own that is trained"
                )
            taken = {"trainable", "is_head", *self.keys_beside(record.layer)}
            for structure in possible(record.layer, record.rule):
                taken |= structure.declares(record.layer.shape, root=self.root).keys()
            for owner in (*self.optional, *self.owners):
                declared = owner.declares(record.layer.shape).keys()
                if declared & taken:
                    names = ", ".join(map(repr, sorted(declared & taken)))
                    raise ValueError(f"{type(owner).__name__} declares {names}, which others keep under that name")
                taken |= declared

    def check(self, record: Record, saved: Mapping[str, Any]) -> None:
        """Raise ValueError unless a layer can go on with what was saved of it; nothing is changed.

        Args:
            record: of the layer.
            saved: its state; one without a metric is that of a layer that was frozen, or trained by AdamW.

        Raises:
            ValueError: with what is missing, or what differs.
        """
        layer, name = record.layer, f"the saved state of {record.name!r}"
        if not isinstance(saved, Mapping) or not all(isinstance(value, Tensor) for value in saved.values()):
            raise ValueError(f"{name} must be tensors by name, got {saved!r:.200}")
        own = saved.keys() - self.beside(layer)
        if record.is_refused or not own:
            return
        wanted = {
            "ema_weight",
            "updates",
            "is_head",
            *(key for owner in self.owners for key in owner.declares(layer.shape)),
        }
        missing = sorted(wanted - saved.keys())
        if missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}: load it into an optimizer with the same step rule")
        if not (self.holds_statistics(saved) and layer.settled):
            return
        if self.fitting(record, saved) is None:
            choices = possible(layer, record.rule) if record.structure is None else [record.structure]
            raise self.mismatch(record, choices, saved)

    def mismatch(self, record: Record, choices: Sequence[Structure], saved: Mapping[str, Tensor]) -> ValueError:
        """Return the error for a saved metric that fits none of some structures."""
        layer, own = record.layer, saved.keys() - self.beside(record.layer)
        old = saved["metric"].dtype if "metric" in saved else layer.dtype
        if old != layer.dtype:
            return ValueError(
                f"the metric of {record.name!r} is {old}, but its weights need {layer.dtype}: change the precision of "
                "a model before the first step, or make another optimizer"
            )
        held = {key: tuple(saved[key].shape) for key in sorted(own)}
        labels = ", ".join(dict.fromkeys(structure.label(layer.shape) for structure in choices))
        shapes = {key: kept.shape for key, kept in choices[0].declares(layer.shape, root=self.root).items()}
        return ValueError(
            f"the loaded metric of {record.name!r} has the shapes {held}, but the structure {labels!r} needs "
            f"{shapes if len(choices) == 1 else 'others'}: load it into an optimizer with the same structure, step "
            "rule and dtype"
        )

    def beside(self, layer: Layer) -> set[str]:
        """Return the keys in a layer's state that do not belong to its structure."""
        owners = (*self.owners, *self.optional)
        owned = (key for owner in owners for key in owner.declares(layer.shape))
        return {"trainable", "is_head", *owned, *self.keys_beside(layer)}

    def keys_beside(self, layer: Layer) -> set[str]:
        """Return the keys in a parameter's state that belong to the parameter, not to its layer."""
        return {key for owner in self.beside_layers for key in owner.declares(layer.shape)}

    def present(self, layer: Layer, state: Mapping[str, Tensor]) -> list[Owner]:
        """Return the owners of tensors that a layer's state has but need not have."""
        return [owner for owner in self.optional if owner.declares(layer.shape).keys() <= state.keys()]

    def listed(self, records: Iterable[Record], states: Mapping[Tensor, Mapping[str, Any]]) -> list[str]:
        """Return the names of the parameters that layers train, and of what is kept of those with statistics."""
        own, kept = [], []
        for record in records:
            state = states[record.key]
            own += record.owned_names
            kept += [f"the {key} of {record.name}" for key in state if self.holds_statistics(state)]
        return own + sorted(kept)

    def holds_statistics(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a moving average was updated."""
        return "updates" in state and float(state["updates"]) > 0

    def fitting(self, record: Record, state: Mapping[str, Tensor]) -> Structure | None:
        """Return the structure that a state fits: the layer's, or one that it may get; None if there is none."""
        choices = possible(record.layer, record.rule) if record.structure is None else [record.structure]
        return next((structure for structure in choices if self.fits(record.layer, structure, state)), None)

    def in_use(self, record: Record, given: Sequence[Structure], state: Mapping[str, Tensor]) -> list[Structure]:
        """Return those of some structures that the statistics of a layer have; all if there are none."""
        if not self.holds_statistics(state):
            return list(given)
        return [each for each in given if self.fits(record.layer, each, state)] or list(given)

    def fits(self, layer: Layer, structure: Structure, state: Mapping[str, Tensor]) -> bool:
        """Return whether a state fits the structure and the layer's shape and dtype."""
        wanted = structure.declares(layer.shape, root=self.root)
        return state.keys() - self.beside(layer) == wanted.keys() and all(
            state[key].shape == kept.shape and state[key].dtype == (kept.dtype or layer.dtype)
            for key, kept in wanted.items()
        )
