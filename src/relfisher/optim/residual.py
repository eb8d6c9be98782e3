"""Least squares, such as physics-informed networks: each layer moves in the metric that the residuals give it.

A layer's response is then not its activation but the residuals r, Gaussian with unit variance, which see the values of
its units and their derivatives by the network's inputs. With the derivatives J_n [out, d] of residuals by the layer's
parameters at row n, the relative metric of the layer is G = sum_n vec(J_n) vec(J_n)'. It is kept in the eigenvectors U
of sum_n J_n J_n' and V of sum_n J_n' J_n, as its diagonal there, sum_n (U' J_n V)^2: the factors of K-FAC (Martens &
Grosse 2015) with the diagonal of EKFAC (George et al. 2018). Dangel et al. 2024 derive such factors for equations from
the propagation of derivatives; here each row has a copy of the weights, and one backward pass gives all J_n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relfisher.optim.copies import as_matrix, as_parts, has_metric, row_copies, trained_parts
from relfisher.optim.groups import rate
from relfisher.optim.plane import along, chosen, damped
from relfisher.optim.rules.normalized import coherence
from relfisher.validation import check_instance, check_integer, check_interval, check_rate

__all__ = ["ResidualRNGD", "Residuals"]

#: Returns one or several tensors of residuals.
Residuals = Callable[[], Tensor | Sequence[Tensor]]

RELATIVE_RMS = 0.2
PLANE_DAMPING = 1e-3
WARMUP = (0, 1, 2, 4, 8, 16)


class _Moving(NamedTuple):
    """Parameters that move together, their state, direction, momentum and gradient."""

    block: list[Tensor]
    state: dict[str, Any]
    direction: Tensor
    velocity: Tensor
    latest: Tensor


class ResidualRNGD(torch.optim.Optimizer):
    """Natural gradient descent for sums of squares, in the metric that the residuals give each layer.

    The direction of each layer is its inverse metric times its gradient with Nesterov's momentum. Its length is that of
    the step rule "normalized": 0.2 lr in the root mean square, and longer while gradients agree. Let lr fall to 0, by
    `total_steps` or a scheduler. `step` takes the residuals and computes all gradients by itself. Linear layers have a
    metric in the eigenvectors of their factors; each other parameter has the diagonal of its metric.

    Where all steps have the same points, no learning rate is needed: with `lr=None`, the step is the best one in the
    plane of the direction and the last step, by the derivatives of the residuals along both, and is taken back if the
    loss does not fall. See `relfisher.optim.plane`.

    It trains one model in one process, with one group of parameters.

    Args:
        model: the network.
        lr: the learning rate; None for the best length, which is for steps with the same points.
        total_steps: the length of the run, over which lr falls to 0 by a cosine; None for a constant lr.
        momentum: the share of the momentum that is kept per step, in [0, 1).
        damping: the multiple of the metric's mean eigenvalue that is added to it. Without noise it can be tiny.
        interval: the number of steps between updates of the metric; the first steps have more.
        decay: the share of the metric that is kept in an update, in [0, 1).
        samples: the largest number of rows of each call of a layer in an update, each of which copies the weights.

    Raises:
        ValueError: if an argument is out of range, or nothing is to be trained.
        TypeError: if an argument has the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = 0.03,
        *,
        total_steps: int | None = None,
        momentum: float = 0.9,
        damping: float = 1e-6,
        interval: int = 20,
        decay: float = 0.8,
        samples: int = 256,
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
        check_interval("damping", damping, 0, math.inf)
        for name, number in (("interval", interval), ("samples", samples)):
            check_integer(name, number)
        linear_layers = [each for each in model.modules() if isinstance(each, nn.Linear) and has_metric(each)]
        # Of layers with the same weight, the first has the metric.
        self._layers = list({id(layer.weight): layer for layer in reversed(linear_layers)}.values())[::-1]
        self._interval, self._decay, self._samples = interval, decay, samples
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names, trained = list(named), list(named.values())
        options = {"lr": 1.0 if lr is None else lr, "total_steps": total_steps, "momentum": momentum}
        options |= {"damping": damping, "iteration": 0, "best_length": lr is None, "plane_damping": PLANE_DAMPING}
        super().__init__(trained, options)
        covered = {id(parameter) for layer in self._layers for parameter in trained_parts(layer)}
        others: list[list[Tensor]] = [[parameter] for parameter in trained if id(parameter) not in covered]
        #: The parameters that move together, the first of which has the state.
        self._blocks: list[list[Tensor]] = [*map(trained_parts, self._layers), *others]

    def step(self, closure: Residuals) -> Tensor:  # type: ignore[override]  # it returns residuals, not the loss
        """Take a step.

        Args:
            closure: returns the residuals, any number of tensors of any shape. Rows of the inputs must not mix. The
                loss is the sum over the tensors of the mean square of each.

        Returns:
            The loss before the step. If it or a gradient is not finite, nothing moves.

        Raises:
            TypeError: if the closure returns anything but real residuals.
            ValueError: if they depend on no parameter, or a parameter was frozen since the optimizer was made.
        """
        (group,) = self.param_groups
        self._check_trained()
        iteration = group["iteration"]
        with torch.enable_grad():
            if iteration % self._interval == 0 or iteration in WARMUP:
                self._update(closure, iteration)
            residuals = _flat(closure())
            loss = residuals.square().sum()
            group["iteration"] += 1
            parameters = [parameter for block in self._blocks for parameter in block]
            if group["best_length"]:
                self._move_in_plane(closure, residuals, float(loss.detach()), parameters)
                return loss.detach()
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        if _all_finite(gradients):
            self._move(dict(zip(map(id, parameters), gradients, strict=True)))
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
            direction = _preconditioned(latest + share * velocity, state, group["damping"])
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

    def _move_in_plane(self, closure: Residuals, residuals: Tensor, loss: float, parameters: list[Tensor]) -> None:
        """Move all blocks by the best step in the plane of their directions and the last step."""
        (group,) = self.param_groups
        latest, weights, graph = along(residuals, parameters)
        if not _all_finite(latest):
            return
        gradients = dict(zip(map(id, parameters), latest, strict=True))
        direction: list[Tensor] = []
        for block in self._blocks:
            joined = as_matrix([gradients[id(parameter)] for parameter in block])
            direction += as_parts(_preconditioned(joined, self.state[block[0]], group["damping"]), block)
        directions = [direction]
        if all("last" in self.state[parameter] for parameter in parameters):
            directions.append([self.state[parameter]["last"] for parameter in parameters])
        shares, promised = chosen(residuals, weights, graph, directions, group["plane_damping"])
        with torch.no_grad():
            steps = [
                sum(share * part for share, part in zip(shares, parts, strict=True))
                for parts in zip(*directions, strict=True)
            ]
            before = [parameter.clone() for parameter in parameters]
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step)
        after = float(_flat(closure()).detach().square().sum())
        group["plane_damping"] = damped(group["plane_damping"], loss - after, promised)
        falls = after < loss
        for parameter, step, start in zip(parameters, steps, before, strict=True):
            self.state[parameter].pop("last", None)
            if falls:
                self.state[parameter]["last"] = step
            else:
                parameter.data.copy_(start)

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
        own = {key: getattr(self, key) for key in ("_layers", "_blocks", "_names", "_interval", "_decay", "_samples")}
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
        """Update the metrics by the derivatives of all residuals, with random signs where a row has several."""
        generator = torch.Generator().manual_seed(iteration)
        with row_copies(self._layers, self._samples, generator) as copies:
            residuals = _flat(closure())
            signs = torch.randint(2, residuals.shape, generator=generator).to(residuals) * 2 - 1
            others = [block[0] for block in self._blocks[len(self._layers) :]]
            wanted = [each.parameters for each in copies]
            found = torch.autograd.grad((signs * residuals).sum(), [*wanted, *others], materialize_grads=True)
        rows: dict[nn.Linear, list[Tensor]] = {layer: [] for layer in self._layers}
        for each, derivative in zip(copies, found, strict=False):
            rows[each.layer].append(derivative * each.weight)
        for layer, derivatives in rows.items():
            if derivatives:
                self._update_layer(self.state[layer.weight], torch.cat(derivatives))
        for parameter, derivative in zip(others, found[len(wanted) :], strict=True):
            squares = derivative.square()
            if bool(squares.isfinite().all()):
                self._average(self.state[parameter], "metric", squares)

    def _update_layer(self, state: dict[str, Any], rows: Tensor) -> None:
        """Update the metric of a layer by derivatives [rows, out, d]."""
        outputs, inputs = torch.einsum("nib,njb->ij", rows, rows), torch.einsum("nib,nic->bc", rows, rows)
        if not _all_finite([outputs, inputs]):
            return
        self._average(state, "outputs", outputs)
        self._average(state, "inputs", inputs)
        for name in ("outputs", "inputs"):
            state[f"{name}_basis"] = torch.linalg.eigh(state[name].double())[1].to(rows)
        turned = state["outputs_basis"].mT @ rows @ state["inputs_basis"]
        self._average(state, "metric", turned.square().sum(0))

    def _average(self, state: dict[str, Any], name: str, new: Tensor) -> None:
        state[name] = new.lerp(state[name], self._decay) if name in state else new


def _preconditioned(field: Tensor, state: dict[str, Any], damping: float) -> Tensor:
    """Return the inverse metric times a field; the field itself for a metric of 0."""
    metric: Tensor | None = state.get("metric")
    if metric is None or not bool(metric.any()):
        return field
    damped = (metric + damping * metric.mean()).clamp(min=torch.finfo(metric.dtype).tiny)
    if "outputs_basis" not in state:
        return field / damped
    left: Tensor = state["outputs_basis"]
    right: Tensor = state["inputs_basis"]
    return left @ ((left.mT @ field @ right) / damped) @ right.mT


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def _flat(residuals: Any) -> Tensor:
    """Return all residuals as one vector, scaled so that the loss is the sum of squares."""
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
    return torch.cat([part.flatten() / math.sqrt(part.numel()) for part in parts])
