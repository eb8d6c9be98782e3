"""Optimizers in the relative metric."""

from relfisher.optim.assignment import assign
from relfisher.optim.rngd import RNGD, Health, HealthWarning

__all__ = ["RNGD", "Health", "HealthWarning", "assign"]
