"""Optimizers in the relative metric."""

from relfisher.optim.assignment import assign
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.planning import Coverage, Plan, coverage, plan
from relfisher.optim.preconditioner import Preconditioner
from relfisher.optim.rngd import RNGD

__all__ = [
    "RNGD",
    "Coverage",
    "Health",
    "HealthWarning",
    "Plan",
    "Preconditioner",
    "assign",
    "coverage",
    "plan",
]
