"""Relative Fisher information metrics and relative natural gradient descent for PyTorch.

A trainer writes `RNGD(model)` where `Adam(model.parameters())` stood. After Sun & Nielsen, "Relative Natural Gradient
for Learning Large Complex Models", 2016.
"""

from relfisher import responses
from relfisher.optim import RNGD
from relfisher.structures import Damping

__version__ = "0.1.0"

__all__ = ["RNGD", "Damping", "responses"]
