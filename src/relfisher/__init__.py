"""Relative Fisher information metrics and relative natural gradient descent for PyTorch.

To train, write `RNGD(model)` instead of `Adam(model.parameters())`. To study geometry, ask for the metric of a neuron,
a layer, a softmax head, two layers or a subsystem of your own. The library follows Sun & Nielsen, "Relative Natural
Gradient for Learning Large Complex Models", 2016.

Public names are imported on first use, so that `import relfisher` and the command line's help are fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relfisher import responses, testing
    from relfisher.along import MetricRecord, MetricRecorder
    from relfisher.autodiff import as_function, fisher, observed_fisher, relative_fisher
    from relfisher.diagnostics import balance, compare, unbalance
    from relfisher.layers import Layer, register_layer
    from relfisher.logistic import LogisticRegression
    from relfisher.metric import (
        BatchedMetric,
        JointMetric,
        Metric,
        TransformedMetric,
        layer_metric,
        neuron_metric,
        softmax_metric,
        two_layer_metric,
    )
    from relfisher.observe import module_metric, register_activation
    from relfisher.optim import (
        RNGD,
        AdamWOptions,
        MetricOptions,
        Preconditioner,
        ResidualRNGD,
        coverage,
        expect,
        plan,
        register_rule,
        register_structure,
    )
    from relfisher.optim.rules import StepRule, TrustRegion
    from relfisher.structures import Inversion, Structure

__version__ = "0.1.0"

__all__ = [
    "RNGD",
    "AdamWOptions",
    "BatchedMetric",
    "Inversion",
    "JointMetric",
    "Layer",
    "LogisticRegression",
    "Metric",
    "MetricOptions",
    "MetricRecord",
    "MetricRecorder",
    "Preconditioner",
    "ResidualRNGD",
    "StepRule",
    "Structure",
    "TransformedMetric",
    "TrustRegion",
    "as_function",
    "balance",
    "compare",
    "coverage",
    "expect",
    "fisher",
    "layer_metric",
    "module_metric",
    "neuron_metric",
    "observed_fisher",
    "plan",
    "register_activation",
    "register_layer",
    "register_rule",
    "register_structure",
    "relative_fisher",
    "responses",
    "softmax_metric",
    "testing",
    "two_layer_metric",
    "unbalance",
]

_NAMES = {
    "along": "MetricRecord MetricRecorder",
    "autodiff": "as_function fisher observed_fisher relative_fisher",
    "diagnostics": "balance compare unbalance",
    "layers": "Layer register_layer",
    "logistic": "LogisticRegression",
    "metric": (
        "BatchedMetric JointMetric Metric TransformedMetric layer_metric neuron_metric softmax_metric two_layer_metric"
    ),
    "observe": "module_metric register_activation",
    "optim": (
        "RNGD AdamWOptions MetricOptions Preconditioner ResidualRNGD coverage expect plan register_rule "
        "register_structure"
    ),
    "optim.rules": "StepRule TrustRegion",
    "structures": "Inversion Structure",
}
_HOME = {name: home for home, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in ("responses", "testing"):
        return import_module(f"relfisher.{name}")
    if name == "Damping":
        raise AttributeError("relfisher.Damping is now relfisher.Inversion(damping, relative_to=...)")
    if name not in _HOME:
        raise AttributeError(f"module 'relfisher' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"relfisher.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
