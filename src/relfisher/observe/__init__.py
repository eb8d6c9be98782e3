"""Observation of a running model: the roles of its layers, and the statistics of their samples."""

from relfisher.observe.activations import Responses, check_responses, register_activation, response_of
from relfisher.observe.messages import MaskWarning, ResponseWarning, TiedWarning, UncoveredWarning
from relfisher.observe.module import metric_of, module_metric, observe, survey
from relfisher.observe.observer import Observer
from relfisher.observe.roles import Role
from relfisher.observe.statistics import Reading
from relfisher.observe.trace import Trace

__all__ = [
    "MaskWarning",
    "Observer",
    "Reading",
    "ResponseWarning",
    "Responses",
    "Role",
    "TiedWarning",
    "Trace",
    "UncoveredWarning",
    "check_responses",
    "metric_of",
    "module_metric",
    "observe",
    "register_activation",
    "response_of",
    "survey",
]
