"""Least squares, such as physics-informed networks: the network moves in the metric that its residuals give it.

The response of a layer is then not its activation but the residuals r, Gaussian with unit variance, which see the
values of its units and their derivatives by the network's inputs. With the derivatives J_n of residuals by parameters
at row n, the relative metric is G = sum_n vec(J_n) vec(J_n)'.

Without a learning rate, the subsystem is the whole network, and G is never formed: see `relfisher.optim.joint`. With
one, it is a layer with J_n [out, d], and G is kept in the eigenvectors U of sum_n J_n J_n' and V of sum_n J_n' J_n, as
its diagonal there, sum_n (U' J_n V)^2: the factors of K-FAC (Martens & Grosse 2015) with the diagonal of EKFAC (George
et al. 2018). Dangel et al. 2024 derive such factors for equations from the propagation of derivatives; here, one
backward pass gives all J_n: see `relfisher.optim.rowwise`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relfisher.optim.factors import preconditioned, update_diagonal, update_layer
from relfisher.optim.groups import rate
from relfisher.optim.health import all_finite
from relfisher.optim.joint import descend, next_damping, step_of_rows
from relfisher.optim.rows import Rows, drawn_rows, scaled_parts, signs
from relfisher.optim.rowwise import as_matrix, as_parts, has_metric, taped, trained_parts
from relfisher.optim.rules.normalized import coherence
from relfisher.validation import check_instance, check_integer, check_interval, check_rate

__all__ = ["ResidualRNGD", "Residuals"]

#: Returns one or several tensors of residuals.
Residuals = Callable[[], Tensor | Sequence[Tensor]]

RELATIVE_RMS = 0.2
FIRST_DAMPING = 1e-2
DAMPING = 1e-6
MOST_OTHERS = 16
MISMATCH = 0.02
SAME = 0.02
SAMPLES, JOINT_SAMPLES, MOST_SAMPLES = 256, 1024, 2**20
WARMUP = (0, 1, 2, 4, 8, 16)


class _Moving(NamedTuple):
    """Parameters that move together, their state, direction, momentum and gradient."""

    block: list[Tensor]
    state: dict[str, Any]
    direction: Tensor
    velocity: Tensor
    latest: Tensor


class ResidualRNGD(torch.optim.Optimizer):
    """Natural gradient descent for sums of squares, in the metric of the residuals.

    Without a learning rate, a step is that of all parameters at once in the metric of `samples` rows of residuals, or
    the largest half, quarter, ... of it that lowers the loss. The damping adapts itself: there is nothing to tune. A
    row of residuals must depend on one row of the inputs.

    With a learning rate, each linear layer has a metric of its own, in the eigenvectors of its factors, and each other
    parameter the diagonal of its metric. The direction is the inverse metric times the gradient with Nesterov's
    momentum; its length is that of the step rule "normalized", 0.2 lr in the root mean square, and longer while
    gradients agree. Let lr fall to 0, by `total_steps` or a scheduler. A step costs little more than one of Adam,
    however many rows there are.

    `step` takes the residuals and computes all gradients by itself. It trains one model in one process, with one group
    of parameters. Without a learning rate, at most 16 numbers may lie outside of linear layers, such as coefficients.

    Args:
        model: the network.
        lr: the learning rate; None for steps of all parameters at once.
        total_steps: the length of the run, over which lr falls to 0 by a cosine; None for a constant lr.
        momentum: the share of the momentum that is kept per step, in [0, 1).
        damping: the multiple of the metric's mean eigenvalue that is added to it; by default 1e-6, and without a
            learning rate 1e-2 in the first step.
        interval: with lr, the number of steps between updates of the metric; the first steps have more.
        decay: with lr, the share of the metric that is kept in an update, in [0, 1).
        samples: the largest number of rows of residuals that a metric is computed from; by default 256, and 1,024
            without a learning rate. Then it doubles when a step cannot lower the loss though the points are those of
            the last step.

    Raises:
        ValueError: if an argument is out of range, or nothing is to be trained.
        TypeError: if an argument has the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        total_steps: int | None = None,
        momentum: float = 0.9,
        damping: float | None = None,
        interval: int = 20,
        decay: float = 0.8,
        samples: int | None = None,
    ) -> None:
        check_instance("model", model, nn.Module)
        if lr is not None:
            check_rate("lr", lr)
        if total_steps is not None:
            check_integer("total_steps", total_steps)
            if lr is None:
                raise ValueError("total_steps is the length of a schedule, which lr=None does not have; leave it out")
        for name, share in (("momentum", momentum), ("decay", decay)):
            check_interval(name, share, 0, 1)
        if damping is None:
            damping = FIRST_DAMPING if lr is None else DAMPING
        if samples is None:
            samples = JOINT_SAMPLES if lr is None else SAMPLES
        check_interval("damping", damping, 0, math.inf)
        for name, number in (("interval", interval), ("samples", samples)):
            check_integer(name, number)
        linear_layers = [each for each in model.modules() if has_metric(each)]
        # Of layers with the same weight, the first has the metric.
        self._layers = list({id(layer.weight): layer for layer in reversed(linear_layers)}.values())[::-1]
        self._model, self._interval, self._decay = model, interval, decay
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names, trained = list(named), list(named.values())
        options = {"lr": 1.0 if lr is None else lr, "total_steps": total_steps, "momentum": momentum}
        options |= {"damping": damping, "iteration": 0, "joint": lr is None, "samples": samples, "after": math.inf}
        super().__init__(trained, options)
        covered = {id(parameter) for layer in self._layers for parameter in trained_parts(layer)}
        others: list[list[Tensor]] = [[parameter] for parameter in trained if id(parameter) not in covered]
        #: The parameters that move together, the first of which has the state.
        self._blocks: list[list[Tensor]] = [*map(trained_parts, self._layers), *others]
        outside = sum(parameter.numel() for (parameter,) in others)
        if lr is None and outside > MOST_OTHERS:
            raise ValueError(
                f"without a learning rate, at most {MOST_OTHERS} numbers may lie outside of linear layers, but "
                f"{outside} do: give lr"
            )

    def step(self, closure: Residuals) -> Tensor:  # type: ignore[override]  # it returns residuals, not the loss
        """Take a step.

        Args:
            closure: returns the residuals, any number of tensors, whose first axis is that of the inputs. Rows of the
                inputs must not mix. The loss is the sum over the tensors of the mean square of each. Without a learning
                rate, it is called several times in a step, and must return the same at the same parameters.

        Returns:
            The loss before the step. If it or a gradient is not finite, nothing moves.

        Raises:
            TypeError: if the closure returns anything but real residuals.
            ValueError: if they depend on no parameter, or rows mix, or a parameter was frozen since the optimizer was
                made.
        """
        (group,) = self.param_groups
        self._check_trained()
        with torch.enable_grad():
            if group["joint"]:
                return self._step_jointly(closure)
            iteration = group["iteration"]
            if iteration % self._interval == 0 or iteration in WARMUP:
                self._update(closure, iteration)
            parts = scaled_parts(_parts(closure()))
            loss = _loss(parts)
            group["iteration"] += 1
            gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        if all_finite(gradients):
            self._move(dict(zip(map(id, self._parameters), gradients, strict=True)))
        return loss.detach()

    @torch.no_grad()
    def _move(self, gradients: dict[int, Tensor]) -> None:
        """Move all blocks by their steps."""
        (group,) = self.param_groups
        share, lr = group["momentum"], rate(group)
        moves = []
        for block in self._blocks:
            state = self.state[block[0]]
            latest = as_matrix([gradients[id(parameter)] for parameter in block])
            velocity = latest + share * state["momentum"] if "momentum" in state else latest
            state["momentum"] = velocity
            direction = preconditioned(latest + share * velocity, state, group["damping"])
            moves.append(_Moving(block, state, direction, velocity, latest))
        norms = torch.stack([part.norm() for move in moves for part in move[2:]]).view(-1, 3)
        lengths, of_velocity, of_latest = norms.unbind(1)
        before = norms.new_tensor([move.state.get("uncorrelated", 0.0) for move in moves])
        longer, uncorrelated = coherence(of_velocity, of_latest, before, share)
        scales = (RELATIVE_RMS * lr * longer / lengths).tolist()
        for move, scale, now in zip(moves, scales, uncorrelated.tolist(), strict=True):
            move.state["uncorrelated"] = now
            if math.isfinite(scale):  # the direction is finite and not 0
                root = math.sqrt(move.direction.numel())
                for parameter, part in zip(move.block, as_parts(move.direction, move.block), strict=True):
                    parameter.add_(part, alpha=-scale * root)

    def _step_jointly(self, closure: Residuals) -> Tensor:
        """Move all parameters by the step of some rows of residuals, as far as it lowers the loss."""
        (group,) = self.param_groups
        others = self._others
        generator = torch.Generator().manual_seed(group["iteration"])
        with taped(self._layers, self._model) as tape:
            parts = scaled_parts(_parts(closure()))
            loss = _loss(parts).detach()
            # Where the points are those of the last step, so is the loss.
            fixed = math.isclose(float(loss), group["after"], rel_tol=SAME)
            draw = partial(drawn_rows, parts, tape, self._layers, others, generator=generator)
            everything = draw(sys.maxsize) if group["iteration"] == 0 else None
            rows = draw(group["samples"])
        if everything is not None:
            self._check_rows(closure, everything)
        moves, group["damping"] = step_of_rows(rows, group["damping"], () if fixed else self._kept())
        group["iteration"] += 1
        if not moves or not all_finite([loss, *moves]):
            return loss
        split = torch.split(moves[-1], [other.numel() for other in others])
        whole = [*moves[:-1], *(part.view_as(other) for part, other in zip(split, others, strict=True))]
        step = [part for move, block in zip(whole, self._blocks, strict=True) for part in as_parts(move, block)]
        taken = descend(self._parameters, step, lambda: _evaluated(closure), float(loss))
        length, group["after"] = taken or (0.0, float(loss))
        group["damping"] = next_damping(group["damping"], length)
        if fixed and not length:
            group["samples"] = min(2 * group["samples"], MOST_SAMPLES)
        for block, move in zip(self._blocks, whole, strict=True):
            self.state[block[0]]["last"] = length * move
        return loss

    def _kept(self) -> list[Tensor]:
        """Return the share of the last step that is kept, of each layer and then of all other parameters."""
        share = self.param_groups[0]["momentum"]
        last = [share * self.state[block[0]]["last"] for block in self._blocks if "last" in self.state[block[0]]]
        if not last:
            return []
        count = len(self._layers)
        others = [each.flatten() for each in last[count:]]
        return [*last[:count], torch.cat(others) if others else last[0].new_zeros(0)]

    def _check_rows(self, closure: Residuals, rows: Rows) -> None:
        """Raise ValueError unless the derivatives of all rows add up to the gradient."""
        total = _loss(scaled_parts(_parts(closure())))
        gradients = iter(torch.autograd.grad(total, self._parameters, materialize_grads=True))
        expected = torch.cat([as_matrix([next(gradients) for _ in block]).flatten() for block in self._blocks])
        layers, others = rows.combined(2 * rows.residuals)
        found = torch.cat([*(layer.flatten() for layer in layers), others])
        if float((found - expected).norm()) > MISMATCH * float(torch.maximum(found.norm(), expected.norm())):
            raise ValueError(
                "the derivatives of the rows of residuals do not add up to the gradient of the loss: without a "
                "learning rate, rows of the inputs must not mix, their order must be that of the residuals, all calls "
                "of the closure in a step must return the same, and weights must be used by linear layers alone"
            )

    @property
    def _parameters(self) -> list[Tensor]:
        """All trained parameters, block by block."""
        return [parameter for block in self._blocks for parameter in block]

    @property
    def _others(self) -> list[Tensor]:
        """The parameters outside of the layers."""
        return [block[0] for block in self._blocks[len(self._layers) :]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the only group; raise ValueError if there is one."""
        if self.param_groups:
            raise ValueError("ResidualRNGD has one group of parameters, those of its model: it takes no further ones")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a saved state and continue from there.

        Args:
            state_dict: the result of `state_dict()`, for the same model.

        Raises:
            ValueError: if it belongs to another kind of optimizer, or to other parameters.
        """
        groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
        saved_group = groups[0] if groups else {}
        missing = sorted(self.param_groups[0].keys() - saved_group.keys())
        if missing:
            raise ValueError(f"state_dict must be that of a ResidualRNGD optimizer, but it lacks {', '.join(missing)}")
        pairs = zip(self.param_groups[0]["params"], saved_group["params"], strict=False)
        places = {id(each): place for each, place in pairs}
        names = dict(zip(map(id, self.param_groups[0]["params"]), self._names, strict=True))
        for block in self._blocks:
            saved, shape = state_dict["state"].get(places.get(id(block[0])), {}), as_matrix(block).shape
            for key in [key for key in ("metric", "momentum") if key in saved]:
                if saved[key].shape != shape:
                    raise ValueError(
                        f"state_dict is of another model: the {key} of {names[id(block[0])]} has the shape "
                        f"{list(saved[key].shape)}, but this optimizer needs {list(shape)}"
                    )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle needs; the model must be part of the same copy or pickle."""
        own = {key: getattr(self, key) for key in ("_layers", "_blocks", "_names", "_model", "_interval", "_decay")}
        return super().__getstate__() | own

    def _check_trained(self) -> None:
        """Raise ValueError if a parameter was frozen since the optimizer was made."""
        for name, parameter in zip(self._names, self.param_groups[0]["params"], strict=True):
            if not parameter.requires_grad:
                raise ValueError(
                    f"the parameters must be trained as long as the optimizer lasts, but {name} was frozen: make a new "
                    "one, which trains the others"
                )

    def _update(self, closure: Residuals, iteration: int) -> None:
        """Update the metrics by the derivatives of all residuals, with random signs."""
        (group,) = self.param_groups
        generator = torch.Generator().manual_seed(iteration)
        with taped(self._layers, self._model) as tape:
            residuals = torch.cat([part.flatten() for part in scaled_parts(_parts(closure()))])
            total = (signs(residuals, generator) * residuals).sum()
            found = tape.backward(total)
            others = self._others
            derivatives = torch.autograd.grad(total, others, materialize_grads=True) if others else ()
        for layer, rows in zip(self._layers, found, strict=True):
            update_layer(self.state[layer.weight], rows, group["samples"], self._decay, generator)
        for parameter, derivative in zip(others, derivatives, strict=True):
            update_diagonal(self.state[parameter], derivative, self._decay)


def _parts(residuals: Any) -> list[Tensor]:
    """Return residuals as a list of tensors."""
    parts = list(residuals) if isinstance(residuals, Iterable) and not isinstance(residuals, Tensor) else [residuals]
    if not all(isinstance(part, Tensor) and part.numel() for part in parts) or not parts:
        raise TypeError("the closure must return residuals, a tensor or several, none of them empty")
    strange = next((part.dtype for part in parts if not part.is_floating_point()), None)
    if strange is not None:
        raise TypeError(
            f"the closure must return real residuals, such as view_as_real() of complex ones, got {strange}"
        )
    if not any(part.requires_grad for part in parts):
        raise ValueError("the closure must return residuals that depend on trained parameters, got detached ones")
    return parts


def _loss(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of all squares."""
    return torch.stack([part.square().sum() for part in parts]).sum()


def _evaluated(closure: Residuals) -> float:
    """Return the loss of the residuals that a closure returns."""
    with torch.enable_grad():
        parts = scaled_parts(_parts(closure()))
    with torch.no_grad():
        return float(_loss(parts))
