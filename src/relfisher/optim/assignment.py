"""Which layer keeps which structure."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from relfisher.responses import Categorical, SigmoidBernoulli, TanhBernoulli
from relfisher.structures import Diagonal, KroneckerFactors, NeuronBlocks, SharedBlock, Structure
from relfisher.subsystems import Subsystem

__all__ = [
    "FALLBACK",
    "Rule",
    "assign",
    "candidates",
    "check_rules",
    "matches",
    "number_bytes",
    "rule_for",
    "state_bytes",
]

#: A rule, or rules by the name (or a pattern of names) or the class of a module.
Rule = str | Structure

#: The rule that leaves a layer to AdamW.
FALLBACK = "fallback"

_NAMED: dict[str, type[Structure]] = {
    kind.name: kind for kind in (NeuronBlocks, SharedBlock, KroneckerFactors, Diagonal)
}
_RULES = ("auto", *_NAMED, "published", FALLBACK)

# Exact blocks pay on saturating units, as long as their refresh is not dear.
_EXACT_SHARE = 4

# Of inverses of wide blocks that "auto" takes: with it the paper's network learns as with full inverses.
_RANK = 64


def check_rules(rules: object, layers: Sequence[Subsystem]) -> None:
    """Raise ValueError unless these are rules, and each name among them is that of a layer."""
    if isinstance(rules, Mapping):
        for key, rule in rules.items():
            check_rules(rule, layers)
            if not any(matches(key, layer) for layer in layers):
                near = difflib.get_close_matches(key, [layer.name for layer in layers], n=3, cutoff=0.5)
                hint = f"; close to it are {', '.join(map(repr, near))}" if near else ""
                raise ValueError(f"structure names {key!r}, which is no layer, pattern or class with a metric{hint}")
    elif not isinstance(rules, Structure) and rules not in _RULES:
        raise ValueError(f"structure must be one of {', '.join(_RULES)}, or a Structure, got {rules!r}")


def rule_for(layer: Subsystem, rules: Rule | Mapping[str, Rule], default: Rule = "auto") -> Rule:
    """Return the rule of one layer.

    Args:
        layer: a subsystem.
        rules: one rule for all, or rules by name: that of a layer or of its module, a pattern of such names as in
            `fnmatch`, or a class of modules such as "Conv2d". Names win over patterns, and patterns over classes. One
            name of a structure for all stands for the diagonal in embeddings, where others take tokens^2 numbers.
        default: the rule of what has no name there.

    Returns:
        The rule.

    Raises:
        ValueError: if the layer cannot keep such a structure.
    """
    if isinstance(rules, str) and rules not in {"auto", FALLBACK} and layer.structures[0] == Diagonal.name:
        return Diagonal.name
    rule = rules if isinstance(rules, str | Structure) else _entry(layer, rules, default)
    name = rule.name if isinstance(rule, Structure) else rule
    if name in _NAMED and name not in layer.structures and isinstance(rules, Mapping):
        raise ValueError(f"structure of {layer.name!r} must be one of {', '.join(layer.structures)}, got {name!r}")
    return rule


def _entry(layer: Subsystem, rules: Mapping[str, Rule], default: Rule) -> Rule:
    exact = [rule for key, rule in rules.items() if matches(key, layer) == "name"]
    pattern = [rule for key, rule in rules.items() if matches(key, layer) == "pattern"]
    kind = [rule for key, rule in rules.items() if matches(key, layer) == "class"]
    return next(iter([*exact, *pattern, *kind]), default)


def matches(key: str, layer: Subsystem) -> str | None:
    """Return how a key names a layer, or None if it does not."""
    names = {layer.name, layer.module_name}
    if key in names:
        return "name"
    if any(fnmatch.fnmatchcase(name, key) for name in names):
        return "pattern"
    return "class" if key in {kind.__name__ for kind in type(layer.module).__mro__} else None


def assign(layers: Sequence[Subsystem], budget: int) -> list[Structure]:
    """Choose a structure for each layer, by its rule.

    Args:
        layers: the layers in the order of the forward pass. Rules are "neuron", "shared", "diagonal", or "kronecker":
            that of a softmax at the head, equation (25), or through the linear layer that takes the units, equation
            (26), where such a one is seen, else of the units' own response; "published" for exact neuron blocks on
            hidden layers and the shared block on the first and last (section 5.2); and "auto". That takes exact blocks
            where they cost no more than others (the channels of a normalisation); a seen Kronecker factor of the
            outputs that is no larger than that of the inputs, if both fit into the budget; exact blocks where the units
            saturate (tanh, sigmoid) and the blocks fit into a quarter of the budget; else the shared block where it
            fits, else the diagonal. Its shared blocks and Kronecker factors of 512 or more are inverted along 64
            leading eigenvectors; `SharedBlock(rank)` and `KroneckerFactors(rank=rank)` take any rank, and the names
            stand for full inverses. A rule that a layer cannot keep gives way to the first one that it can.
        budget: bytes for the metric and the inverse of one layer.

    Returns:
        One structure a layer.
    """
    return [_structure(layer, place in (0, len(layers) - 1), budget) for place, layer in enumerate(layers)]


def _structure(layer: Subsystem, at_an_end: bool, budget: int) -> Structure:
    rule = layer.rule
    if isinstance(rule, Structure):
        return rule
    if rule == "published":
        rule = "shared" if at_an_end else "neuron"
    if rule == "auto":
        return _automatic(layer, budget)
    return _named(layer, rule if rule in layer.structures else layer.structures[0])


def _named(layer: Subsystem, name: str, rank: int | None = None) -> Structure:
    match name:
        case KroneckerFactors.name:
            return _seen_factors(layer, rank) or KroneckerFactors(rank=rank)
        case SharedBlock.name:
            return SharedBlock(rank)
    return _NAMED[name]()


def _automatic(layer: Subsystem, budget: int) -> Structure:
    if layer.out == 1 and "neuron" in layer.structures:
        return NeuronBlocks()
    factors = _seen_factors(layer, _RANK)
    if factors is not None and layer.out <= layer.d and state_bytes(layer, factors) <= budget:
        return factors
    saturating = isinstance(layer.response, (SigmoidBernoulli, TanhBernoulli))
    if saturating and "neuron" in layer.structures and state_bytes(layer, NeuronBlocks()) <= budget // _EXACT_SHARE:
        return NeuronBlocks()
    first = _named(layer, layer.structures[0], _RANK)
    return first if state_bytes(layer, first) <= budget else Diagonal()


def _seen_factors(layer: Subsystem, rank: int | None) -> KroneckerFactors | None:
    """Return Kronecker factors with what the forward pass showed of the outputs, or None if that was nothing."""
    if layer.is_head:
        return KroneckerFactors(Categorical(), rank=rank)
    return None if layer.following is None else KroneckerFactors(through=layer.following, rank=rank)


def candidates(layer: Subsystem) -> list[Structure]:
    """Return the structures that a layer can keep."""
    return [_named(layer, name) for name in layer.structures]


def state_bytes(layer: Subsystem, structure: Structure) -> int:
    """Return the bytes of a layer's metric and inverse."""
    return structure.numbers(layer.shape) * number_bytes(layer)


def number_bytes(layer: Subsystem) -> int:
    """Return the bytes of a number in a layer's state."""
    return max(layer.weight.element_size(), 4)
