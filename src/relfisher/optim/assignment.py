"""Which layer keeps which structure: from a layer, its role and a rule. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from relfisher.layers import Layer
from relfisher.observe import Role
from relfisher.optim.matching import check_keys, entry
from relfisher.registry import add_named
from relfisher.responses import Categorical, SigmoidBernoulli, TanhBernoulli
from relfisher.structures import Diagonal, KroneckerFactors, NeuronBlocks, SharedBlock, Structure

__all__ = [
    "FALLBACK",
    "Rule",
    "assign",
    "candidates",
    "check_rules",
    "number_bytes",
    "register_structure",
    "rule_for",
    "state_bytes",
]

#: The name of a structure, or a structure.
Rule = str | Structure

#: The rule that leaves a layer to AdamW.
FALLBACK = "fallback"

_NAMED: dict[str, type[Structure]] = {
    kind.name: kind for kind in (NeuronBlocks, SharedBlock, KroneckerFactors, Diagonal)
}
_BUILT_IN = frozenset(_NAMED)
_OTHERS = ("auto", "published", FALLBACK)

# Exact blocks pay on saturating units, as long as their refresh is not dear.
_EXACT_SHARE = 4

# Of inverses of wide blocks that "auto" takes: with it the paper's network learns as with full inverses.
_RANK = 64


def register_structure(kind: type[Structure]) -> type[Structure]:
    """Let a structure of your own be chosen by its name everywhere; it may be used as a decorator.

    `MetricOptions(structure=kind())`, or by layer, does the same for one optimizer alone.

    Args:
        kind: a subclass of `Structure` with a `name`, which is made without arguments.

    Returns:
        The structure.

    Raises:
        TypeError: if it is none.
        ValueError: if its name is taken.
    """
    return add_named("structure", kind, Structure, _NAMED, _OTHERS)


def check_rules(rules: object, layers: Sequence[Layer] | None = None) -> None:
    """Raise ValueError unless these are rules, and, given the layers of a model, each key names some of them."""
    if isinstance(rules, Mapping):
        for rule in rules.values():
            check_rules(rule)
        if layers is not None:
            check_keys("structure", rules, layers)
    elif not isinstance(rules, Structure) and not (isinstance(rules, str) and rules in {*_OTHERS, *_NAMED}):
        names = ", ".join(["auto", *_NAMED, "published", FALLBACK])
        raise ValueError(f"structure must be one of {names}, or a Structure, got {rules!r}")


def rule_for(layer: Layer, rules: Rule | Mapping[str, Rule]) -> Rule:
    """Return the rule of one layer.

    Args:
        layer: the layer.
        rules: one rule for all, or rules by layer, as in `MetricOptions`. The name of one structure for all stands for
            the diagonal in embeddings, where others take tokens^2 numbers.

    Returns:
        The rule; "auto" if none names the layer.

    Raises:
        ValueError: if the layer cannot keep such a structure.
    """
    if isinstance(rules, str) and rules not in {"auto", FALLBACK} and layer.structures[0] == Diagonal.name:
        return Diagonal.name
    if not isinstance(rules, Mapping):
        return rules
    rule = entry(rules, layer) or "auto"
    name = rule.name if isinstance(rule, Structure) else rule
    if name in _BUILT_IN and name not in layer.structures:
        raise ValueError(f"structure of {layer.name!r} must be one of {', '.join(layer.structures)}, got {name!r}")
    return rule


def assign(layers: Mapping[Layer, Role], rules: Mapping[Layer, Rule], budget: int) -> dict[Layer, Structure]:
    """Choose a structure for each layer.

    Rules are "neuron", "shared", "diagonal", or "kronecker": that of a softmax at the head, equation (25), or through
    the linear layer that takes the units, equation (26), if there is one, else of the units' own response; "published"
    for exact neuron blocks on hidden layers and the shared block on the first and last (section 5.2); and "auto". That
    takes exact blocks if they cost no more than others (the channels of a normalization); the Kronecker factors of (25)
    and (26) if that of the outputs is no larger than that of the inputs, and both fit into the budget; exact blocks if
    the units saturate (tanh, sigmoid) and the blocks fit into a quarter of the budget; else the shared block if it
    fits, else the diagonal. Its shared blocks and Kronecker factors of 512 or more are inverted along 64 leading
    eigenvectors; `SharedBlock(rank)` and `KroneckerFactors(rank=rank)` take any rank, and the names stand for full
    inverses. A built-in structure that a layer cannot keep gives way to the first one that it can.

    Args:
        layers: the roles of layers, in the order of the forward pass.
        rules: a rule a layer.
        budget: bytes for the metric and the inverse of one layer.

    Returns:
        One structure a layer.
    """
    ends = (0, len(layers) - 1)
    return {
        layer: _structure(layer, role, rules[layer], budget, at_an_end=place in ends)
        for place, (layer, role) in enumerate(layers.items())
    }


def _structure(layer: Layer, role: Role, rule: Rule, budget: int, *, at_an_end: bool) -> Structure:
    if isinstance(rule, Structure):
        return rule
    if rule == "published":
        rule = "shared" if at_an_end else "neuron"
    if rule == "auto":
        return _automatic(layer, role, budget)
    if rule in _BUILT_IN and rule not in layer.structures:
        rule = layer.structures[0]
    return _named(rule, role)


def _named(name: str, role: Role, rank: int | None = None) -> Structure:
    match name:
        case KroneckerFactors.name:
            return _seen_factors(role, rank) or KroneckerFactors(rank=rank)
        case SharedBlock.name:
            return SharedBlock(rank)
    return _NAMED[name]()


def _automatic(layer: Layer, role: Role, budget: int) -> Structure:
    if layer.out == 1 and "neuron" in layer.structures:
        return NeuronBlocks()
    factors = _seen_factors(role, _RANK)
    if factors is not None and layer.out <= layer.d and state_bytes(layer, factors) <= budget:
        return factors
    saturating = isinstance(role.response, (SigmoidBernoulli, TanhBernoulli))
    if saturating and "neuron" in layer.structures and state_bytes(layer, NeuronBlocks()) <= budget // _EXACT_SHARE:
        return NeuronBlocks()
    first = _named(layer.structures[0], role, _RANK)
    return first if state_bytes(layer, first) <= budget else Diagonal()


def _seen_factors(role: Role, rank: int | None) -> KroneckerFactors | None:
    """Return Kronecker factors with what the forward pass showed of the outputs, or None if that was nothing."""
    if role.is_head:
        return KroneckerFactors(Categorical(), rank=rank)
    return None if role.following is None else KroneckerFactors(through=role.following.module, rank=rank)


def candidates(layer: Layer, role: Role) -> list[Structure]:
    """Return the structures that a layer can keep."""
    return [_named(name, role) for name in layer.structures]


def state_bytes(layer: Layer, structure: Structure) -> int:
    """Return the bytes of a layer's metric and inverse."""
    return structure.numbers(layer.shape) * number_bytes(layer)


def number_bytes(layer: Layer) -> int:
    """Return the bytes of a number in a layer's state."""
    return layer.dtype.itemsize
