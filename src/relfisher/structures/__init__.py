"""Representations of a running metric: exact neuron blocks, a shared block, Kronecker factors or a diagonal."""

from relfisher.structures.base import Structure
from relfisher.structures.diagonal import Diagonal
from relfisher.structures.inverse import Factor, Inversion
from relfisher.structures.kronecker import KroneckerFactors
from relfisher.structures.neuron import NeuronBlocks
from relfisher.structures.refresh import refresh_together
from relfisher.structures.shared import SharedBlock
from relfisher.structures.state import Cost, Kept, Samples, State, Statistics

__all__ = [
    "Cost",
    "Diagonal",
    "Factor",
    "Inversion",
    "Kept",
    "KroneckerFactors",
    "NeuronBlocks",
    "Samples",
    "SharedBlock",
    "State",
    "Statistics",
    "Structure",
    "refresh_together",
]
