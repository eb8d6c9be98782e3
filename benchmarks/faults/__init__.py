"""Faults that are provoked on purpose, a module for each kind, and the count of those that were survived."""

from faults.tally import Tally

__all__ = ["Tally"]
