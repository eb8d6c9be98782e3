"""A layer: an operation that is linear in its parameters, z = W x~, and the names of these parameters.

A kind of layer defines which parameters of a module form the matrix W [out, d] and what the samples x~ of a call are:
the input of a linear layer, a patch of a convolution, a normalized channel and 1, or a one-hot token. A layer is
immutable, once its shape is settled. What a forward pass shows about it otherwise is a `Role`; the optimizer's data
about it are in the optimizer's record.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from relfisher.layers.chart import Chart
from relfisher.layers.samples import Rows, Sampling
from relfisher.metric import GroupedMetric, LayerMetric, Metric
from relfisher.responses import LinearGaussian, Response, UnitResponse
from relfisher.shapes import Float

__all__ = ["Call", "Kinds", "Layer", "Part"]


Kinds = tuple[type[nn.Module], ...]
T = TypeVar("T")

#: Returns how a tensor is computed from parameters; None if it is not.
Charts = Callable[[Any], Chart | None]


@dataclass(frozen=True)
class Call:
    """One forward call of a module.

    Args:
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned.
        random_state: the states of the CPU and device generators before the call, if a layer of the module needs them.
        shared: results that are computed once and shared by the layers of the module.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    random_state: tuple[Tensor, Tensor | None] | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def input(self, place: int = 0, name: str = "input") -> Tensor:
        """Return an argument by position or name; a single argument may have any name."""
        found: Any = self.kwargs[name] if name in self.kwargs else [*self.args, *self.kwargs.values()][place]
        return (found.data if isinstance(found, PackedSequence) else found).detach()

    def argument(self, place: int, name: str) -> Any:
        """Return an argument unchanged, by name or position; None if it was not given."""
        return self.kwargs.get(name, self.args[place] if len(self.args) > place else None)

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """Replay the random numbers of the call, then restore the generators.

        Yields:
            Nothing.
        """
        if self.random_state is None:
            yield
            return
        host, device = self.random_state
        with torch.random.fork_rng(devices=None if device is not None else []):
            torch.set_rng_state(host)
            if device is not None:
                torch.cuda.set_rng_state(device)
            yield


