"""Between torch modules and metrics: which layer feeds which activation, and what its samples are."""

from relfisher.subsystems.activations import response_of
from relfisher.subsystems.capture import Capture, ResponseWarning
from relfisher.subsystems.discover import ActivationWatch, linear_subsystems
from relfisher.subsystems.linear import LinearSubsystem
from relfisher.subsystems.module import module_metric, observe

__all__ = [
    "ActivationWatch",
    "Capture",
    "LinearSubsystem",
    "ResponseWarning",
    "linear_subsystems",
    "module_metric",
    "observe",
    "response_of",
]
