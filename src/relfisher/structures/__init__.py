"""How a running metric is kept: exact neuron blocks, a block that units share, Kronecker factors or a diagonal."""

from relfisher.structures.base import Cost, Damping, Form, State, Structure, invert
from relfisher.structures.diagonal import Diagonal
from relfisher.structures.kronecker import KroneckerFactors
from relfisher.structures.neuron import NeuronBlocks
from relfisher.structures.shared import SharedBlock

__all__ = [
    "Cost",
    "Damping",
    "Diagonal",
    "Form",
    "KroneckerFactors",
    "NeuronBlocks",
    "SharedBlock",
    "State",
    "Structure",
    "invert",
]
