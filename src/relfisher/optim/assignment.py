"""Which layer keeps which structure."""

from __future__ import annotations

from collections.abc import Sequence

from relfisher.responses import SigmoidBernoulli, TanhBernoulli
from relfisher.structures import NeuronBlocks, SharedBlock, Structure
from relfisher.subsystems import LinearSubsystem

__all__ = ["assign"]

_RULES = ("auto", "neuron", "shared", "published")

# Exact blocks pay on saturating units; up to this much for the metric and the inverse of one layer.
_AUTO_BYTES = 64 << 20


def assign(rule: str, layers: Sequence[LinearSubsystem]) -> list[Structure]:
    """Choose a structure for each layer.

    Args:
        rule: "neuron" or "shared" for all layers; "published" for exact neuron blocks on hidden layers and the shared
            block on the first and last (section 5.2); "auto" for exact blocks on tanh and sigmoid layers, as far as
            they fit into 64 MiB a layer, and the shared block on all others.
        layers: the layers in the order of the forward pass.

    Returns:
        One structure a layer.

    Raises:
        ValueError: if the rule is not one of these.
    """
    match rule:
        case "neuron":
            return [NeuronBlocks() for _ in layers]
        case "shared":
            return [SharedBlock() for _ in layers]
        case "published":
            ends = (0, len(layers) - 1)
            return [SharedBlock() if place in ends else NeuronBlocks() for place in range(len(layers))]
        case "auto":
            return [NeuronBlocks() if _exact_pays(layer) else SharedBlock() for layer in layers]
    raise ValueError(f"structure must be one of {', '.join(_RULES)}, got {rule!r}")


def _exact_pays(layer: LinearSubsystem) -> bool:
    numbers = 2 * layer.out * layer.d**2
    saturating = isinstance(layer.response, (SigmoidBernoulli, TanhBernoulli))
    return saturating and numbers * layer.weight.element_size() <= _AUTO_BYTES
