"""AdamW for the parameters without a metric, so that every parameter is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from relfisher.optim.outcome import Outcome
from relfisher.optim.record import dense
from relfisher.shards import held, is_part, zeros
from relfisher.structures import Kept

__all__ = ["Fallback", "precise"]


class Fallback:
    """AdamW (Loshchilov & Hutter 2019) and its state of a parameter."""

    @staticmethod
    def declares(shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the two moments of a parameter of this shape, and its step count."""
        step = Kept((), dtype=torch.float32)
        return {"step": step, "exp_avg": Kept(shape, parted=True), "exp_avg_sq": Kept(shape, parted=True)}

    @classmethod
    def create(cls, parameter: Tensor) -> dict[str, Tensor]:
        """Return the initial state of a parameter."""
        kept, dtype = cls.declares(tuple(parameter.shape)), precise(parameter)
        return {
            key: zeros(parameter, dtype) if each.parted else each.zeros(dtype, parameter.device)
            for key, each in kept.items()
        }

    @classmethod
    def complete(
        cls, group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]], covered: Collection[Tensor]
    ) -> None:
        """Create the missing states of a group's parameters, apart from those that layers with a metric have.

        Each trained parameter has a state, maybe an empty one, as torch's distributed checkpoints expect; and so has
        each of which processes hold parts.
        """
        for parameter in group["params"]:
            if parameter.requires_grad or is_part(parameter):
                state = states[parameter]  # a lookup creates it
                if parameter.requires_grad and parameter not in covered and not state:
                    state.update(cls.create(parameter))

    @classmethod
    def step(
        cls,
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        lr: float,
        group: Mapping[str, Any],
        outcome: Outcome,
    ) -> None:
        """Take one step on the parameters, which have gradients.

        Args:
            parameters: the parameters to update in place.
            states: one state per parameter, filled at the first step and moved to the parameter's device.
            lr: the learning rate.
            group: the parameter group, which has `fallback_betas`, `fallback_eps` and `weight_decay`.
            outcome: whether the step is taken.
        """
        for parameter, state in zip(parameters, states, strict=True):
            moment, dtype = state.get("exp_avg"), precise(parameter)
            if moment is None:
                state.update(cls.create(parameter))
            elif (moment.device, moment.dtype) != (parameter.device, dtype):
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].to(parameter.device, dtype)
            state["step"] = state["step"].to(parameter.device)
        own = [held(parameter) for parameter in parameters]
        moments = [_real(held(state["exp_avg_sq"])) for state in states]
        # In half precision the second moment would underflow, and eps vanish.
        moved = [parameter.to(precise(parameter)).contiguous() for parameter in own]
        gradients = [held(dense(parameter.grad)).to(precise(parameter)).contiguous() for parameter in parameters]
        beta1, beta2 = group["fallback_betas"]
        adamw(
            [_real(parameter) for parameter in moved],
            [_real(gradient) for gradient in gradients],
            [_real(held(state["exp_avg"])) for state in states],
            moments,
            [],
            [state["step"] for state in states],
            fused=True,  # the form that can leave everything as it is
            found_inf=(~outcome.on(own[0].device)).float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["fallback_eps"],
            maximize=False,
        )
        for parameter, new, moment in zip(own, moved, moments, strict=True):
            moment.clamp_(max=torch.finfo(moment.dtype).max)  # infinity would never decay
            if new is not parameter:
                parameter.copy_(new)


def _real(tensor: Tensor) -> Tensor:
    """Return a tensor, or a view of the real and imaginary parts of a complex one."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def precise(parameter: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is stepped: float32 for a lower precision."""
    return torch.promote_types(parameter.dtype, torch.float32)
