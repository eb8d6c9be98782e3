"""A subsystem: parameters of a module as one matrix [out, d], and what the module's calls are samples of.

Every kind of layer here is linear in its parameters, z = W x~ for each sample and position. A kind says what x~ is: the
input of a linear layer, a patch of a convolution, a normalised channel and 1, a one-hot token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from relfisher.metric import GroupedMetric, LayerMetric, Metric
from relfisher.responses import LinearGaussian, Response, UnitResponse
from relfisher.shapes import Float
from relfisher.structures import Diagonal, State, Structure
from relfisher.subsystems.samples import Rows, Sampling

__all__ = ["Call", "Gathered", "Kinds", "Part", "Subsystem"]


Kinds = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Call:
    """One forward call of a module.

    Args:
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned.
        random_state: of the CPU's and the device's generator before the call, where a subsystem asked for them.
        shared: what the subsystems of a module find out once for all of them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    random_state: tuple[Tensor, Tensor | None] | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def input(self, place: int = 0, name: str = "input") -> Tensor:
        """Return an argument by its place or name; one that is alone may have any name."""
        found: Any = self.kwargs[name] if name in self.kwargs else [*self.args, *self.kwargs.values()][place]
        return (found.data if isinstance(found, PackedSequence) else found).detach()

    def argument(self, place: int, name: str) -> Any:
        """Return an argument as it was given, by its name or place; None if it was not given."""
        return self.kwargs.get(name, self.args[place] if len(self.args) > place else None)

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """Draw the random numbers of the call once more; the generators are then as they were before.

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


@dataclass
class Gathered:
    """Statistics summed over so many samples."""

    totals: State
    samples: int

    def add(self, other: Gathered) -> None:
        """Add those of other samples, in place."""
        for name, total in self.totals.items():
            total.add_(other.totals[name])
        self.samples += other.samples


@dataclass(frozen=True)
class Part:
    """Some columns of a subsystem's matrix.

    Args:
        parameter: where they are kept.
        view: turns a tensor of the parameter's shape into a view [*g, out, ...] of all that belongs to the subsystem.
    """

    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor]


class Subsystem(ABC):
    """Parameters of a module with a metric of their own.

    Args:
        name: the module's dotted name in the model, and what part of the module it is where there are several.
        module: the module whose calls are its samples.
        parts: its columns from left to right; the first part's parameter is the key of its state.
        shape: [*g, out, d] of its matrix.

    Attributes:
        response: what its units say; linear until the activation that follows is known.
        following: the linear layer that takes its activated units and is all that does, once that is known.
        is_head: whether its outputs are the logits of a softmax; None as long as that is not known.
        structure: how its running metric is kept; None until it is chosen.
        rule: what the structure is chosen by.
        held: parameters of the layer that are not for us to move.
        refused: why it has no metric after all; None as long as nothing speaks against one.
    """

    #: The modules that have such a subsystem.
    kinds: ClassVar[Kinds]
    #: True if the module's output is the pre-activation, so that the activation that follows says its response.
    followed: bool = True
    #: What its name has behind its module's name.
    suffix: str = ""
    #: True if the samples depend on random numbers that the call drew.
    random: bool = False
    #: The structures that can be asked for; the first one is what "auto" takes where no other pays.
    structures: tuple[str, ...] = ("shared", "neuron", "kronecker", "diagonal")

    def __init__(self, name: str, module: nn.Module, parts: Sequence[Part], shape: tuple[int, ...]) -> None:
        self.name = name
        self.module: Any = module
        self.parts = tuple(parts)
        self.shape = shape
        self._views = [part.view(part.parameter).shape for part in self.parts]
        self._widths = [math.prod(view[len(shape) - 1 :]) for view in self._views]
        self.response: UnitResponse = LinearGaussian()
        self.following: nn.Linear | None = None
        self.is_head: bool | None = None
        self.structure: Structure | None = None
        self.rule: str | Structure = "auto"
        self.held: frozenset[nn.Parameter] = frozenset()
        self.refused: str | None = None

    @classmethod
    @abstractmethod
    def found_in(cls, name: str, module: Any) -> list[Subsystem]:
        """Return the subsystems of a module of one of `kinds`; none if the module is used in a way that has none."""

    @abstractmethod
    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the samples of a call, in the dtypes that the call had."""

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the state is kept with."""
        return self.parts[0].parameter

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What it moves."""
        return [part.parameter for part in self.parts]

    @property
    def module_name(self) -> str:
        """The dotted name of its module, which it shares with the module's other subsystems."""
        return self.name.removesuffix(self.suffix)

    @property
    def d(self) -> int:
        """The number of augmented inputs: parameters of one unit."""
        return self.shape[-1]

    @property
    def out(self) -> int:
        """The number of units (of each group, where there are groups)."""
        return self.shape[-2]

    def moving(self) -> list[bool]:
        """Return for each part whether it is to move."""
        return [part.parameter.requires_grad and self._is_ours(part) for part in self.parts]

    def frozen(self) -> Tensor | None:
        """Return True for the columns [d] that are not to move; None if there is no such column."""
        moving = self.moving()
        if all(moving):
            return None
        stuck = torch.tensor([not each for each in moving], device=self.weight.device)
        return stuck.repeat_interleave(torch.tensor(self._widths, device=self.weight.device))

    def output(self, output: Any) -> Tensor | None:
        """Return the tensor of a call's output through which gradients flow back, or None if there is none."""
        return output if isinstance(output, Tensor) else None

    def said(self, call: Call) -> Tensor:
        """Return the output of a call, apart from the graph."""
        output = self.output(call.output)
        if output is None:
            raise TypeError(f"{self.name} must return a tensor, got {type(call.output).__name__}")
        return output.detach()

    def metric(self, rows: Rows, response: Response | None = None) -> Metric:
        """Return the metric over samples, of the units' own response or of another one."""
        rows = self._cast(self.spelled_out(rows))
        groups = [Rows(*group) for group in zip(*rows, strict=True)] if rows.x.ndim == 3 else [rows]
        metrics = [LayerMetric((response or self.response).operator(z), x, bias=False) for x, z in groups]
        return GroupedMetric(metrics) if rows.x.ndim == 3 else metrics[0]

    def spelled_out(self, rows: Rows) -> Rows:
        """Return samples with dense inputs."""
        return Rows(rows.x.to_dense(), rows.z) if rows.x.is_sparse else rows

    def hold(self, rows: Rows) -> Rows:
        """Return the samples of a call in the dtype of the state, sharing no memory with it."""
        return Rows(*(tensor.clone() for tensor in self._cast(rows)))

    def gather(self, rows: Rows, structure: Structure) -> Gathered:
        """Return the statistics of samples."""
        with torch.no_grad(), torch.autocast(rows.x.device.type, enabled=False):
            x, z = self._read(rows, structure)
            return Gathered(structure.gather(x, z, self.response), x.shape[-2])

    def fold(self, batch: Rows | Gathered, structure: Structure, state: State, decay: float) -> bool:
        """Fold samples, or their statistics, into the average of a state; see `Structure.update`."""
        if isinstance(batch, Gathered):
            return structure.update(state, batch.totals, batch.samples, decay)
        with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
            return structure.fold(state, *self._read(batch, structure), self.response, decay)

    def _read(self, rows: Rows, structure: Structure) -> Rows:
        """Return samples as a structure reads them: only one can read sparse ones."""
        return self._cast(rows if isinstance(structure, Diagonal) else self.spelled_out(rows))

    def _cast(self, rows: Rows) -> Rows:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return Rows(rows.x.detach().to(dtype), rows.z.detach().to(dtype))

    def gradient(self) -> Float[Tensor, "*g out d"] | None:
        """Return the loss gradient as one matrix, or None where no part has one; a part that stays counts as 0."""
        gradients = [part.parameter.grad if self._is_ours(part) else None for part in self.parts]
        if all(gradient is None for gradient in gradients):
            return None
        columns = [
            part.view(torch.zeros_like(part.parameter) if gradient is None else _dense(gradient)).flatten(
                len(self.shape) - 1
            )
            for part, gradient in zip(self.parts, gradients, strict=True)
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def move(self, step: Float[Tensor, "*g out d"], scale: float) -> None:
        """Add `scale * step` to the parts that have a gradient and are to move, in place."""
        for part, columns in zip(self.parts, self.split(step), strict=True):
            if part.parameter.grad is not None and self._is_ours(part):
                part.view(part.parameter).add_(columns, alpha=scale)

    def replace_gradient(self, gradient: Float[Tensor, "*g out d"]) -> None:
        """Write a matrix over the gradients of the parts that have one and are to move."""
        for part, columns in zip(self.parts, self.split(gradient), strict=True):
            if part.parameter.grad is not None and self._is_ours(part):
                if part.parameter.grad.is_sparse:
                    part.parameter.grad = part.parameter.grad.to_dense()
                part.view(part.parameter.grad).copy_(columns)

    def _is_ours(self, part: Part) -> bool:
        """Return whether a part is for us to move; most layers have none that is not."""
        return not self.held or part.parameter not in self.held

    def split(self, step: Float[Tensor, "*g out d"]) -> list[Tensor]:
        """Return a matrix of the subsystem's shape as one tensor a part, in the shape of the part's view."""
        columns = step.split_with_sizes(self._widths, dim=-1)
        pairs = zip(columns, self._views, strict=True)
        return [each if each.shape == shape else each.reshape(shape) for each, shape in pairs]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
