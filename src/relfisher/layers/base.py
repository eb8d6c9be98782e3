"""A layer: an operation that is linear in its parameters, z = W x~, with the names of the parameters that it uses.

A kind of layer says which parameters of a module form the matrix W [out, d], and what the samples x~ of a call are: the
input of a linear layer, a patch of a convolution, a normalized channel and 1, a one-hot token. A layer never changes.
What running the model reveals of it is a `Role`, and what an optimizer keeps of it is the optimizer's own record.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from relfisher.layers.samples import Rows, Sampling
from relfisher.metric import GroupedMetric, LayerMetric, Metric
from relfisher.responses import LinearGaussian, Response, UnitResponse
from relfisher.shapes import Float

__all__ = ["Call", "Kinds", "Layer", "Part"]


Kinds = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Call:
    """One forward call of a module.

    Args:
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned.
        random_state: of the CPU's and the device's generator before the call, if a layer of the module needs them.
        shared: results that the layers of one module compute once for all of them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    random_state: tuple[Tensor, Tensor | None] | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def input(self, place: int = 0, name: str = "input") -> Tensor:
        """Return an argument by its place or name; a single argument may have any name."""
        found: Any = self.kwargs[name] if name in self.kwargs else [*self.args, *self.kwargs.values()][place]
        return (found.data if isinstance(found, PackedSequence) else found).detach()

    def argument(self, place: int, name: str) -> Any:
        """Return an argument as it was given, by its name or place; None if it was not given."""
        return self.kwargs.get(name, self.args[place] if len(self.args) > place else None)

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """Draw the call's random numbers again, then restore the generators.

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
    """Some columns of a layer's matrix, kept in one parameter.

    Args:
        attribute: the parameter's name in the layer's module, such as "weight" or "out_proj.bias".
        view: turns a tensor of the parameter's shape into a view [*g, out, ...] of what belongs to the layer.
    """

    attribute: str
    view: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """Parameters of a module that form one matrix with a metric of its own.

    Parameters are found by name each time: whatever tensor stands on the module under that name is the layer's.

    Args:
        module_name: the module's dotted name in the model.
        module: the module whose calls are the layer's samples.
        parts: the matrix's columns from left to right.
        shape: [*g, out, d] of the matrix.
        suffix: follows the module's name in the layer's, if the module has several layers.
    """

    module_name: str
    module: Any
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    suffix: str = ""

    #: The classes of modules that have such a layer.
    kinds: ClassVar[Kinds]
    #: True if the module's output is the pre-activation, so that the activation that follows tells the response.
    followed: ClassVar[bool] = True
    #: True if the samples depend on random numbers that the call drew.
    random: ClassVar[bool] = False
    #: True if a limited sample of the rows is enough; False if all rows go into the statistics of each call.
    sampled: ClassVar[bool] = True
    #: The structures that can be chosen; "auto" takes the first one if no other pays.
    structures: ClassVar[tuple[str, ...]] = ("shared", "neuron", "kronecker", "diagonal")

    @classmethod
    @abstractmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the layers of a module of one of `kinds`; none if the module is used in a way that has none."""

    @abstractmethod
    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the samples of a call, in the dtypes of the call."""

    @property
    def name(self) -> str:
        """The module's dotted name, with the suffix."""
        return self.module_name + self.suffix

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that now stand on the module under the names of the parts."""
        return [kept[key] for kept, key in self._slots]

    @property
    def parameter_names(self) -> list[str]:
        """The parameters' dotted names in the model."""
        prefix = f"{self.module_name}." if self.module_name else ""
        return [prefix + part.attribute for part in self.parts]

    @property
    def weight(self) -> Tensor:
        """The parameter of the first part."""
        kept, key = self._slots[0]
        weight: Tensor = kept[key]
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's statistics and metric: that of its weight, or float32 if that has less precision."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def d(self) -> int:
        """The number of augmented inputs: parameters of one unit."""
        return self.shape[-1]

    @property
    def out(self) -> int:
        """The number of units, of each group if there are groups."""
        return self.shape[-2]

    @property
    def own_response(self) -> UnitResponse:
        """The response of the units as far as the layer itself tells: linear, if it leaves that to an activation."""
        return LinearGaussian()

    @cached_property
    def _slots(self) -> list[tuple[dict[str, Any], str]]:
        """Where each part's parameter is kept: the dictionary of its module, and its key there."""
        paths = [part.attribute.rpartition(".") for part in self.parts]
        return [(self.module.get_submodule(path)._parameters, key) for path, _, key in paths]

    @cached_property
    def _views(self) -> list[torch.Size]:
        return [part.view(found).shape for part, found in zip(self.parts, self.parameters, strict=True)]

    @cached_property
    def widths(self) -> list[int]:
        """The number of columns of each part."""
        return [math.prod(view[len(self.shape) - 1 :]) for view in self._views]

    def output(self, output: Any) -> Tensor | None:
        """Return the tensor of a call's output through which gradients flow back; None if there is none."""
        return output if isinstance(output, Tensor) else None

    def pre_activation(self, call: Call) -> Tensor:
        """Return the output of a call, detached from the graph."""
        output = self.output(call.output)
        if output is None:
            raise TypeError(f"{self.name} must return a tensor, got {type(call.output).__name__}")
        return output.detach()

    def join(self, columns: Sequence[Tensor]) -> Float[Tensor, "*g out d"]:
        """Return one tensor a part, each of its parameter's shape, as the layer's matrix."""
        axes = len(self.shape)
        views = [part.view(each) for part, each in zip(self.parts, columns, strict=True)]
        flat = [view if view.ndim == axes else view.flatten(axes - 1) for view in views]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def split(self, matrix: Float[Tensor, "*g out d"]) -> list[Tensor]:
        """Return a matrix of the layer's shape as one tensor a part, in the shape of the part's view."""
        columns = matrix.split_with_sizes(self.widths, dim=-1)
        pairs = zip(columns, self._views, strict=True)
        return [each if each.shape == shape else each.reshape(shape) for each, shape in pairs]

    def metric(self, rows: Rows, response: Response) -> Metric:
        """Return the metric over samples, for a response of the units."""
        rows = self.cast(self.spelled_out(rows))
        groups = [Rows(*group) for group in zip(*rows, strict=True)] if rows.x.ndim == 3 else [rows]
        metrics = [LayerMetric(response.operator(z), x, bias=False) for x, z in groups]
        return GroupedMetric(metrics) if rows.x.ndim == 3 else metrics[0]

    def spelled_out(self, rows: Rows) -> Rows:
        """Return samples with dense inputs."""
        return Rows(rows.x.to_dense(), rows.z) if rows.x.is_sparse else rows

    def cast(self, rows: Rows) -> Rows:
        """Return samples in the dtype of the statistics."""
        return Rows(rows.x.detach().to(self.dtype), rows.z.detach().to(self.dtype))

    def copied(self, rows: Rows) -> Rows:
        """Return samples in the dtype of the statistics, sharing no memory with the call."""
        return Rows(*(tensor.clone() for tensor in self.cast(rows)))
