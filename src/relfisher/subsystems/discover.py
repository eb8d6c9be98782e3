"""Which parameters of a model have a metric of their own, and why the others have none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from relfisher.subsystems.attention import InputProjectionSubsystem, OutputProjectionSubsystem
from relfisher.subsystems.base import Subsystem
from relfisher.subsystems.conv import ConvSubsystem, TransposedConvSubsystem
from relfisher.subsystems.embedding import EmbeddingBagSubsystem, EmbeddingSubsystem
from relfisher.subsystems.linear import BilinearSubsystem, LinearSubsystem, TransposedLinearSubsystem
from relfisher.subsystems.norm import (
    BatchNormSubsystem,
    GroupNormSubsystem,
    InstanceNormSubsystem,
    LayerNormSubsystem,
    PReLUSubsystem,
)
from relfisher.subsystems.recurrent import RecurrentSubsystem

__all__ = ["Discovery", "discover", "plain_name", "subsystems_of"]

_KINDS: tuple[type[Subsystem], ...] = (
    LinearSubsystem,
    BilinearSubsystem,
    ConvSubsystem,
    TransposedConvSubsystem,
    EmbeddingSubsystem,
    EmbeddingBagSubsystem,
    LayerNormSubsystem,
    GroupNormSubsystem,
    BatchNormSubsystem,
    InstanceNormSubsystem,
    PReLUSubsystem,
    InputProjectionSubsystem,
    OutputProjectionSubsystem,
    RecurrentSubsystem,
)

#: What decides how a module computes; one that overrides any of them does something of its own.
_METHODS = ("forward", "_conv_forward")


@dataclass
class Discovery:
    """What has a metric in a model.

    Attributes:
        subsystems: in the order of their modules.
        refused: the names of all other parameters, and why they have none.
    """

    subsystems: list[Subsystem] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def plain_name(model: nn.Module, name: str) -> str:
    """Return the name of a module or parameter of a model without what wrappers put in front.

    Args:
        model: what may be compiled or made parallel.
        name: as `named_modules()` and `named_parameters()` of it have it.

    Returns:
        The name in the model that was wrapped.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        name = "" if name == "module" else name.removeprefix("module.")
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def subsystems_of(name: str, module: nn.Module) -> list[Subsystem]:
    """Return the subsystems of one module, none if it is of no known kind or does something of its own.

    Args:
        name: the module's dotted name, for theirs.
        module: any module.

    Returns:
        New subsystems. A subclass counts as what it derives from if it computes in the same way.
    """
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return TransposedLinearSubsystem.found_in(name, module)
    return [
        found
        for kind in _KINDS
        if any(isinstance(module, base) and _changed(module, base) is None for base in kind.kinds)
        for found in kind.found_in(name, module)
    ]


def _changed(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Return what a module does otherwise than the class that it derives from, or None."""
    # Accelerate replaces `forward` by one that moves or casts, and keeps the other beside it.
    wrapped = "_original_forward" in vars(module) or "_hf_hook" in vars(module)
    for method in _METHODS:
        if hasattr(base, method) and getattr(type(module), method) is not getattr(base, method):
            return f"{type(module).__name__} has a {method} of its own"
        if method in vars(module) and not wrapped:
            return f"its {method} was replaced"
    return None


def discover(model: nn.Module) -> Discovery:
    """Return the subsystems of a model.

    A module counts if all of its parameters are real parameters of this module alone: one that is tied to another
    module, or computed by a parametrization, answers to more than this module's samples. A linear layer that scores
    the tokens which embeddings look up in its weight counts nevertheless, by its own samples: what the embeddings say
    of a token's row, its frequency, is left out.

    Args:
        model: any module.

    Returns:
        Subsystems and reasons: together they cover every parameter.

    Raises:
        ValueError: if a lazy module has not seen its input yet.
    """
    names: dict[int, str] = {}
    owners: dict[int, dict[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = plain_name(model, f"{prefix}.{key}" if prefix else key)
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"model must be initialised, but {name} has no shape yet: run a forward pass first")
            names.setdefault(id(parameter), name)
            owners.setdefault(id(parameter), {})[name] = module
    found = Discovery()
    covered: set[int] = set()
    for prefix, module in model.named_modules():
        own = [parameter for parameter in module.parameters() if id(parameter) not in covered]
        reason = _reason(module, own, owners) if own else None
        if reason is None:
            for subsystem in subsystems_of(plain_name(model, prefix), module) if own else []:
                found.subsystems.append(subsystem)
                covered.update(id(parameter) for parameter in subsystem.parameters)
        else:
            found.refused.update({names[id(parameter)]: reason for parameter in module.parameters(recurse=False)})
    for identity, name in names.items():
        if identity not in covered:
            found.refused.setdefault(name, "its module has no metric of its own")
        else:
            found.refused.pop(name, None)
    return found


def _reason(module: nn.Module, parameters: list[nn.Parameter], owners: dict[int, dict[str, nn.Module]]) -> str | None:
    """Return why a module has no subsystem, or None if it has, or holds others that may."""
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return "a parametrization computes the weight from it"
    subsystems = subsystems_of("", module)
    if not subsystems:
        bases = [base for kind in _KINDS for base in kind.kinds if isinstance(module, base)]
        return next((reason for base in bases if (reason := _changed(module, base))), None)
    if not all(isinstance(parameter, nn.Parameter) for found in subsystems for parameter in found.parameters):
        return "the weight is computed from it"
    for parameter in parameters:
        if not parameter.is_floating_point():
            return f"its dtype is {parameter.dtype}"
        tied = owners[id(parameter)]
        if len(tied) > 1 and not _is_the_layer(module, tied.values()):
            return f"tied: {' and '.join(tied)} are one parameter"
    return None


def _is_the_layer(module: nn.Module, owners: Iterable[nn.Module]) -> bool:
    """Return whether a parameter with several owners is that of this linear layer, since others only look tokens up.

    What an embedding makes of the rows that it looks up, such as a multiple of them, is not asked. A module that has
    the layer inside and names its parameter once more, as that of BERT's head does its bias, makes no use of it; where
    it does, the first forward pass tells.
    """
    return isinstance(module, nn.Linear) and all(
        owner is module or _looks_up(owner) or (module in owner.modules() and not subsystems_of("", owner))
        for owner in owners
    )


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq
