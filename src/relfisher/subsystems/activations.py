"""From an activation function, as called, to the response of the units that it follows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from relfisher.responses import (
    ActivationGaussian,
    ELUGaussian,
    ReLUGaussian,
    SigmoidBernoulli,
    TanhBernoulli,
    UnitResponse,
)

__all__ = ["JOINING", "RESHAPING", "canonical_name", "response_of"]

# Element-wise and differentiable, with a Gaussian response: nu = f'(z)^2 / sigma^2.
_GENERIC = frozenset(
    "celu gelu hardshrink hardsigmoid hardswish hardtanh logsigmoid log_sigmoid mish relu6 rrelu selu silu softplus "
    "softshrink softsign tanhshrink threshold erf sin cos exp square abs".split()
)

#: Functions after which the pre-activation is still there, in another shape or in part.
RESHAPING = frozenset(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze permute transpose t movedim swapaxes "
    "contiguous clone chunk split tensor_split unbind select narrow getitem mt to type float double half bfloat16 cpu "
    "cuda".split()
)

#: Functions that join, normalise, pool or score pre-activations: after them it is known that no activation follows.
JOINING = frozenset(
    "add sub mul matmul bmm baddbmm linear bilinear conv1d conv2d conv3d scaled_dot_product_attention softmax "
    "log_softmax cross_entropy nll_loss mse_loss binary_cross_entropy_with_logits layer_norm rms_norm batch_norm "
    "group_norm instance_norm multi_head_attention_forward dropout dropout1d dropout2d dropout3d alpha_dropout "
    "feature_alpha_dropout max_pool1d max_pool2d max_pool3d boolean_dispatch avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d mean sum max min amax logsumexp div truediv neg pow cat stack einsum where masked_fill "
    "embedding embedding_bag prelu lstm gru rnn_tanh rnn_relu pad interpolate pixel_shuffle normalize topk "
    "kl_div smooth_l1_loss l1_loss huber_loss binary_cross_entropy conv_transpose1d conv_transpose2d "
    "conv_transpose3d local_response_norm cosine_similarity addmm addcmul lerp glu roll flip index_select gather "
    "pack_padded_sequence scaled_dot_product_attention".split()
)


def response_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> UnitResponse | None:
    """Return the response of units whose pre-activation is the first argument of this call.

    Args:
        function: what was called, such as `torch.nn.functional.relu` or `torch.Tensor.tanh_`.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The response, or None if the function is not a known activation.
    """
    name = canonical_name(function)
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
        case "elu" if options.get("alpha", 1.0) > 0:
            return ELUGaussian(alpha=options.get("alpha", 1.0))
        case _ if name in _GENERIC:
            return ActivationGaussian(_Partial(function, tuple(sorted(options.items()))))
    return None


def canonical_name(function: Callable[..., Any]) -> str:
    """Return a function's name without the marks of its in-place and operator forms."""
    name = getattr(function, "__name__", repr(function))
    stripped = name.strip("_")
    return stripped[1:] if name.startswith(("__r", "__i")) and stripped[1:] in JOINING else stripped


def _options(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments other than its input, by name, without `inplace`."""
    named = dict(kwargs)
    try:
        named = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # a built-in function without a signature
        named.update(zip(_BUILTIN_OPTIONS.get(canonical_name(function), ()), args[1:], strict=False))
    return {key: value for key, value in named.items() if key not in ("input", "self", "inplace")}


_BUILTIN_OPTIONS = {"softplus": ("beta", "threshold"), "hardshrink": ("lambd",), "softshrink": ("lambd",)}


@dataclass(frozen=True)
class _Partial:
    """An activation with its options, free of `inplace`, so that it can be differentiated; equal if all is equal."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, z: Tensor) -> Tensor:
        result: Tensor = self.function(z, **dict(self.options))
        return result

    def __repr__(self) -> str:
        return canonical_name(self.function)
