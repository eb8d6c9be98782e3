"""Relative Fisher information metrics and relative natural gradient descent for PyTorch.

A trainer writes `RNGD(model)` where `Adam(model.parameters())` stood; a geometer asks for the metric of a neuron, a
layer, a softmax head, two layers or a subsystem of their own. After Sun & Nielsen, "Relative Natural Gradient for
Learning Large Complex Models", 2016.
"""

from relfisher import responses
from relfisher.autodiff import as_function, fisher, observed_fisher, relative_fisher
from relfisher.diagnostics import balance, compare, unbalance
from relfisher.metric import BatchedMetric, Metric, layer_metric, neuron_metric, softmax_metric, two_layer_metric
from relfisher.optim import RNGD
from relfisher.structures import Damping
from relfisher.subsystems import module_metric

__version__ = "0.1.0"

__all__ = [
    "RNGD",
    "BatchedMetric",
    "Damping",
    "Metric",
    "as_function",
    "balance",
    "compare",
    "fisher",
    "layer_metric",
    "module_metric",
    "neuron_metric",
    "observed_fisher",
    "relative_fisher",
    "responses",
    "softmax_metric",
    "two_layer_metric",
    "unbalance",
]