@dataclass(frozen=True)
class Part:
    """Some columns of a layer's matrix, stored in one parameter or computed from several.

    Args:
        attribute: the parameter's name in the layer's module, such as "weight" or "out_proj.bias".
        view: maps a tensor of the parameter's shape to a view [*g, out, ...] of the layer's share of it.
        chart: how the parameter is computed from others, which are trained; None if it is trained itself.
    """

    attribute: str
    view: Callable[[Tensor], Tensor]
    chart: Chart | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is trained."""
        return (self.attribute,) if self.chart is None else self.chart.names


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """Parameters of a module that form one matrix with its own metric.

    Parameters are looked up by name each time, so that a layer always uses the module's current parameters.

    Args:
        module_name: the module's dotted name in the model.
        module: the module whose calls are the layer's samples.
        parts: the parts of the matrix, from left to right.
        shape: the shape [*g, out, d] of the matrix.
        suffix: appended to the module's name if the module has several layers.
    """

    module_name: str
    module: Any
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    suffix: str = ""

    #: The module classes that have such a layer.
    kinds: ClassVar[Kinds]
    #: True if the module's output is the pre-activation, so that the activation after it determines the response.
    followed: ClassVar[bool] = True
    #: The places of the weight and the bias among the arguments of `operation`.
    places: ClassVar[tuple[int, int]] = (1, 2)
    #: True if the samples depend on random numbers drawn during the call.
    random: ClassVar[bool] = False
    #: True if a limited sample of the rows is enough; False if the statistics use all rows of each call.
    sampled: ClassVar[bool] = True
    #: The available structures; "auto" uses the first one unless another pays off.
    structures: ClassVar[tuple[str, ...]] = ("shared", "neuron", "kronecker", "diagonal")

    @classmethod
    @abstractmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the layers of a module of one of `kinds`; none if the way it is configured is not supported."""

    @abstractmethod
    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the samples of a call in their original dtypes."""

    @property
    def operation(self) -> str | None:
        """The function of `torch.nn.functional` whose calls inside the module are the samples; None for its own."""
        return None

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies inputs by one matrix, as `Linear` does."""
        return False

    @property
    def settled(self) -> bool:
        """Whether it is known what is trained, and in which shape; that of an operation shows when it first runs."""
        return self.operation is None or "_settled" in vars(self)

    def settle(self, parts: tuple[Part, ...], shape: tuple[int, ...]) -> bool:
        """Take on the form of an operation that was seen, unless another one has settled it.

        Args:
            parts: the parts, with charts.
            shape: the shape.

        Returns:
            Whether it has this form.
        """
        if self.settled:
            mine, its = ([(part.view, part.names) for part in each] for each in (self.parts, parts))
            if (mine, self.shape) != (its, shape):
                return False
        elif not all(part.chart is None or part.chart.is_differentiable(self.module) for part in parts):
            return False
        else:
            for key in ("_slots", "views", "widths"):
                vars(self).pop(key, None)
        vars(self).update(parts=parts, shape=shape, _settled=True)  # numbers in what is computed may have changed
        return True

    @property
    def name(self) -> str:
        """The module's dotted name followed by the suffix."""
        return self.module_name + self.suffix

    @property
    def parameters(self) -> list[Tensor]:
        """The module's current parameters that the parts are stored in, or computed from.

        Raises:
            ValueError: if the module has them no longer.
        """
        try:
            return [kept[key] for kept, key in self._slots]
        except KeyError as error:
            raise self._lost(error) from None

    @property
    def parameter_names(self) -> list[str]:
        """The parameters' dotted names in the model."""
        prefix = f"{self.module_name}." if self.module_name else ""
        return [prefix + name for name in self.names]

    @property
    def names(self) -> list[str]:
        """The parameters' dotted names in the module."""
        return [name for part in self.parts for name in part.names]

    @property
    def weight(self) -> Tensor:
        """The first parameter, which is the weight, or the one that is most like it."""
        kept, key = self._slots[0]
        try:
            weight: Tensor = kept[key]
        except KeyError as error:
            raise self._lost(error) from None
        return weight

    def _lost(self, name: KeyError) -> ValueError:
        return ValueError(
            f"{self.name!r} has lost its parameter {name}, as by pruning or a weight normalization: make another "
            "optimizer after that"
        )

    @property
    def is_trained(self) -> bool:
        """Whether a parameter is not frozen."""
        return any(parameter.requires_grad for parameter in self.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the statistics and the metric: the weight's dtype, but at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def d(self) -> int:
        """The number of augmented inputs, that is, of parameters per unit."""
        return self.shape[-1]

    @property
    def fan_in(self) -> int:
        """The number of inputs of a unit that one sample may have."""
        return self.d

    @property
    def out(self) -> int:
        """The number of units, per group if there are groups."""
        return self.shape[-2]

    @property
    def unit_axis(self) -> int | None:
        """The axis of the module's output that holds the units; None if several groups of units share it."""
        return -1 if len(self.shape) == 2 else None

    @property
    def own_response(self) -> UnitResponse:
        """The response that the layer itself defines: linear, if an activation after it may determine the response."""
        return LinearGaussian()

    @cached_property
    def _slots(self) -> list[tuple[dict[str, Any], str]]:
        """The parameter dictionary and the key in it, for each parameter."""
        paths = [name.rpartition(".") for name in self.names]
        return [(self.module.get_submodule(path)._parameters, key) for path, _, key in paths]

    @cached_property
    def views(self) -> list[torch.Size]:
        """The shape of each part's view."""
        shapes = [
            own[0].shape if part.chart is None else part.chart.shape for part, own in self.by_part(self.parameters)
        ]
        pairs = zip(self.parts, shapes, strict=True)
        return [part.view(torch.empty(shape, device="meta")).shape for part, shape in pairs]

    @cached_property
    def widths(self) -> list[int]:
        """The number of columns of each part."""
        return [math.prod(view[len(self.shape) - 1 :]) for view in self.views]

    def is_of(self, call: Call, computed: Charts) -> bool:
        """Return whether a call of the operation takes this layer's parameters, and settle how they are computed.

        Args:
            call: a call of the operation.
            computed: returns how a tensor is computed from parameters; None if it is not.

        Returns:
            Whether it is a call of this layer.
        """
        given = [call.argument(place, name) for place, name in zip(self.places, ("weight", "bias"), strict=True)]
        charts = [computed(each) for each in given]
        parts = []
        for part in self.parts:
            taken = [chart for each, chart in zip(given, charts, strict=True) if self._is_part(part, each, chart)]
            if not taken:
                return False
            parts.append(replace(part, chart=taken[0]))
        return self.settle(tuple(parts), self.shape)

    def _is_part(self, part: Part, given: Any, chart: Chart | None) -> bool:
        """Return whether a tensor is the parameter of a part, or is computed from it."""
        if chart is not None:
            return chart.attribute == part.attribute
        path, _, key = part.attribute.rpartition(".")
        return given is not None and given is self.module.get_submodule(path)._parameters.get(key)

    def output(self, output: Any) -> Tensor | None:
        """Return the tensor of a call's output through which gradients flow back; None if there is none."""
        return output if isinstance(output, Tensor) else None

    def pre_activation(self, call: Call) -> Tensor:
        """Return the output of a call, detached from the graph."""
        output = self.output(call.output)
        if output is None:
            raise TypeError(f"{self.name} must return a tensor, got {type(call.output).__name__}")
        return output.detach()

    def by_part(self, values: Sequence[T]) -> list[tuple[Part, Sequence[T]]]:
        """Return each part with its share of some values, one per parameter."""
        ends = list(accumulate(len(part.names) for part in self.parts))
        return [(part, values[end - len(part.names) : end]) for part, end in zip(self.parts, ends, strict=True)]

    def matrix(self, values: Sequence[Tensor]) -> Float[Tensor, "*g out d"]:
        """Return the layer's matrix for values of its parameters."""
        return self.join([
            own[0] if part.chart is None else part.chart.value(self.module, own) for part, own in self.by_part(values)
        ])

    def gradient(self, gradients: Sequence[Tensor | None]) -> Float[Tensor, "*g out d"]:
        """Return the gradient of the layer's matrix, given those of its parameters; None for those that do not move."""
        columns: list[Any] = []
        for (part, now), (_, own) in zip(self.by_part(self.parameters), self.by_part(gradients), strict=True):
            if all(each is None for each in own):
                shape = now[0].shape if part.chart is None else part.chart.shape
                columns.append(torch.zeros(shape, dtype=now[0].dtype, device=now[0].device))
            else:
                columns.append(own[0] if part.chart is None else part.chart.gradient(self.module, now, own))
        return self.join(columns)

    def steps(self, matrix: Float[Tensor, "*g out d"], moving: Sequence[Any]) -> list[Tensor | None]:
        """Return the changes of the parameters that change the layer's matrix by this, in the shapes of `seen`.

        Args:
            matrix: the change of the matrix.
            moving: None for parameters that do not move.
        """
        found: list[Tensor | None] = []
        pairs = zip(self.by_part(self.parameters), self.by_part(moving), self.split(matrix), strict=True)
        for (part, now), (_, own), columns in pairs:
            if part.chart is None or all(each is None for each in own):
                found += [columns] if part.chart is None else [None] * len(own)
            else:
                step = matrix.new_empty(part.chart.shape)
                part.view(step).copy_(columns)
                found += part.chart.steps(self.module, now, step, own)
        return found

    def seen(self, values: Sequence[Any]) -> list[Any]:
        """Return views of tensors, one per parameter or None, that the changes of `steps` are added to."""
        return [
            value if value is None or part.chart is not None else part.view(value)
            for part, own in self.by_part(values)
            for value in own
        ]

    def join(self, columns: Sequence[Tensor]) -> Float[Tensor, "*g out d"]:
        """Assemble the layer's matrix from one tensor per part, each of its parameter's shape."""
        axes = len(self.shape)
        views = [part.view(each) for part, each in zip(self.parts, columns, strict=True)]
        flat = [view if view.ndim == axes else view.flatten(axes - 1) for view in views]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def split(self, matrix: Float[Tensor, "*g out d"]) -> list[Tensor]:
        """Split a matrix of the layer's shape into one tensor per part, each of the shape of the part's view."""
        columns = matrix.split_with_sizes(self.widths, dim=-1)
        pairs = zip(columns, self.views, strict=True)
        return [each if each.shape == shape else each.reshape(shape) for each, shape in pairs]

    def metric(self, rows: Rows, response: Response) -> Metric:
        """Return the metric over samples for a given response of the units."""
        rows = self.cast(self.spelled_out(rows))
        groups = [Rows(*group) for group in zip(*rows, strict=True)] if rows.x.ndim == 3 else [rows]
        metrics = [LayerMetric(response.operator(z), x, bias=False) for x, z in groups]
        return GroupedMetric(metrics) if rows.x.ndim == 3 else metrics[0]

    def spelled_out(self, rows: Rows) -> Rows:
        """Return the samples with dense inputs."""
        return Rows(rows.x.to_dense(), rows.z) if rows.x.is_sparse else rows

    def cast(self, rows: Rows) -> Rows:
        """Cast samples to the dtype of the statistics."""
        return Rows(rows.x.detach().to(self.dtype), rows.z.detach().to(self.dtype))

    def copied(self, rows: Rows) -> Rows:
        """Copy samples to the dtype of the statistics, without sharing memory with the call."""
        return Rows(*(tensor.clone() for tensor in self.cast(rows)))
