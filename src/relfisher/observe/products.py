"""Products of inputs with parameters, whichever function makes them: linear, matmul, @, addmm, bmm, einsum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from relfisher.layers import Call, Chart, EmbeddingLayer, Layer, LinearOperation
from relfisher.observe.computations import Computations
from relfisher.observe.tensors import tensors_in

__all__ = ["Product", "Products", "products"]

See = Callable[[Layer, Call, Tensor], None]
Matrix = LinearOperation | EmbeddingLayer

# Functions that only look at a product, before a bias is added to it.
_LOOKS = frozenset({"get", "size", "dim"})


class Product(NamedTuple):
    """z = x W' + b, or x W + b if W is turned; for each matrix if W is a stack of them.

    Attributes:
        given: the inputs as they were given.
        x: the inputs [*n, in], or [*n, stack, in].
        weight: W [*stack, out, in], or [*stack, in, out] if it is turned.
        bias: b; None if nothing, or something else, is added.
        turned: whether the last axis of the weight holds the units.
        order: the axes of z in the order [*n, *stack, out]; None if they are.
        chart: how the weight is computed from parameters; None if it is one.
    """

    given: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    turned: bool
    order: tuple[int, ...] | None = None
    chart: Chart | None = None

    def arranged(self, z: Tensor) -> Tensor:
        """Return z as [*n, *stack, out]."""
        return z if self.order is None else z.permute(self.order)

    def is_added(self, bias: Tensor, z: Tensor) -> bool:
        """Return whether a tensor that is added to z is the same number for all samples of a unit."""
        pairs = zip(bias.shape[::-1], z.shape[::-1], strict=False)
        if bias.ndim > z.ndim or any(mine not in (1, its) for mine, its in pairs):
            return False
        spread = self.arranged(bias.detach().expand(z.shape))
        samples = spread.ndim - self.weight.ndim + 1
        pairs = zip(spread.stride()[:samples], spread.shape[:samples], strict=True)
        return all(stride == 0 or size == 1 for stride, size in pairs)


class Products:
    """The products with some matrices, or stacks of them, inside of one call of a module.

    A product is seen when its result is used, since a bias may be added first.

    Args:
        matrices: the matrices.
        computations: how tensors are computed from parameters.
        see: called with each layer, the call with its input, and the output.

    Attributes:
        mixed: the matrices with products of different forms, or other uses.
        kept: tensors by identity that functions may take, beside parameters and what is computed from them.
    """

    def __init__(self, matrices: Sequence[Matrix], computations: Computations, see: See) -> None:
        self._matrices = {id(matrix.weight): matrix for matrix in matrices}
        self._named = {matrix.parts[0].attribute: matrix for matrix in self._matrices.values()}
        self._computations = computations
        self._charts: dict[Matrix, Chart | None] = {}
        self._biases = {id(bias) for matrix in matrices if (bias := matrix.bias) is not None}
        self._see = see
        self.mixed: set[Layer] = set()
        self._turned: dict[int, tuple[Tensor, Tensor]] = {}  # matrices and their transposes, by these
        self._reshaped: dict[int, tuple[Tensor, Tensor]] = {}  # biases and their views, by these
        self._open: dict[int, tuple[Matrix, Product, Tensor]] = {}  # products that nothing has used, by z
        self.kept = self._turned, self._reshaped, self._open
        self._adding: tuple[Matrix, Product] | None = None  # the product whose bias is being added

    def before(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See the products that a function is about to use, unless it adds their bias."""
        if not self._open or name in _LOOKS:
            return
        for used in tensors_in([*args, *kwargs.values()]):
            if id(used) in self._open:
                matrix, found, z = self._open.pop(id(used))
                added = [each for each in args if each is not used and self._bias(each) is matrix.bias]
                if name == "add" and not kwargs and added and found.is_added(added[0], z):
                    self._adding = matrix, found._replace(bias=matrix.bias)
                else:
                    self._found(matrix, found, z)

    def after(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> bool:
        """Note what a function made; return whether it made a product, or added its bias."""
        if self._adding is not None:
            (matrix, found), self._adding = self._adding, None
            self._found(matrix, found, result)
            return True
        if args and id(args[0]) in self._matrices and _is_turned(args[0], result):
            self._turned[id(result)] = args[0], result
        elif args and id(args[0]) in self._biases and _is_view(args[0], result):
            self._reshaped[id(result)] = args[0], result
        return any(self._note(found, result) for found in products(name, args, kwargs, result))

    def finish(self) -> None:
        """See the products that nothing has used."""
        while self._open:
            self._found(*self._open.popitem()[1])

    def _bias(self, given: Any) -> Any:
        return self._reshaped.get(id(given), (given,))[0]

    def note_use(self, given: Iterable[Tensor]) -> None:
        """Note matrices among what a function takes together with data, other than to multiply by them."""
        for each in given:
            whole = self._turned.get(id(each), (each,))[0]
            names = self._computations.names(whole)
            self.mixed |= {self._named[name] for name in names if name in self._named}

    def _note(self, found: Product, z: Any) -> bool:
        """Note a product, if it is one of data with a matrix."""
        whole = self._turned.get(id(found.weight), (None,))[0]
        if whole is not None:
            found = found._replace(weight=whole, turned=not found.turned)
        chart = self._computations.chart(found.weight)
        matrix = self._matrices.get(id(found.weight)) if chart is None else self._named.get(chart.attribute)
        if matrix is None or self._computations.holds(found.given):
            return False
        found = found._replace(chart=chart)
        if found.bias is None and matrix.bias is not None:
            self._open[id(z)] = matrix, found, z
        else:
            is_bias = self._bias(found.bias) is matrix.bias and found.bias is not None and found.is_added(found.bias, z)
            self._found(matrix, found._replace(bias=matrix.bias if is_bias else None), z)
        return True

    def _found(self, matrix: Matrix, found: Product, z: Tensor) -> None:
        alike = self._charts.setdefault(matrix, found.chart) == found.chart
        if alike and matrix.settle_as(turned=found.turned, with_bias=found.bias is not None, chart=found.chart):
            self._see(matrix, Call((found.x, found.given), {}, found.arranged(z)), z)
        else:
            self.mixed.add(matrix)


def products(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], z: Any) -> list[Product]:
    """Return what a function multiplied: of two operands, each may be the weight. There is none if it is no product.

    Args:
        name: the canonical name of the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        z: the result.
    """
    match name, args:
        case "linear", _:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            return [Product(given["input"], given["input"], given["weight"], given.get("bias"), turned=False)]
        case (("matmul" | "mm" | "bmm"), (Tensor() as x, Tensor() as weight)) if not kwargs:
            found = [_of_matrices(x, weight, None, z)]
        case (("addmm" | "baddbmm"), (bias, Tensor() as x, Tensor() as weight)) if not kwargs:
            found = [_of_matrices(x, weight, bias, z)]
        case "einsum", ((str(equation), Tensor() as one, Tensor() as other) | (str(equation), [one, other])):
            found = [_of_equation(equation, one, other), _of_equation(_swapped(equation), other, one)]
        case _:
            found = []
    return [each for each in found if each is not None]


