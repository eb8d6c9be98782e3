"""Options by layer: `{"head": ..., "encoder.*": ..., "Embedding": ..., "first": ...}`."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from relfisher.layers import Layer
from relfisher.observe import Role

__all__ = ["ROLES", "check_keys", "entry"]

#: Names of roles: layers that read the model's raw inputs, and layers whose outputs are softmax logits.
ROLES = ("first", "head")

Value = TypeVar("Value")


def entry(options: Mapping[str, Value], layer: Layer, role: Role | None = None) -> Value | None:
    """Return the value of the key that matches a layer most specifically, or None if no key matches.

    A key is the name of a layer or of its module, the name of a role, a name pattern as in `fnmatch`, or the name of a
    module class, in this order of precedence.
    """
    ranked = sorted((rank, place) for place, key in enumerate(options) if (rank := _rank(key, layer, role)) is not None)
    return list(options.values())[ranked[0][1]] if ranked else None


def check_keys(
    argument: str, options: Mapping[str, object], layers: Sequence[Layer], roles: Iterable[str] = ()
) -> None:
    """Raise ValueError unless each key matches a layer, or is a role that is allowed.

    Args:
        argument: the name of the argument, for the message.
        options: the options whose keys are checked.
        layers: all layers of the model.
        roles: the allowed roles.

    Raises:
        ValueError: if a key does not match; the message suggests similar names.
    """
    for key in options:
        if key not in roles and all(_rank(key, layer, None) is None for layer in layers):
            near = difflib.get_close_matches(str(key), [layer.name for layer in layers], n=3, cutoff=0.5)
            hint = f"; similar names are {', '.join(map(repr, near))}" if near else ""
            allowed = "layer, pattern or class" + (f", nor one of {', '.join(roles)}," if roles else "")
            raise ValueError(f"{argument} names {key!r}, which is no {allowed} with a metric{hint}")


def _rank(key: str, layer: Layer, role: Role | None) -> int | None:
    """Return the precedence of a key for a layer, 0 for its exact name; None if it does not match."""
    names = {layer.name, layer.module_name}
    if key in names:
        return 0
    if role is not None and ((key == "first" and role.reads_input) or (key == "head" and role.is_head)):
        return 1
    if any(fnmatch.fnmatchcase(name, key) for name in names):
        return 2
    return 3 if key in {kind.__name__ for kind in type(layer.module).__mro__} else None
