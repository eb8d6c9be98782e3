"""The metric of a subsystem as one linear operator, and the closed forms of the paper."""

from relfisher.metric.base import Metric, SingularMetricError
from relfisher.metric.blocks import BlockMetric, DiagonalMetric, KroneckerMetric
from relfisher.metric.closed_forms import layer_metric, neuron_metric, softmax_metric, two_layer_metric
from relfisher.metric.combined import BatchedMetric, GroupedMetric, TransformedMetric
from relfisher.metric.dense import DenseMetric
from relfisher.metric.iterative import ConvergenceWarning
from relfisher.metric.joint import AdjustedMetric, JointMetric
from relfisher.metric.layer import LayerMetric
from relfisher.metric.operator import IndefiniteMetricError

__all__ = [
    "AdjustedMetric",
    "BatchedMetric",
    "BlockMetric",
    "ConvergenceWarning",
    "DenseMetric",
    "DiagonalMetric",
    "GroupedMetric",
    "IndefiniteMetricError",
    "JointMetric",
    "KroneckerMetric",
    "LayerMetric",
    "Metric",
    "SingularMetricError",
    "TransformedMetric",
    "layer_metric",
    "neuron_metric",
    "softmax_metric",
    "two_layer_metric",
]
