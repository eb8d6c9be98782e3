"""Find which parameters of a model have a metric of their own, and why the others have none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from relfisher.layers.attention import InputProjectionLayer, OutputProjectionLayer
from relfisher.layers.base import Kinds, Layer
from relfisher.layers.chart import chart_of
from relfisher.layers.conv import ConvLayer, ConvOperation, TransposedConvLayer, TransposedConvOperation
from relfisher.layers.embedding import EmbeddingBagLayer, EmbeddingLayer, EmbeddingOperation
from relfisher.layers.linear import BilinearLayer, LinearLayer, LinearOperation, TransposedLinearLayer
from relfisher.layers.norm import (
    BatchNormLayer,
    BatchNormOperation,
    GroupNormLayer,
    GroupNormOperation,
    InstanceNormLayer,
    LayerNormLayer,
    LayerNormOperation,
    PReLULayer,
)
from relfisher.layers.recurrent import CellLayer, RecurrentLayer
from relfisher.shards import class_of, made_whole, reshard

__all__ = ["Discovery", "check_kinds", "discover", "keepers", "layers_of", "plain_name", "register_layer"]

_KINDS: list[type[Layer]] = [
    LinearLayer,
    BilinearLayer,
    ConvLayer,
    TransposedConvLayer,
    EmbeddingLayer,
    EmbeddingBagLayer,
    LayerNormLayer,
    GroupNormLayer,
    BatchNormLayer,
    InstanceNormLayer,
    PReLULayer,
    InputProjectionLayer,
    OutputProjectionLayer,
    RecurrentLayer,
    CellLayer,
]

# The operations of subclasses with forward passes of their own; those of all other modules are linear.
_OPERATIONS: dict[Kinds, type[Layer]] = {
    EmbeddingLayer.kinds: EmbeddingOperation,
    ConvLayer.kinds: ConvOperation,
    TransposedConvLayer.kinds: TransposedConvOperation,
    LayerNormLayer.kinds: LayerNormOperation,
    GroupNormLayer.kinds: GroupNormOperation,
    BatchNormLayer.kinds: BatchNormOperation,
}

#: Kinds that users registered, newest first; they take precedence.
_REGISTERED: list[type[Layer]] = []

Extra = Sequence[type[Layer]]


def register_layer(kind: type[Layer]) -> type[Layer]:
    """Register a kind of layer for all optimizers, ahead of the built-in kinds.

    It can be used as a decorator. `MetricOptions(layers=[kind])` does the same for a single optimizer.

    Args:
        kind: a subclass of `Layer`.

    Returns:
        The kind, unchanged.

    Raises:
        TypeError: if `kind` is not a subclass of `Layer` that names its modules.
    """
    check_kinds([kind])
    if kind not in _REGISTERED:
        _REGISTERED.insert(0, kind)
    return kind


def check_kinds(kinds: Iterable[object]) -> None:
    """Raise TypeError unless all are subclasses of `Layer` that name their modules in `kinds`."""
    for kind in kinds:
        modules = getattr(kind, "kinds", None)
        if not (isinstance(kind, type) and issubclass(kind, Layer) and isinstance(modules, tuple) and modules):
            raise TypeError(f"a layer kind must be a subclass of Layer that names its modules in `kinds`, got {kind!r}")


#: The methods that define how a module computes; a class that overrides one of them is not supported.
_METHODS = ("forward", "_conv_forward")


@dataclass
class Discovery:
    """The layers of a model.

    Attributes:
        layers: in the order of their modules.
        refused: the names of all other parameters, with the reason why they have no metric.
    """

    layers: list[Layer] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def plain_name(model: nn.Module, name: str) -> str:
    """Strip the prefixes that wrappers add to the name of a module or parameter.

    Args:
        model: the model, possibly compiled or wrapped for parallel training.
        name: a name from its `named_modules()` or `named_parameters()`.

    Returns:
        The name in the wrapped model.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        name = "" if name == "module" else name.removeprefix("module.")
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def layers_of(name: str, module: nn.Module, extra: Extra = ()) -> list[Layer]:
    """Return the layers of one module; none if its kind is unknown or its forward pass was changed.

    Args:
        name: the module's dotted name.
        module: any module.
        extra: additional kinds, which take precedence over all others.

    Returns:
        New layers. Instances of a subclass are supported if they compute in the same way as their base class.
    """
    for kind in [*extra, *_REGISTERED]:
        found = _found(name, module, [kind])
        if found:
            return found
    if _is_transformers_conv1d(module):
        return TransposedLinearLayer.found_in(name, module)
    return _found(name, module, _KINDS)


