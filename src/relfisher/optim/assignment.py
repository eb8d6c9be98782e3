"""Choose a structure for each layer from the layer, its role and a rule. This module changes no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from relfisher.layers import Layer
from relfisher.observe import Role
from relfisher.optim.matching import check_keys, entry
from relfisher.registry import add_named
from relfisher.responses import Categorical, SigmoidBernoulli, TanhBernoulli
from relfisher.structures import Diagonal, KroneckerFactors, NeuronBlocks, SharedBlock, Structure
from relfisher.validation import check_keys_are_names

__all__ = [
    "FALLBACK",
    "Rule",
    "Rules",
    "assign",
    "candidates",
    "check_rules",
    "choices",
    "fitted",
    "momentum_bytes",
    "number_bytes",
    "register_structure",
    "rule_for",
    "state_bytes",
]

#: The name of a structure, or a structure.
Rule = str | Structure

#: One rule for all layers, or rules by layer, as in `MetricOptions`.
Rules = Rule | Mapping[str, Rule]

#: The rule that trains a layer with AdamW.
FALLBACK = "fallback"

_NAMED: dict[str, type[Structure]] = {
    kind.name: kind for kind in (NeuronBlocks, SharedBlock, KroneckerFactors, Diagonal)
}
_BUILT_IN = frozenset(_NAMED)
_OTHERS = ("auto", "published", FALLBACK)

# Exact blocks pay off on saturating units as long as their refresh is cheap enough.
_EXACT_SHARE = 64

# The rank of wide inverses with "auto", with which the paper's network learns as well as with full inverses; and lower
# ones, for which a limit of the whole state may ask.
_RANKS = (64, 32, 16, 8)


def register_structure(kind: type[Structure]) -> type[Structure]:
    """Register a structure under its name, for all optimizers; it can be used as a decorator.

    `MetricOptions(structure=kind())`, possibly by layer, does the same for a single optimizer.

    Args:
        kind: a subclass of `Structure` with a `name`, whose constructor needs no arguments.

    Returns:
        The structure, unchanged.

    Raises:
        TypeError: if `kind` is not such a subclass.
        ValueError: if its name is taken.
    """
    return add_named("structure", kind, Structure, _NAMED, _OTHERS)


def check_rules(rules: object, layers: Sequence[Layer] | None = None) -> None:
    """Raise ValueError unless these are valid rules and, if a model's layers are given, each key matches a layer."""
    if isinstance(rules, Mapping):
        check_keys_are_names("structure", rules)
        for rule in rules.values():
            check_rules(rule)
        if layers is not None:
            check_keys("structure", rules, layers)
    elif not isinstance(rules, Structure) and not (isinstance(rules, str) and rules in {*_OTHERS, *_NAMED}):
        names = ", ".join(["auto", *_NAMED, "published", FALLBACK])
        raise ValueError(f"structure must be one of {names}, or a Structure, got {rules!r}")


def rule_for(layer: Layer, rules: Rules) -> Rule:
    """Return the rule of one layer.

    Args:
        layer: the layer.
        rules: one rule or several. If one structure is given for all layers, embeddings use the diagonal instead, since
            other structures take tokens^2 numbers there.

    Returns:
        The rule; "auto" if no rule matches the layer.

    Raises:
        ValueError: if the layer does not support the structure.
    """
    if not isinstance(rules, Mapping):
        kept = isinstance(rules, str) and rules in {"auto", FALLBACK}
        return rules if kept or layer.structures[0] != Diagonal.name else Diagonal.name
    rule = entry(rules, layer) or "auto"
    name = rule.name if isinstance(rule, Structure) else rule
    if name in _BUILT_IN and name not in layer.structures:
        raise ValueError(f"structure of {layer.name!r} must be one of {', '.join(layer.structures)}, got {name!r}")
    return rule


def assign(
    layers: Mapping[Layer, Role],
    rules: Mapping[Layer, Rule],
    budget: int,
    is_flat: Callable[[Layer, Role], bool] | None = None,
) -> dict[Layer, Structure]:
    """Choose a structure for each layer.

    Rules are the names "neuron", "shared", "diagonal" and "kronecker", "published" and "auto". The output factor of
    "kronecker" is that of a softmax at the head, equation (25); or that of the next linear layer, equation (26), if it
    alone takes the units; or else that of the units' own response. "published" uses exact neuron blocks for hidden
    layers and the shared block for the first and the last layer (section 5.2). "auto" uses the first of these that
    applies: exact blocks for layers with one unit per group (the channels of a normalization); the diagonal for layers
    whose gradient the metric leaves as it is, since it is not needed for their steps; the Kronecker factors
    of (25) or (26) if the output factor is no larger than the input factor and both fit into the budget; exact blocks
    if the units saturate (tanh, sigmoid) and the blocks fit into a 64th of the budget; the shared block if it fits;
    the diagonal. With "auto", shared blocks and Kronecker factors of width 512 or more are kept as sketches, and
    inverted along 64 leading eigenvectors. The names stand for full inverses; `SharedBlock(rank)` and
    `KroneckerFactors(rank=rank)` take any rank. If a layer does not support a built-in structure, it uses its first
    supported one.

    Args:
        layers: the roles of layers, in the order of the forward pass.
        rules: one rule per layer.
        budget: bytes for the metric and the inverse of one layer.
        is_flat: returns whether the metric leaves the gradient of a layer as it is, since its inverse has the power 0;
            None if it never does.

    Returns:
        One structure per layer.
    """
    return {layer: found[0] for layer, found in choices(layers, rules, budget, is_flat).items()}


