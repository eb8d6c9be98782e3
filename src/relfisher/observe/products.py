"""Products of inputs with a matrix of parameters, whichever function makes them: linear, matmul, @, addmm, einsum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from relfisher.layers import Call, Layer, LinearOperation
from relfisher.observe.takers import tensors_in

__all__ = ["Product", "Products", "product"]

See = Callable[[Layer, Call, Tensor], None]

# Functions that only look at a product, before a bias is added to it.
_LOOKS = frozenset({"get", "size", "dim"})


class Product(NamedTuple):
    """z = x W' + b, or x W + b if W is turned.

    Attributes:
        x: the inputs [*n, in].
        weight: W, [out, in], or [in, out] if it is turned.
        bias: b; None if nothing, or something else, is added.
        turned: whether the weight is [in, out].
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    turned: bool


class Products:
    """The products with some matrices inside of one call of their module.

    A product is seen when its result is used, since a bias may be added first.

    Args:
        matrices: the matrices.
        see: called with each layer, the call with its input, and the output.

    Attributes:
        mixed: the matrices with products of different forms.
    """

    def __init__(self, matrices: Iterable[LinearOperation], see: See) -> None:
        self._matrices = {id(matrix.weight): matrix for matrix in matrices}
        self._see = see
        self.mixed: set[LinearOperation] = set()
        self._turned: dict[int, tuple[Tensor, Tensor]] = {}  # matrices and their transposes, by these
        self._open: dict[int, tuple[LinearOperation, Product, Tensor]] = {}  # products that nothing has used, by z
        self._adding: tuple[LinearOperation, Product] | None = None  # the product whose bias is being added

    def before(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See the products that a function is about to use, unless it adds their bias."""
        if not self._open or name in _LOOKS:
            return
        for used in tensors_in([*args, *kwargs.values()]):
            if id(used) in self._open:
                matrix, found, z = self._open.pop(id(used))
                if name == "add" and not kwargs and any(each is matrix.bias for each in args):
                    self._adding = matrix, found._replace(bias=matrix.bias)
                else:
                    self._found(matrix, found, z)

    def after(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what a function made."""
        if not self._matrices:
            return
        if self._adding is not None:
            (matrix, found), self._adding = self._adding, None
            self._found(matrix, found, result)
        elif args and id(args[0]) in self._matrices and _is_turned(args[0], result):
            self._turned[id(result)] = args[0], result
        else:
            self._note(product(name, args, kwargs), result)

    def finish(self) -> None:
        """See the products that nothing has used."""
        while self._open:
            self._found(*self._open.popitem()[1])

    def _note(self, found: Product | None, z: Any) -> None:
        if found is None:
            return
        whole = self._turned.get(id(found.weight), (None,))[0]
        if whole is not None:
            found = found._replace(weight=whole, turned=not found.turned)
        matrix = self._matrices.get(id(found.weight))
        if matrix is None:
            return
        if found.bias is None and matrix.bias is not None:
            self._open[id(z)] = matrix, found, z
        else:
            self._found(matrix, found, z)

    def _found(self, matrix: LinearOperation, found: Product, z: Tensor) -> None:
        with_bias = found.bias is not None and found.bias is matrix.bias
        if matrix.settle(turned=found.turned, with_bias=with_bias):
            self._see(matrix, Call((found.x,), {}, z), z)
        else:
            self.mixed.add(matrix)


def product(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """Return what a function multiplies; None if it is no such product.

    Args:
        name: the canonical name of the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    match name, args:
        case "linear", _:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            return Product(given["input"], given["weight"], given.get("bias"), turned=False)
        case (("matmul" | "mm"), (Tensor() as x, Tensor() as weight)):
            return Product(x, weight, None, turned=True)
        case "addmm", (bias, Tensor() as x, Tensor() as weight) if not kwargs:
            return Product(x, weight, bias, turned=True)
        case "einsum", ((str(equation), Tensor() as one, Tensor() as other) | (str(equation), [one, other])):
            return _of_equation(equation, one, other) or _of_equation(_swapped(equation), other, one)
    return None


def _swapped(equation: str) -> str:
    inputs, arrow, output = equation.partition("->")
    return ",".join(reversed(inputs.split(","))) + arrow + output


def _of_equation(equation: str, x: Tensor, weight: Tensor) -> Product | None:
    """Return the product of an equation such as `bi,oi->bo` or `...i,io->...o`; None if it is another."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    of_x, _, of_weight = inputs.partition(",")
    if not of_x or not output or of_x[:-1] != output[:-1]:
        return None
    shared, unit = of_x[-1], output[-1]
    if shared == unit or shared in of_x[:-1] or unit in of_x:
        return None
    if of_weight not in (unit + shared, shared + unit):
        return None
    return Product(x, weight, None, turned=of_weight == shared + unit)


def _is_turned(matrix: Any, result: object) -> bool:
    """Return whether a result is the transpose of a matrix, in the same memory."""
    return (
        isinstance(result, Tensor)
        and result.ndim == 2
        and result.stride() == matrix.stride()[::-1]
        and result.shape == matrix.shape[::-1]
        and result.data_ptr() == matrix.data_ptr()
        and result is not matrix
    )