def _found(name: str, module: nn.Module, kinds: Extra) -> list[Layer]:
    return [
        _charted(found)
        for kind in kinds
        if any(isinstance(module, base) and _changed(module, base) is None for base in kind.kinds)
        for found in kind.found_in(name, module)
    ]


def _charted(layer: Layer) -> Layer:
    """Return a layer with the charts of its computed parts."""
    parts = tuple(replace(part, chart=chart_of(layer.module, part.attribute)) for part in layer.parts)
    return layer if parts == layer.parts else replace(layer, parts=parts)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Return whether a module is Hugging Face's Conv1D, a linear layer with weight [in, out], or a subclass of it."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _changed(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Describe how a module departs from its base class, or return None if it does not."""
    # Accelerate replaces `forward` with a wrapper that moves or casts tensors, and keeps the original beside it.
    wrapped = "_original_forward" in vars(module) or "_hf_hook" in vars(module)
    for method in _METHODS:
        if hasattr(base, method) and getattr(type(module), method) is not getattr(base, method):
            return f"{class_of(module).__name__} has a {method} of its own"
        if method in vars(module) and not wrapped:
            return f"its {method} was replaced"
    return None


def discover(model: nn.Module, extra: Extra = ()) -> Discovery:
    """Find the layers of a model.

    A module has a layer if all of its parameters are actual parameters of this module alone. A parameter that is tied
    to another module, or computed by a parametrization, depends on more than this module's samples. There is one
    exception: a linear layer whose weight is also an embedding table. Its metric covers its own samples, and the
    embedding's share, the token frequencies, is ignored.

    Args:
        model: any module.
        extra: additional kinds of layers, which take precedence over all others.

    Returns:
        The layers and the reasons, which together cover every parameter.

    Raises:
        ValueError: if a lazy module has not been initialized yet.
        TypeError: if a module is compiled by torch.jit.
    """
    reshard(model)
    computing = [module for module in model.modules() if _computes_weights(module)]
    with made_whole(part for module in computing for part in keepers(module)):
        return _discovered(model, extra)


def _computes_weights(module: nn.Module) -> bool:
    """Return whether a module has weights that are computed before its passes: parametrized ones, or by a hook."""
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(isinstance(hook, WeightNorm | SpectralNorm) for hook in hooks)


def keepers(module: nn.Module) -> list[nn.Module]:
    """Return a module and those inside of it that keep what its own weights are, or are computed from."""
    inside = [
        child
        for name, child in module.named_children()
        if name == "parametrizations" or isinstance(child, nn.ParameterList | nn.ParameterDict)
    ]
    return [module, *(part for child in inside for part in child.modules())]


