"""Map activations, as they are called, to responses of the units before them; extensible with new activations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from relfisher.responses import (
    ActivationGaussian,
    ELUGaussian,
    ReLUGaussian,
    SigmoidBernoulli,
    TanhBernoulli,
    UnitResponse,
)

__all__ = [
    "JOINING",
    "POINTWISE",
    "RESHAPING",
    "ROUGH",
    "Activation",
    "Responses",
    "canonical_name",
    "check_responses",
    "is_softmax_call",
    "looks_up",
    "register_activation",
    "response_of",
    "response_of_module",
    "without_wrapper",
]

#: An activation: a module class, or a function of torch.
Activation = type[nn.Module] | Callable[..., Any]

#: The response of the units before an activation, or a function from the module to the response.
Made = UnitResponse | Callable[[nn.Module], UnitResponse]

#: Responses by activation, as in `RNGD(responses={nn.ReLU: SmoothReLUGaussian(1.0)})`.
Responses = Mapping[Activation, Made]

# Element-wise and differentiable activations with a Gaussian response: nu = f'(z)^2 / sigma^2.
_GENERIC = frozenset(
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid log_sigmoid mish relu6 rrelu selu "
    "silu softplus softshrink softsign tanhshrink threshold erf sin cos exp square abs".split()
)

#: Element-wise functions that may be part of an activation of several, such as sin(30 z).
POINTWISE = (_GENERIC - {"rrelu"}) | frozenset(
    "relu tanh sigmoid add sub rsub mul div truediv neg positive pow expm1 atan arctan sinh cosh erfc clamp clip "
    "clamp_min clamp_max maximum minimum".split()
)

#: Element-wise functions whose derivative may be infinite, as that of a chain's end may be.
ROUGH = frozenset("pow div truediv sqrt rsqrt log log1p log2 log10 reciprocal tan asin acos acosh atanh xlogy".split())

#: Functions that pass the pre-activation on, reshaped or in part.
RESHAPING = frozenset(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze permute transpose t movedim swapaxes "
    "contiguous clone chunk split tensor_split unbind select narrow getitem mt to type float double half bfloat16 cpu "
    "cuda".split()
)

#: Functions that join, normalize, pool or score pre-activations: they are not activations.
JOINING = frozenset(
    "add sub mul matmul bmm baddbmm linear bilinear conv1d conv2d conv3d scaled_dot_product_attention softmax "
    "log_softmax cross_entropy nll_loss mse_loss binary_cross_entropy_with_logits layer_norm rms_norm batch_norm "
    "group_norm instance_norm multi_head_attention_forward dropout dropout1d dropout2d dropout3d alpha_dropout "
    "feature_alpha_dropout max_pool1d max_pool2d max_pool3d boolean_dispatch avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d mean sum max min amax logsumexp div truediv neg pow cat stack einsum where masked_fill "
    "embedding embedding_bag lstm gru rnn_tanh rnn_relu pad interpolate pixel_shuffle normalize topk "
    "kl_div smooth_l1_loss l1_loss huber_loss binary_cross_entropy conv_transpose1d conv_transpose2d "
    "conv_transpose3d local_response_norm cosine_similarity addmm addcmul lerp glu roll flip index_select gather "
    "pack_padded_sequence".split()
)

# Modules that only call the function of this name; module and function count as the same activation.
_FUNCTIONS: dict[type[nn.Module], str] = {
    nn.CELU: "celu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.Hardshrink: "hardshrink",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    nn.Hardtanh: "hardtanh",
    nn.LeakyReLU: "leaky_relu",
    nn.LogSigmoid: "logsigmoid",
    nn.Mish: "mish",
    nn.PReLU: "prelu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SELU: "selu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Softplus: "softplus",
    nn.Softshrink: "softshrink",
    nn.Softsign: "softsign",
    nn.Tanh: "tanh",
    nn.Tanhshrink: "tanhshrink",
    nn.Threshold: "threshold",
}

_REGISTERED: dict[Activation, Made] = {}


def register_activation(activation: Activation, response: Made) -> None:
    """Register the response of the units before an activation, for all optimizers.

    `RNGD(responses={activation: response})` does the same for a single optimizer, and takes precedence.

    Args:
        activation: a module class of your own, which then counts as one activation whatever it computes inside; or an
            activation of torch, as a module or a function. Either form covers both.
        response: a `UnitResponse`, or a function from the module to one.

    Raises:
        TypeError: if the activation is a Python function, whose calls cannot be observed, or the response is invalid.
    """
    check_responses({activation: response})
    _REGISTERED[activation] = response


def check_responses(responses: object) -> None:
    """Raise TypeError unless the argument maps activations to responses, or is None."""
    if responses is None:
        return
    if not isinstance(responses, Mapping):
        raise TypeError(f"responses must map activations to responses, got {responses!r}")
    for activation, made in responses.items():
        is_module = isinstance(activation, type) and issubclass(activation, nn.Module)
        if not is_module and not (callable(activation) and _is_of_torch(activation)):
            raise TypeError(
                f"an activation must be a class of modules or a function of torch, got {activation!r}: calls of other "
                "functions cannot be observed; wrap it in a module"
            )
        if isinstance(made, type) or not (isinstance(made, UnitResponse) or callable(made)):
            raise TypeError(f"the response of {activation!r} must be a UnitResponse, or make one of it; got {made!r}")
        if not isinstance(made, UnitResponse) and (not is_module or activation in _FUNCTIONS):
            raise TypeError(f"the response of {activation!r}, of which torch calls a function, must be a UnitResponse")


def response_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    responses: Responses | None = None,
    units: int | None = None,
) -> UnitResponse | None:
    """Return the response of the units whose pre-activation is the first argument of a call.

    Args:
        function: the function that was called, such as `torch.nn.functional.relu` or `torch.Tensor.tanh_`.
        args: its positional arguments.
        kwargs: its keyword arguments.
        responses: responses by activation, which take precedence over registered and built-in ones.
        units: the number of units along axis 1 of the first argument, each of which may have a slope of PReLU of its
            own; None if other things lie there.

    Returns:
        The response, or None if the function is not a known activation.
    """
    name = canonical_name(function)
    for activation, made in [*(responses or {}).items(), *_REGISTERED.items()]:
        if name == _function_name(activation) and isinstance(made, UnitResponse):
            return made
    options = _options(function, args, kwargs)
    match name:
        case "relu":
            return ReLUGaussian()
        case "leaky_relu" if 0 <= options.get("negative_slope", 0.01) < 1:
            return ReLUGaussian(iota=options.get("negative_slope", 0.01))
        case "tanh":
            return TanhBernoulli()
        case "sigmoid":
            return SigmoidBernoulli()
        case "elu" if options.get("alpha", 1.0) > 0 and options.keys() <= {"alpha"}:
            return ELUGaussian(alpha=options.get("alpha", 1.0))
        case "prelu" if options["weight"].numel() in (1, units):
            return ActivationGaussian(_Slopes(options["weight"]))
        case _ if name in _GENERIC:
            return ActivationGaussian(_Partial(function, tuple(sorted(options.items()))))
    return None


def response_of_module(module: nn.Module, responses: Responses) -> UnitResponse | None:
    """Return the response of the units before a user-defined module; None if the module is not an activation."""
    for given in (responses, _REGISTERED):
        for kind in type(module).__mro__:  # the closest class first
            if kind in given and kind not in _FUNCTIONS:
                made = given[kind]
                response = made if isinstance(made, UnitResponse) else made(module)
                if not isinstance(response, UnitResponse | None):
                    raise TypeError(f"the response of {kind!r} must be a UnitResponse, got {response!r}")
                return response
    return None


def canonical_name(function: Callable[..., Any]) -> str:
    """Return a function's name without the underscores and prefixes of its in-place and operator forms."""
    name = getattr(function, "__name__", repr(function))
    stripped = name.strip("_")
    return stripped[1:] if name.startswith(("__r", "__i")) and stripped[1:] in JOINING else stripped


