"""Step rules: turn gradients and metrics into steps, and determine their length and geometry."""

from relfisher.optim.rules.base import Move, Step, StepRule
from relfisher.optim.rules.normalized import Normalized
from relfisher.optim.rules.spectral import Spectral, polar_factor
from relfisher.optim.rules.trust_region import TrustRegion

__all__ = ["Move", "Normalized", "Spectral", "Step", "StepRule", "TrustRegion", "polar_factor"]
