"""Between torch modules and metrics: which parameters have one, and what the samples of their layer are."""

from relfisher.subsystems.activations import response_of
from relfisher.subsystems.base import Call, Gathered, Part, Subsystem
from relfisher.subsystems.capture import Capture, MaskWarning, ResponseWarning, TiedWarning
from relfisher.subsystems.discover import Discovery, discover, subsystems_of
from relfisher.subsystems.module import module_metric, observe, survey
from relfisher.subsystems.samples import Rows, Sampling
from relfisher.subsystems.watch import ActivationWatch

__all__ = [
    "ActivationWatch",
    "Call",
    "Capture",
    "Discovery",
    "Gathered",
    "MaskWarning",
    "Part",
    "ResponseWarning",
    "Rows",
    "Sampling",
    "Subsystem",
    "TiedWarning",
    "discover",
    "module_metric",
    "observe",
    "response_of",
    "subsystems_of",
    "survey",
]
