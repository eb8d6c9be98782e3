"""How a running metric is kept: exact neuron blocks or one block that a layer's units share."""

from relfisher.structures.base import Damping, State, Structure, invert
from relfisher.structures.neuron import NeuronBlocks
from relfisher.structures.shared import SharedBlock

__all__ = ["Damping", "NeuronBlocks", "SharedBlock", "State", "Structure", "invert"]