def _of_matrices(x: Tensor, weight: Tensor, bias: Any, z: Tensor) -> Product | None:
    """Return the product with a matrix [in, out], or with a stack of them [stack, in, out] and inputs [*, n, in]."""
    if weight.ndim < 3:
        return Product(x, x, weight, bias, turned=True)
    if weight.ndim > 3 or x.ndim < 2:
        return None
    axes = range(z.ndim)
    order = (*axes[:-3], axes[-2], axes[-3], axes[-1])
    arranged = x.expand(*z.shape[:-1], x.shape[-1]).permute(order)
    return Product(x, arranged, weight, bias, turned=True, order=order)


def _swapped(equation: str) -> str:
    inputs, arrow, output = equation.partition("->")
    return ",".join(reversed(inputs.split(","))) + arrow + output


def _of_equation(equation: str, x: Tensor, weight: Tensor) -> Product | None:
    """Return the product of an equation such as `bi,oi->bo`, `...i,io->...o` or `bei,eio->beo`; None if it is another.

    A stack of matrices comes first in its own letters; the inputs may lack it, if all matrices take the same.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    of_x, _, of_weight = inputs.partition(",")
    stack, pair = of_weight[:-2], of_weight[-2:]
    if not of_x or not output or len(of_weight) not in (2, 3):
        return None
    if any(len(set(letters.replace("...", ""))) < len(letters.replace("...", "")) for letters in (of_x, of_weight)):
        return None
    units = [letter for letter in pair if letter in output and letter not in of_x]
    shared = [letter for letter in pair if letter in of_x and letter not in output]
    if len(units) != 1 or len(shared) != 1 or stack not in output:
        return None
    leading = of_x.replace("...", "").replace(shared[0], "").replace(stack or " ", "")
    if sorted(output.replace("...", "")) != sorted(leading + stack + units[0]) or ("..." in of_x) != ("..." in output):
        return None
    wide = "..." in of_x
    if wide and not (of_x.startswith("...") and output.startswith("...")):
        return None
    of_inputs = _order(of_x, leading + (stack if stack in of_x else "") + shared[0], x.ndim)
    order = _order(output, leading + stack + units[0], x.ndim + (len(stack) if stack not in of_x else 0))
    arranged = x if of_inputs == tuple(range(x.ndim)) else x.permute(of_inputs)
    if stack and stack not in of_x:
        arranged = arranged.unsqueeze(-2).expand(*arranged.shape[:-1], weight.shape[0], arranged.shape[-1])
    kept = None if order == tuple(range(len(order))) else order
    return Product(x, arranged, weight, None, turned=pair == shared[0] + units[0], order=kept)


def _order(letters: str, wanted: str, axes: int) -> tuple[int, ...]:
    """Return the axes of a tensor with these letters in the wanted order, after those that an ellipsis stands for."""
    named = letters.replace("...", "")
    unnamed = axes - len(named)
    return (*range(unnamed), *(unnamed + named.index(letter) for letter in wanted))


def _is_turned(matrix: Any, result: object) -> bool:
    """Return whether a result is the transpose of a matrix, or of each of a stack, in the same memory."""
    return (
        isinstance(result, Tensor)
        and result is not matrix
        and result.shape == (*matrix.shape[:-2], matrix.shape[-1], matrix.shape[-2])
        and result.stride() == (*matrix.stride()[:-2], matrix.stride(-1), matrix.stride(-2))
        and _is_of_memory(matrix, result)
    )


def _is_of_memory(whole: Tensor, view: Tensor) -> bool:
    """Return whether a tensor is a view of another one from its first number on, outside of torch.func transforms."""
    return view._base is whole and view.storage_offset() == whole.storage_offset()


def _is_view(bias: Any, result: object) -> bool:
    """Return whether a result has the numbers of a bias in another shape."""
    if not isinstance(result, Tensor) or result is bias or not _is_of_memory(bias, result):
        return False
    mine, its = (
        [pair for pair in zip(each.shape, each.stride(), strict=True) if pair[0] > 1] for each in (bias, result)
    )
    return mine == its
