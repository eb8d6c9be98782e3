"""Check arguments: each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LARGEST_RATE",
    "check_bool",
    "check_callable",
    "check_finite",
    "check_floating",
    "check_instance",
    "check_integer",
    "check_interval",
    "check_keys_are_names",
    "check_matrix",
    "check_one_of",
    "check_positive",
    "check_rate",
    "check_scalar",
    "check_sequence",
]

# Rates beyond this could only turn weights into infinity.
LARGEST_RATE = 1e6


def _number(name: str, value: object) -> Any:
    """Return `value`, or raise TypeError unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def check_integer(name: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number of at least `low` and at most `high`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]  # it is a number
        allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_keys_are_names(name: str, options: Mapping[Any, object]) -> None:
    """Raise TypeError unless all keys of an option by layer are strings."""
    for key in options:
        if not isinstance(key, str):
            raise TypeError(f"the keys of {name} must be names of layers, got {key!r}")


def check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_callable(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a function or another callable."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")


def check_instance(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raise TypeError unless `value` is an instance of a class, or None if that is allowed."""
    if not (isinstance(value, kind) or (optional and value is None)):
        raise TypeError(f"{name} must be of the class {kind.__name__}{' or None' * optional}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0."""
    number = _number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def check_rate(name: str, value: object) -> None:
    """Raise unless `value` is a learning rate: a number above 0 that moves no weight to infinity in one step."""
    check_interval(name, value, 0, LARGEST_RATE, closed="right")


def check_sequence(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tuple or a list."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple or a list, got {value!r}")


def check_interval(name: str, value: object, low: float, high: float, *, closed: str = "left") -> None:
    """Raise ValueError unless `value` lies between `low` and `high`.

    Args:
        name: the argument's name, for the message.
        value: the value; NaN is never allowed.
        low: the lower end of the interval.
        high: the upper end of the interval.
        closed: "left" for [low, high), "right" for (low, high], "both" for [low, high].

    Raises:
        ValueError: if `value` is out of range.
    """
    number = _number(name, value)
    inside = low <= number <= high and (closed == "both" or number != (low if closed == "right" else high))
    if not inside:
        ends = f"{'(' if closed == 'right' else '['}{low:.2g}, {high:.2g}{')' if closed == 'left' else ']'}"
        raise ValueError(f"{name} must lie in {ends}, got {value}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` is empty or holds NaN or infinity."""
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values of {tensor.numel()}")


def check_matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None, axes: str) -> None:
    """Raise unless `tensor` is a finite floating-point matrix of the expected shape.

    Args:
        name: the argument's name, for the message.
        tensor: the tensor to check.
        rows: the expected number of rows; None allows any.
        columns: the expected number of columns; None allows any.
        axes: the expected axes in words, such as "[out, in]".

    Raises:
        ValueError: if the shape is wrong, or a value is not finite.
        TypeError: if `tensor` is not a real floating-point tensor.
    """
    check_floating(name, tensor)
    wrong_rows = tensor.ndim == 2 and rows is not None and tensor.shape[0] != rows
    wrong_columns = tensor.ndim == 2 and columns is not None and tensor.shape[1] != columns
    if tensor.ndim != 2 or wrong_rows or wrong_columns:
        expected = ", ".join("any" if size is None else str(size) for size in (rows, columns))
        raise ValueError(f"{name} must have shape {axes} = [{expected}], got {list(tensor.shape)}")
    check_finite(name, tensor)


def check_scalar(name: str, value: object) -> None:
    """Raise unless `value` can be a loss: one finite real number, as a tensor with a gradient.

    Args:
        name: the name of what returned it, for the message.
        value: the value to check.

    Raises:
        TypeError: if `value` is not a real floating-point tensor, or has no gradient.
        ValueError: if it is not one finite number.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
        raise TypeError(f"{name} must return a scalar tensor with a floating-point dtype, got {got}")
    if value.numel() != 1 or not bool(torch.isfinite(value).all()):
        got = str(float(value.detach())) if value.numel() == 1 else f"a tensor of shape {list(value.shape)}"
        raise ValueError(f"{name} must return one finite number, got {got}")
    if not value.requires_grad:
        raise TypeError(f"{name} must return a tensor computed from the model's output, got one without a gradient")
