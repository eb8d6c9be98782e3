"""Chains of pointwise functions of one pre-activation, such as sin(30 z) or z sigmoid(z): together one activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from relfisher.observe.activations import POINTWISE, canonical_name, without_wrapper

__all__ = ["AFFINE", "Chain", "Start", "continued"]

#: These keep a function linear if they take it once.
AFFINE = frozenset({"add", "sub", "rsub", "mul", "div", "truediv", "neg", "positive"})

# A chain that is longer is no activation.
_LONGEST = 32


@dataclass(frozen=True)
class Start:
    """The pre-activation itself."""

    size = 0
    is_affine = True

    def __call__(self, z: Tensor) -> Tensor:
        """Return a copy, which the next function may overwrite."""
        return z.clone()

    def __repr__(self) -> str:
        return "z"


@dataclass(frozen=True)
class Chain:
    """A pointwise function of torch, with chains and constants as its arguments. Compares by value.

    Args:
        function: the function.
        args: its positional arguments.
        options: its other arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, z: Tensor) -> Tensor:
        """Return the function of pre-activations."""
        args = [each(z) if isinstance(each, Start | Chain) else each for each in self.args]
        result: Tensor = self.function(*args, **dict(self.options))
        return result

    @property
    def parts(self) -> list[Start | Chain]:
        """The chains among the arguments."""
        return [each for each in self.args if isinstance(each, Start | Chain)]

    @property
    def size(self) -> int:
        """The number of calls."""
        return 1 + sum(part.size for part in self.parts)

    @property
    def is_scaling(self) -> bool:
        """Whether the last function only scales and shifts."""
        return canonical_name(self.function) in AFFINE and len(self.parts) == 1

    @property
    def is_affine(self) -> bool:
        """Whether all of it only scales and shifts."""
        return self.is_scaling and self.parts[0].is_affine

    @property
    def is_activation(self) -> bool:
        """Whether it is a function other than a line, and short."""
        return not self.is_affine and self.size <= _LONGEST

    def __repr__(self) -> str:
        return f"{canonical_name(self.function)}({', '.join(map(repr, self.args))})"


def continued(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    chains: Mapping[int, Start | Chain],
) -> Chain | None:
    """Return what a call makes of chains and constants; None if it is no pointwise function of them alone.

    Args:
        function: the function of torch.
        args: its positional arguments.
        kwargs: its keyword arguments.
        chains: the chains among the tensors, by identity.
    """
    if canonical_name(function) not in POINTWISE or any(isinstance(each, Tensor) for each in kwargs.values()):
        return None
    operands = [_operand(each, chains) for each in args]
    if any(each is NotImplemented for each in operands):
        return None
    options = tuple(sorted((key, value) for key, value in kwargs.items() if key != "inplace"))
    chain = Chain(without_wrapper(function), tuple(operands), options)
    return chain if chain.parts and chain.size <= _LONGEST + 1 and _is_smooth(chain) else None


def _operand(given: Any, chains: Mapping[int, Start | Chain]) -> Any:
    """Return an argument as the argument of a chain; NotImplemented if it is another tensor."""
    if id(given) in chains:
        return chains[id(given)]
    return NotImplemented if isinstance(given, Tensor) else given


def _is_smooth(chain: Chain) -> bool:
    """Return whether the derivative is finite everywhere: powers are natural numbers, divisors constant."""
    name = canonical_name(chain.function)
    if name == "pow":
        exponent = chain.args[1] if len(chain.args) == 2 else None
        return isinstance(exponent, int | float) and exponent >= 1 and exponent == int(exponent)
    if name in ("div", "truediv"):
        reflected = chain.function.__name__.startswith("__r")  # a number divided by the pre-activation
        return not reflected and isinstance(chain.args[0], Start | Chain) and len(chain.parts) == 1
    return True
