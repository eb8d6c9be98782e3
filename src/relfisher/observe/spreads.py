"""Parameters that are spread over samples: multiply data element by element, are added to them or put beside them.

Rows that are looked up may be spread, too, such as relative positions. What becomes of them shows which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Call, Chart, Layer, LinearOperation, is_spread, is_table, settle_as_spread
from relfisher.observe.activations import RESHAPING
from relfisher.observe.computations import Computations
from relfisher.observe.lookups import Lookup, Lookups, lookup
from relfisher.observe.tensors import tensors_in

__all__ = ["Spreads"]

See = Callable[[Layer, Call, Tensor], None]

# These change where numbers stand, and how often.
_MOVING = RESHAPING.union(
    "expand expand_as broadcast_to repeat tile repeat_interleave index_select flip roll get".split()
)

# Attributes that do.
_TURNS = ("T", "mT")

# These look at a tensor alone.
_LOOKS = frozenset("size dim numel len stride is_contiguous is_floating_point".split())

# These leave numbers where they are.
_KEEPING = frozenset("contiguous clone to type float double half bfloat16 cpu cuda".split())

# The arguments of functions that normalize, then multiply by a weight and add a bias.
_NORMS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}

# The order in the functions of `torch` itself, where it is another one.
_RUNNING = ("running_mean", "running_var")
_OTHERWISE = {
    getattr(torch, name): ("input", "weight", "bias", *_RUNNING, *_NORMS[name][5:], "cudnn_enabled")
    for name in ("batch_norm", "instance_norm")
}


class _Own(NamedTuple):
    """A tensor that holds the numbers of a parameter.

    Attributes:
        layer: the layer of the parameter.
        places: the place of each number in the parameter, in the shape of the tensor.
        counted: all places in order, of which these may be a view.
        chart: how the tensor is computed from parameters; None if it is moved alone.
        tensor: the tensor.
        lookup: the lookup of rows that it comes from; None if there was none.
    """

    layer: Layer
    places: Tensor
    counted: Tensor
    chart: Chart | None
    tensor: Tensor
    lookup: Lookup | None = None


class Spreads:
    """The parameters that are spread over samples, or looked up, inside of one call of their module.

    Args:
        layers: the layers that may turn out to be spread.
        computations: how tensors are computed from parameters.
        see: called with each layer, the call with its input and places, and the output.

    Attributes:
        mixed: the layers with other uses.
        lookups: those that were looked up.
        kept: as for `Products`.
    """

    def __init__(self, layers: Iterable[Layer], computations: Computations, see: See) -> None:
        self._layers = {id(layer.weight): layer for layer in layers if layer.weight.is_contiguous()}
        self._named = {layer.parts[0].attribute: layer for layer in self._layers.values()}
        self._moved: dict[int, _Own] = {}
        self.kept = (self._moved,)
        self._open: dict[int, _Own] = {}  # rows that were only moved so far, by what was looked up
        self.lookups = Lookups(see)
        self._uses: dict[Layer, tuple[Chart | None, bool]] = {}
        self._computations = computations
        self._see = see
        self.mixed: set[Layer] = set()

    def before(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See the rows that a function is about to use, unless it moves them or may spread them."""
        if not self._open or name in _LOOKS or _is_read(func, name):
            return
        with torch._C.DisableTorchFunction():  # what is done here is no use of a tensor
            for each in tensors_in([*args, *kwargs.values()]):
                own = self._moved.get(id(each))
                if own is not None and own.lookup is not None and not _may_spread(own, own.lookup, name, args):
                    self._use(own.layer, own.lookup, each)

    def after(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> bool:
        """Note what a function made; return whether it moved or spread a parameter."""
        if not self._layers or _is_read(func, name):
            return False
        found = lookup(name, args, kwargs, result)
        if found is not None and not self._computations.holds(found.tokens):
            layer = self._layers.get(id(found.table))
            if isinstance(layer, LinearOperation) and not is_spread(layer):
                self._look_up(layer, found, is_sure=name == "embedding")
                return True
        first = self._own(args[0]) if args else None
        if first is not None and first.chart is None and name in _MOVING:
            self._move(first, func, name, args, kwargs, result)
            return True
        match name, args:
            case (("add" | "sub" | "mul"), (one, other)) if not kwargs:
                return self._join(name, one, other, result) or self._join(name, other, one, result)
            case (("cat" | "concat" | "concatenate"), ([*parts], *_)):
                return self._beside(parts, kwargs.get("dim", args[1] if len(args) > 1 else 0), result)
            case _ if name in _NORMS:
                return self._normalize(func, name, args, kwargs, result)
        return False

    def note_use(self, given: Iterable[Tensor]) -> None:
        """Note parameters among what a function takes together with data in another way."""
        for each in given:
            own = self._moved.get(id(each))
            names = self._computations.names(each)
            self.mixed |= {self._named[key] for key in names if key in self._named}
            if own is not None and own.lookup is not None:
                self._use(own.layer, own.lookup, each)
            elif own is not None:
                self.mixed.add(own.layer)

    def finish(self) -> None:
        """See the rows that nothing has used."""
        for own in list(self._open.values()):
            if own.lookup is not None:
                self._use(own.layer, own.lookup, own.tensor)
        self.mixed |= self.lookups.mixed

    def _look_up(self, layer: Layer, found: Lookup, *, is_sure: bool) -> None:
        """Note rows that were looked up; see them at once if it is sure that they are not spread."""
        if is_sure or is_table(layer):
            self._use(layer, found, found.z)
            return
        counted = torch.arange(found.table.numel(), device=found.table.device)
        places = counted.view(found.table.shape)[found.tokens]
        own = _Own(layer, places, counted, None, found.z, found)
        self._open[id(found.z)] = self._moved[id(found.z)] = own

    def _use(self, layer: Layer, found: Lookup, rows: Tensor) -> None:
        """See rows that are used as those of a table; they are data from then on."""
        self._open.pop(id(found.z), None)
        self.lookups.see(layer, found, rows)

    def _own(self, tensor: Any) -> _Own | None:
        """Return of which parameter a tensor holds the numbers; None if of none."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self._moved:
            own = self._moved[id(tensor)]
            return None if self.lookups.has(own.lookup) else own
        layer, chart = self._layers.get(id(tensor)), None
        if layer is None:
            chart = self._computations.chart(tensor)
            layer = None if chart is None else self._named.get(chart.attribute)
        if layer is None:
            return None
        counted = torch.arange(tensor.numel(), device=tensor.device)
        return _Own(layer, counted.view(tensor.shape), counted, chart, tensor)

    def _move(
        self,
        own: _Own,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> None:
        """Note where the numbers of a parameter stand after a function."""
        try:
            moved = own.places if name in _KEEPING else func(own.places, *args[1:], **kwargs)
        except (RuntimeError, TypeError):  # a view in another dtype, maybe
            return
        several = isinstance(result, tuple | list)
        for each, places in zip(result if several else [result], moved if several else [moved], strict=True):
            if each.shape == places.shape and places.dtype == torch.int64:
                self._moved[id(each)] = now = own._replace(places=places, tensor=each)
                if own.lookup is not None and id(own.lookup.z) in self._open:
                    self._open[id(own.lookup.z)] = now

    def _join(self, name: str, one: Any, other: Any, result: Tensor) -> bool:
        """See the sum or the product of a parameter with data; return False if it is none."""
        own = self._own(one)
        if own is None or not self._is_data(other) or (name == "mul" and other is result):
            return False
        if not (other.requires_grad or _repeats(own.places, result)):  # noise on a weight, maybe
            return False
        return self._spread(own, other if name == "mul" else None, result, result)

    def _beside(self, parts: Sequence[Any], axis: int, result: Tensor) -> bool:
        """See the parameters that are put beside data; return False if there are none."""
        found = [self._own(part) for part in parts]
        if not any(found) or not any(self._is_data(part) for part in parts):
            return False
        start = 0
        for part, own in zip(parts, found, strict=True):
            if own is not None:
                self._spread(own, None, result.detach().narrow(axis, start, part.shape[axis]), result)
            start += part.shape[axis]
        return True

    def _normalize(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> bool:
        """See the weight and the bias of a function that normalizes data; return False if they are no parameters."""
        given: dict[str, Any] = {**dict(zip(_OTHERWISE.get(func, _NORMS[name]), args, strict=False)), **kwargs}
        weight, bias = self._own(given.get("weight")), self._own(given.get("bias"))
        if (weight is None and bias is None) or not self._is_data(given["input"]):
            return False
        if "normalized_shape" not in given:  # the channels are at axis 1
            ahead = (1,) * (result.ndim - 2)
            weight, bias = (own and own._replace(places=own.places.view(-1, *ahead)) for own in (weight, bias))
        if weight is not None:
            self._spread(weight, _normalized(func, given), result, result)
        if bias is not None:
            self._spread(bias, None, result, result)
        return True

    def _is_data(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self._own(tensor) is None and not self._computations.holds(tensor)

    def _spread(self, own: _Own, x: Tensor | None, output: Tensor, z: Tensor) -> bool:
        """See a use of a parameter: its output, and the tensor that holds it."""
        if own.lookup is not None:
            self._open.pop(id(own.lookup.z), None)
        use = own.chart, x is None
        if self._uses.setdefault(own.layer, use) == use and settle_as_spread(own.layer, own.chart):
            self._see(own.layer, Call((own.places, x, own.counted), {}, output), z)
        else:
            self.mixed.add(own.layer)
        return True


def _is_read(func: Callable[..., Any], name: str) -> bool:
    """Return whether a function reads an attribute that holds no moved numbers."""
    return name == "get" and func.__self__.__name__ not in _TURNS  # type: ignore[attr-defined]  # a method


def _may_spread(own: _Own, found: Lookup, name: str, args: tuple[Any, ...]) -> bool:
    """Return whether a function moves rows that were looked up, or takes them in another shape than data.

    Rows in the shape of the data that they are added to, or put beside as they are, are those of an embedding.
    """
    if name in _MOVING and args and args[0] is own.tensor:
        return True
    as_they_are = own.tensor.shape == found.z.shape
    match name, args:
        case (("add" | "sub" | "mul"), (Tensor() as one, Tensor() as other)):
            return not (as_they_are and all(_fits(each.shape, found.z.shape) for each in (one, other)))
        case (("cat" | "concat" | "concatenate"), _):
            return not as_they_are
    return False


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    """Return whether a tensor of a shape is added to one of another without making it larger."""
    pairs = zip(shape[::-1], into[::-1], strict=False)
    return len(shape) <= len(into) and all(mine in (1, its) for mine, its in pairs)


def _normalized(func: Callable[..., Any], given: Mapping[str, Any]) -> Tensor:
    """Return what a function that normalizes multiplies by its weight, and change no running statistics."""
    of_batch = given.get("training", given.get("use_input_stats", False))
    left_out = given.keys() & {"weight", "bias", *(_RUNNING if of_batch else ())}
    bare = {key: None if key in left_out else value for key, value in given.items()}
    x: Tensor = func(**{key: value.detach() if isinstance(value, Tensor) else value for key, value in bare.items()})
    return x


def _repeats(places: Tensor, z: Tensor) -> bool:
    """Return whether several elements of z take the same number."""
    spread = places.expand(z.shape)
    return any(size > 1 and not stride for size, stride in zip(spread.shape, spread.stride(), strict=True))
