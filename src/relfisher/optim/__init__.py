"""Optimizers that use the relative metric."""

from relfisher.observe import UncoveredWarning
from relfisher.optim.assignment import assign, register_structure
from relfisher.optim.expected import expect
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.options import AdamWOptions, MetricOptions
from relfisher.optim.owners import OwnerWarning
from relfisher.optim.planning import Coverage, Plan, coverage, plan
from relfisher.optim.preconditioner import Preconditioner
from relfisher.optim.residual import ResidualRNGD
from relfisher.optim.rngd import RNGD
from relfisher.optim.rules.choice import register_rule

__all__ = [
    "RNGD",
    "AdamWOptions",
    "Coverage",
    "Health",
    "HealthWarning",
    "MetricOptions",
    "OwnerWarning",
    "Plan",
    "Preconditioner",
    "ResidualRNGD",
    "UncoveredWarning",
    "assign",
    "coverage",
    "expect",
    "plan",
    "register_rule",
    "register_structure",
]