def choices(
    layers: Mapping[Layer, Role],
    rules: Mapping[Layer, Rule],
    budget: int,
    is_flat: Callable[[Layer, Role], bool] | None = None,
) -> dict[Layer, list[Structure]]:
    """Return the structures that each layer may use, the best first: that of `assign`, and smaller ones with "auto".

    Smaller are sketches of lower rank, of Kronecker factors and then of the shared block, and the diagonal.

    Args:
        layers: as for `assign`.
        rules: as for `assign`.
        budget: as for `assign`.
        is_flat: as for `assign`.

    Returns:
        At least one structure per layer, each of which takes fewer bytes than those before.
    """
    ends = (0, len(layers) - 1)
    return {
        layer: _choices(
            layer, role, rules[layer], 0 if is_flat and is_flat(layer, role) else budget, at_an_end=place in ends
        )
        for place, (layer, role) in enumerate(layers.items())
    }


def fitted(given: Mapping[Layer, Sequence[Structure]], room: int) -> dict[Layer, Structure]:
    """Choose structures that take at most so many bytes together, or the smallest ones if that is not possible.

    The layer whose metric takes most bytes gets its next smaller structure, until all fit. Among layers of equal size
    it is the last by name, so that at most one kind of layers is divided.

    Args:
        given: the structures that each layer may use, as from `choices`.
        room: the bytes.

    Returns:
        One structure per layer.
    """
    sizes = {layer: [state_bytes(layer, each) for each in found] for layer, found in given.items()}
    place = dict.fromkeys(given, 0)
    total = sum(each[0] for each in sizes.values())
    while total > room:
        larger = [layer for layer in given if place[layer] + 1 < len(sizes[layer])]
        if not larger:
            break
        largest = max(larger, key=lambda layer: (sizes[layer][place[layer]], layer.name))
        place[largest] += 1
        total -= sizes[largest][place[largest] - 1] - sizes[largest][place[largest]]
    return {layer: found[place[layer]] for layer, found in given.items()}


def _choices(layer: Layer, role: Role, rule: Rule, budget: int, *, at_an_end: bool) -> list[Structure]:
    if isinstance(rule, Structure):
        return [rule]
    if rule == "published":
        rule = "shared" if at_an_end else "neuron"
    if rule == "auto":
        return _automatic(layer, role, budget)
    if rule in _BUILT_IN and rule not in layer.structures:
        rule = layer.structures[0]
    return [_named(rule, role)]


def _named(name: str, role: Role, rank: int | None = None) -> Structure:
    match name:
        case KroneckerFactors.name:
            return _seen_factors(role, rank) or KroneckerFactors(rank=rank)
        case SharedBlock.name:
            return SharedBlock(rank)
    return _NAMED[name]()


def _automatic(layer: Layer, role: Role, budget: int) -> list[Structure]:
    if layer.out == 1 and "neuron" in layer.structures:
        return _shrinking(layer, [NeuronBlocks(), Diagonal()])
    found: list[Structure] = []
    factors = [each for each in (_seen_factors(role, rank) for rank in _RANKS) if each is not None]
    if factors and layer.out <= layer.d and state_bytes(layer, factors[0]) <= budget:
        found += factors
    saturating = isinstance(role.response, (SigmoidBernoulli, TanhBernoulli))
    if saturating and "neuron" in layer.structures and state_bytes(layer, NeuronBlocks()) <= budget // _EXACT_SHARE:
        found.append(NeuronBlocks())
    blocks = [_named(layer.structures[0], role, rank) for rank in _RANKS]
    if state_bytes(layer, blocks[0]) <= budget:
        found += blocks
    return _shrinking(layer, [*found, Diagonal()])


def _shrinking(layer: Layer, found: Iterable[Structure]) -> list[Structure]:
    """Return the structures that take fewer bytes than all before."""
    kept: list[Structure] = []
    for each in found:
        if not kept or state_bytes(layer, each) < state_bytes(layer, kept[-1]):
            kept.append(each)
    return kept


def _seen_factors(role: Role, rank: int | None) -> KroneckerFactors | None:
    """Return Kronecker factors whose output factor the forward pass determines, or None if it does not."""
    if role.is_head:
        return KroneckerFactors(Categorical(), rank=rank)
    return None if role.following is None else KroneckerFactors(through=role.following, rank=rank)


def possible(layer: Layer, rule: Rule) -> list[Structure]:
    """Return structures of all shapes that a rule may choose for a layer, whatever its role."""
    role = Role(layer.own_response)
    if rule not in ("auto", "published"):
        return _choices(layer, role, rule, 0, at_an_end=False)
    names = dict.fromkeys([*layer.structures, Diagonal.name])
    return [_named(name, role, rank) for name in names for rank in (None, *_RANKS)]


def candidates(layer: Layer, role: Role) -> list[Structure]:
    """Return the structures that a layer supports."""
    return [_named(name, role) for name in layer.structures]


def state_bytes(layer: Layer, structure: Structure) -> int:
    """Return the memory of a layer's metric and inverse in bytes."""
    return structure.numbers(layer.shape) * number_bytes(layer)


def momentum_bytes(layer: Layer, dtype: torch.dtype | None = None) -> int:
    """Return the memory of a layer's momentum in bytes, in a dtype, or in that of its metric."""
    return math.prod(layer.shape) * (dtype or layer.dtype).itemsize


def number_bytes(layer: Layer) -> int:
    """Return the size of one scalar in a layer's state in bytes."""
    return layer.dtype.itemsize
