"""Renamed options: an old name raises an error that says the new one."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["reject"]

_METRIC = (
    "structure", "structure_bytes", "decay", "stats_interval", "stats_samples", "refresh_interval",
)  # fmt: skip

_NOW = {
    **{name: f"metric=MetricOptions({name}=...)" for name in _METRIC},
    "early_refreshes": "metric=MetricOptions(warmup_refreshes=...)",
    "unbiased": "metric=MetricOptions(bias_correction=..., stagger=...)",
    "trust_region": "step_rule=TrustRegion(bound)",
    "relu_omega": "responses={nn.ReLU: SmoothReLUGaussian(omega)}",
    "fallback_lr": "fallback=AdamWOptions(lr=...)",
    "fallback_betas": "fallback=AdamWOptions(betas=...)",
    "betas": "fallback=AdamWOptions(betas=...)",
}


def reject(function: str, unknown: Mapping[str, object]) -> None:
    """Raise TypeError if there are unknown arguments.

    Args:
        function: the name of the function.
        unknown: the unknown arguments.

    Raises:
        TypeError: with the new name of an argument that was renamed.
    """
    for name in unknown:
        hint = f": write {_NOW[name]}" if name in _NOW else ""
        raise TypeError(f"{function}() takes no argument {name!r}{hint}")
