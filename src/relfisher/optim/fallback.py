"""AdamW for the parameters that have no metric of their own, so that nothing is left untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["adamw_state", "adamw_step"]


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter that has not moved."""
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def adamw_step(
    parameters: Sequence[Tensor], states: Sequence[dict[str, Tensor]], lr: float, group: Mapping[str, Any]
) -> None:
    """Take one AdamW step (Loshchilov & Hutter 2019) on parameters that have a gradient.

    Args:
        parameters: what to move, in place.
        states: a state a parameter, filled at the first step, and moved to where the parameter is.
        lr: the learning rate.
        group: the parameter group, for `fallback_betas` and `weight_decay`.
    """
    for parameter, state in zip(parameters, states, strict=True):
        average = state.get("exp_avg")
        if average is None:
            state.update(adamw_state(parameter))
        elif (average.device, average.dtype) != (parameter.device, parameter.dtype):
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(parameter)
    beta1, beta2 = group["fallback_betas"]
    adamw(
        list(parameters),
        [_dense(parameter.grad) for parameter in parameters if parameter.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=1e-8,
        maximize=False,
    )


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
