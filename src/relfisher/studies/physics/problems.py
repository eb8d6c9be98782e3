"""All problems of the race by error, by name."""

from __future__ import annotations

from relfisher.studies.physics.equation import Equation
from relfisher.studies.physics.equations import EQUATIONS
from relfisher.studies.physics.fields import FIELDS
from relfisher.studies.physics.maps import MAPS

__all__ = ["PROBLEMS"]

PROBLEMS: dict[str, Equation] = EQUATIONS | FIELDS | MAPS