def without_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch in a form that can be pickled."""
    if getattr(function, "__qualname__", "").startswith("TensorBase."):  # the wrapper of an operator
        return getattr(function, "__wrapped__", function)
    return function


def is_softmax_call(name: str, z: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call is a softmax over the last axis of z, or a cross-entropy that contains one."""
    axes = z.dim()
    if not args or args[0] is not z:
        return False
    if name == "cross_entropy":
        return axes == 2
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return name in ("softmax", "log_softmax") and axis in (-1, axes - 1)


def looks_up(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function is a plain embedding lookup that changes neither the weight nor the gradient."""
    return name == "embedding" and kwargs.get("max_norm") is None and not kwargs.get("scale_grad_by_freq")


def _function_name(activation: Activation) -> str | None:
    """Return the canonical function name of an activation of torch; None for a user-defined module."""
    return _FUNCTIONS.get(activation) if isinstance(activation, type) else canonical_name(activation)


def _is_of_torch(function: Callable[..., Any]) -> bool:
    module = getattr(function, "__module__", None)
    return module is None or module.partition(".")[0] in ("torch", "builtins")


def _options(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, without its input and `inplace`."""
    named = dict(kwargs)
    try:
        named = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # a built-in function without a signature
        named.update(zip(_BUILTIN_OPTIONS.get(canonical_name(function), ()), args[1:], strict=False))
    return {key: value for key, value in named.items() if key not in ("input", "self", "inplace")}


_BUILTIN_OPTIONS = {
    "softplus": ("beta", "threshold"), "hardshrink": ("lambd",), "softshrink": ("lambd",), "prelu": ("weight",),
    "leaky_relu": ("negative_slope",), "elu": ("alpha", "scale", "input_scale"), "celu": ("alpha",),
    "hardtanh": ("min_val", "max_val"), "threshold": ("threshold", "value"), "rrelu": ("lower", "upper", "training"),
}  # fmt: skip


@dataclass(frozen=True)
class _Partial:
    """An activation with its options but without `inplace`, so that it is differentiable. Compares by value."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, z: Tensor) -> Tensor:
        result: Tensor = self.function(z, **dict(self.options))
        return result

    def __repr__(self) -> str:
        return canonical_name(self.function)


@dataclass(frozen=True, eq=False)
class _Slopes:
    """PReLU with slopes that are learned, one or one per unit. It follows them, and equals PReLU with the same ones."""

    weight: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return functional.prelu(z, self.weight.detach().to(z.dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Slopes) and other.weight is self.weight

    def __hash__(self) -> int:
        return hash(self.weight)

    def __repr__(self) -> str:
        return "prelu"