def _discovered(model: nn.Module, extra: Extra) -> Discovery:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be made of modules whose forward passes can be seen, but {name or 'it'} is compiled by "
                "torch.jit: train the original, and compile it by torch.compile"
            )
    names: dict[int, str] = {}
    owners: dict[int, dict[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = plain_name(model, f"{prefix}.{key}" if prefix else key)
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"model must be initialized, but {name} has no shape yet: run a forward pass first")
            names.setdefault(id(parameter), name)
            owners.setdefault(id(parameter), {})[name] = module
    found = Discovery()
    covered: set[int] = set()
    for prefix, module in model.named_modules():
        own = [parameter for parameter in module.parameters() if id(parameter) not in covered]
        reason = _reason(module, own, owners, extra) if own else None
        layers = layers_of(plain_name(model, prefix), module, extra) if own and reason is None else []
        if not layers and own:
            inside = _operations_of(plain_name(model, prefix), module)
            layers = [layer for layer in inside if all(_is_alone(each, owners) for each in layer.parameters)]
        for layer in layers:
            found.layers.append(layer)
            covered.update(id(parameter) for parameter in layer.parameters)
        if reason is not None:
            found.refused.update({names[id(parameter)]: reason for parameter in module.parameters(recurse=False)})
    unfit = {names[id(parameter)]: _unfit(parameter) for parameter in model.parameters()}
    for identity, name in names.items():
        if identity not in covered:
            found.refused.setdefault(name, unfit[name] or "its module has no metric of its own")
        else:
            found.refused.pop(name, None)
    return found


def _operations_of(name: str, module: nn.Module) -> list[Layer]:
    """Return the layers that the operations inside a module may have; none if its class is torch's.

    So are those of parametrized modules, which torch makes.
    """
    if class_of(module).__module__.startswith("torch."):
        return []
    kind = next((kind for bases, kind in _OPERATIONS.items() if isinstance(module, bases)), LinearOperation)
    return [layer for layer in kind.found_in(name, module) if _holds(module, layer)]


def _holds(module: nn.Module, layer: Layer) -> bool:
    """Return whether the parameters of a layer are in its module, where a weight may have been replaced by others."""
    return all(_is_stored(module, name) for name in layer.names)


def _is_stored(module: nn.Module, name: str) -> bool:
    """Return whether a module has a parameter of this dotted name, which may also be a tensor that it computes."""
    path, _, key = name.rpartition(".")
    return isinstance(module.get_submodule(path)._parameters.get(key), nn.Parameter)


def _is_alone(parameter: Tensor, owners: Mapping[int, Mapping[str, nn.Module]]) -> bool:
    """Return whether a parameter has one owner, and may have a metric."""
    return len(owners[id(parameter)]) == 1 and _unfit(parameter) is None


def _unfit(parameter: Tensor) -> str | None:
    """Return why a parameter cannot have a metric, whatever its module does; None if it can."""
    if parameter.numel() == 0:
        return "a parameter of its module is empty"
    return None if parameter.is_floating_point() else f"its dtype is {parameter.dtype}"


def _reason(
    module: nn.Module, parameters: list[nn.Parameter], owners: dict[int, dict[str, nn.Module]], extra: Extra
) -> str | None:
    """Return why a module has no layer; None if it has one, or contains modules that may."""
    layers = layers_of("", module, extra)
    if not layers:
        if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
            return "a parametrization computes a parameter from it"
        bases = [base for kind in _KINDS for base in kind.kinds if isinstance(module, base)]
        return next((reason for base in bases if (reason := _changed(module, base))), None)
    charts = [part.chart for found in layers for part in found.parts if part.chart is not None]
    if not all(chart.is_differentiable(module) for chart in charts):
        return "the derivative of its parametrization cannot be differentiated"
    names = [name for found in layers for name in found.names]
    if not all(_is_stored(module, name) for name in names):
        return "the weight is computed from it"
    if any(part.chart is not None and names.count(part.names[0]) > 1 for found in layers for part in found.parts):
        return "a parametrization computes several weights from it"
    for parameter in parameters:
        unfit = _unfit(parameter)
        if unfit is not None:
            return unfit
        tied = owners[id(parameter)]
        if len(tied) > 1 and not _is_the_layer(module, tied.values()):
            return f"tied: {' and '.join(tied)} are one parameter"
    return None


def _is_the_layer(module: nn.Module, owners: Iterable[nn.Module]) -> bool:
    """Return whether this linear layer may keep a shared parameter, since the other owners only look tokens up in it.

    What an embedding does with the rows that it looks up, such as scaling them, is not checked. A module that contains
    the layer and registers its parameter again, as BERT's head does with the bias, is assumed not to use it. If it
    does, the first forward pass shows it.
    """
    return isinstance(module, nn.Linear) and all(
        owner is module or _looks_up(owner) or (module in owner.modules() and not layers_of("", owner))
        for owner in owners
    )


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq
