"""Relative Fisher information metrics and relative natural gradient descent for PyTorch."""

__version__ = "0.1.0"
