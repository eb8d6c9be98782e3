"""Optimizers in the relative metric."""

from relfisher.optim.assignment import assign
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.rngd import RNGD

__all__ = ["RNGD", "Health", "HealthWarning", "assign"]
