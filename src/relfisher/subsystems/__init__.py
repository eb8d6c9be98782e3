"""Between torch modules and metrics: which layer feeds which activation, and what its samples are."""

from relfisher.subsystems.activations import response_of
from relfisher.subsystems.capture import Capture, ResponseWarning
from relfisher.subsystems.discover import ActivationWatch, linear_subsystems
from relfisher.subsystems.linear import LinearSubsystem

__all__ = ["ActivationWatch", "Capture", "LinearSubsystem", "ResponseWarning", "linear_subsystems", "response_of"]
