"""The metric along training: what a step does to each layer's response, and how much its metric drifts. Section 4.

The paper expects the metric of a layer to vary less if the changes of the responses before it are bounded. `divergence`
is the intrinsic change of a response by a step; `drift` is the variation of a metric.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from relfisher.files import write_atomically
from relfisher.layers import Layer, discover
from relfisher.metric import GroupedMetric, Metric
from relfisher.observe import metric_of, observe
from relfisher.observe.module import Seen
from relfisher.optim.averaging import to_iterate
from relfisher.optim.leads import iterate
from relfisher.responses import Response
from relfisher.validation import check_instance, check_integer, check_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MetricRecord", "MetricRecorder"]


@runtime_checkable
class ScalarWriter(Protocol):
    """A writer of scalars, such as `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Write one number."""


@dataclass(frozen=True)
class MetricRecord:
    """The metric G of a layer before a step, and what the step does to the layer.

    Attributes:
        step: the number of steps before this one.
        layer: the name of the layer.
        largest: the largest eigenvalue of G.
        trace: its trace.
        rank: its numerical rank.
        effective_dimension: tr G (G + l I)^-1, where l is the recorder's damping times the mean eigenvalue.
        length: d' G d, the squared length of the step d.
        divergence: the Kullback-Leibler divergence from the layer's response before the step to that after it, for the
            same inputs, in nats; a mean over samples and a sum over units. To second order it is `length` / 2.
        drift: the Frobenius norm of the change of G since the last record, relative to that of the last G; NaN at the
            first record.
        variation: the sum of all drifts so far.
    """

    step: int
    layer: str
    largest: float
    trace: float
    rank: int
    effective_dimension: float
    length: float
    divergence: float
    drift: float
    variation: float


#: The quantities of a record.
_QUANTITIES = tuple(field.name for field in fields(MetricRecord))[2:]


class MetricRecorder:
    """Records the relative metric of each layer along training, on fixed inputs. Section 4.

    A record is taken at every `every`-th step of the optimizer, from the first one on. It takes the weights that the
    step moves: with `RNGD`, those of the iterate, not those of the average that the model holds between steps. The
    model runs in evaluation mode; weights, buffers, random numbers and the optimizer's statistics stay as they are.

    Args:
        model: the model.
        optimizer: an optimizer of its parameters, of any kind.
        inputs: the model's inputs: a tensor, a tuple of arguments, or keyword arguments.
        response: the response of the layer whose output the model returns, such as `Categorical()`; None for the
            response of the activation that the model applies to it. The response of all other layers is that of the
            activation after them.
        every: the number of steps between records.
        layers: the names of layers, as in `module_metric`; None for all that the inputs reach.
        damping: the multiple of the mean eigenvalue in the effective dimension.

    Attributes:
        records: one `MetricRecord` per layer and recorded step, in this order.

    Raises:
        ValueError: if a number is out of range, or there is no such layer.
        TypeError: if an argument has the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Any,
        response: Response | None = None,
        *,
        every: int = 100,
        layers: Iterable[str] | None = None,
        damping: float = 0.1,
    ) -> None:
        check_instance("model", model, nn.Module)
        check_instance("optimizer", optimizer, torch.optim.Optimizer)
        check_instance("response", response, Response, optional=True)
        check_integer("every", every)
        check_interval("damping", damping, 0, math.inf)
        self.records: list[MetricRecord] = []
        self._model = model
        self._inputs = inputs
        self._response = response
        self._every = every
        self._damping = damping
        self._layers = _selected(model, layers)
        self._steps = 0
        self._last: dict[str, Metric] = {}
        self._variation: dict[str, float] = {}
        self._before: dict[str, tuple[list[Seen], Tensor]] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def close(self) -> None:
        """Record no more."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> MetricRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, layer: str) -> list[MetricRecord]:
        """Return the records of a layer.

        Args:
            layer: its name.

        Returns:
            Its records, in the order of the steps.

        Raises:
            ValueError: if it has none.
        """
        found = [record for record in self.records if record.layer == layer]
        if not found:
            recorded = ", ".join(dict.fromkeys(repr(record.layer) for record in self.records)) or "none yet"
            raise ValueError(f"layer must be one that was recorded ({recorded}), got {layer!r}")
        return found

    def save(self, path: str | Path) -> None:
        """Write all records as comma-separated values, with their names in the first line.

        Args:
            path: the file, which is replaced if it exists.
        """
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow([field.name for field in fields(MetricRecord)])
        lines.writerows(map(astuple, self.records))
        write_atomically(Path(path), text.getvalue().encode())

    def write_scalars(self, writer: ScalarWriter) -> None:
        """Write all records as scalars named "layer/quantity".

        Args:
            writer: such as `torch.utils.tensorboard.SummaryWriter`.
        """
        for record in self.records:
            for name in _QUANTITIES:
                writer.add_scalar(f"{record.layer}/{name}", getattr(record, name), record.step)

    def figure(self) -> Figure:
        """Draw each quantity against the steps, with one line per layer; needs matplotlib.

        Returns:
            The figure; save it with `figure.savefig(path)`.
        """
        from matplotlib.figure import Figure

        picture = Figure(figsize=(15, 6.4), layout="constrained")
        for axes, name in zip(picture.subplots(2, 4, sharex=True).flat, _QUANTITIES, strict=True):
            for layer in dict.fromkeys(record.layer for record in self.records):
                own = self.of(layer)
                axes.plot([each.step for each in own], [getattr(each, name) for each in own], label=layer)
            axes.set_title(name.replace("_", " "), fontsize=11)
            if name not in ("rank", "effective_dimension", "variation") and self.records:
                axes.set_yscale("log")
            axes.grid(color="#e6e6e6", linewidth=0.8)
        for axes in picture.axes[4:]:
            axes.set_xlabel("step")
        if self.records:
            picture.axes[0].legend(frameon=False, title="layer")
        return picture

    @torch.no_grad()
    def _enter(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Note the samples and weights of each layer before a step."""
        self._before = {}
        if self._steps % self._every:
            return
        to_iterate(optimizer)
        for name, calls in observe(self._model, self._layers, self._inputs).items():
            layer = self._layers[name]
            said = [replace(call, rows=layer.spelled_out(call.rows)) for call in calls]
            if self._response is not None:
                said = [replace(call, response=self._response) if call.is_output else call for call in said]
            self._before[name] = said, layer.matrix([parameter.detach().clone() for parameter in layer.parameters])

    @torch.no_grad()
    def _leave(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Record the step that was taken."""
        for name, (calls, before) in self._before.items():
            layer = self._layers[name]
            after = layer.matrix([iterate(optimizer, parameter) for parameter in layer.parameters])
            self.records.append(self._record(name, layer, calls, (after - before).to(layer.dtype)))
        self._before = {}
        self._steps += 1

    def _record(self, name: str, layer: Layer, calls: Sequence[Seen], step: Tensor) -> MetricRecord:
        try:
            metric = metric_of(layer, calls)
        except ValueError:  # the samples or the information are not finite
            unknown = dict.fromkeys(_QUANTITIES, math.nan)
            return MetricRecord(self._steps, name, **{**unknown, "rank": 0})  # type: ignore[arg-type]
        narrow = _within_span(metric)
        values = narrow.eigvalsh().clamp(min=0)
        trace = float(metric.trace())
        damping = self._damping * trace / metric.shape[0]
        drift = _drift(self._last.get(name), metric)
        self._last[name] = metric
        self._variation[name] = self._variation.get(name, 0.0) + (drift if math.isfinite(drift) else 0.0)
        return MetricRecord(
            step=self._steps,
            layer=name,
            largest=float(values[-1]),
            trace=trace,
            rank=narrow.rank(),
            effective_dimension=float((values / (values + damping)).sum()) if damping else float((values > 0).sum()),
            length=float(metric.inner(step, step)),
            divergence=_divergence(calls, step),
            drift=drift,
            variation=self._variation[name],
        )


def _selected(model: nn.Module, names: Iterable[str] | None) -> dict[str, Layer]:
    """Return the layers of a model by name, all or some of them."""
    known = {layer.name: layer for layer in discover(model).layers}
    if names is None:
        return known
    chosen = list(names)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"layers must be among {', '.join(map(repr, known))}, got {unknown[0]!r}")
    return {name: known[name] for name in chosen}


def _parts(metric: Any) -> list[Any]:
    """Return the metrics of a layer's groups."""
    return metric.metrics if isinstance(metric, GroupedMetric) else [metric]


def _within_span(metric: Metric) -> Metric:
    """Return a metric with the same eigenvalues other than 0, and fewer others if there are fewer samples."""
    parts = [part.within_span() for part in _parts(metric)]
    return GroupedMetric(parts) if isinstance(metric, GroupedMetric) else parts[0]


def _drift(last: Metric | None, metric: Metric) -> float:
    """Return |G - G'| / |G'| in the Frobenius norm, for G' of the last record; NaN if there is none."""
    if last is None:
        return math.nan
    pairs = list(zip(_parts(metric), _parts(last), strict=True))
    before = float(sum(old.overlap(old) for _, old in pairs))
    change = float(sum(new.overlap(new) - 2 * new.overlap(old) + old.overlap(old) for new, old in pairs))
    return math.sqrt(max(change, 0.0) / before) if before else math.nan


def _divergence(calls: Sequence[Seen], step: Tensor) -> float:
    """Return the divergence of the responses of all calls by a step; NaN if a response does not define it."""
    total, samples = 0.0, 0
    for call in calls:
        x, z = call.rows.x.double(), call.rows.z.double()  # a step may be no larger than rounding errors of float32
        try:
            total += float(call.response.divergence(z, z + x @ step.double().mT).sum())
        except NotImplementedError:
            return math.nan
        samples += z.shape[-2]
    return total / samples
