"""Registration of named classes, both built-in and user-defined."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

__all__ = ["add_named"]

Kind = TypeVar("Kind", bound=type)


def add_named(what: str, kind: Kind, base: type, named: dict[str, Kind], reserved: Collection[str]) -> Kind:
    """Register a class under its name.

    Args:
        what: the description of the class in messages.
        kind: a subclass of `base` with a `name`.
        base: the required base class.
        named: the registered classes by name; updated in place.
        reserved: names that have another meaning.

    Returns:
        The class, unchanged.

    Raises:
        TypeError: if `kind` is not such a subclass.
        ValueError: if its name is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, base) and isinstance(getattr(kind, "name", None), str)):
        raise TypeError(f"a {what} must be a subclass of {base.__name__} with a name, got {kind!r}")
    name: str = kind.name  # type: ignore[attr-defined]  # checked above
    if named.get(name, kind) is not kind or name in reserved:
        raise ValueError(f"the name of a {what} must be a new one, got {name!r}")
    named[name] = kind
    return kind
