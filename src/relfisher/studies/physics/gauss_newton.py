"""Dense Gauss-Newton steps: the limit of what a step can do, for networks small enough for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from relfisher.studies.peers import UnavailableError
from relfisher.studies.physics.task import Closure

__all__ = ["GaussNewton", "jacobian"]

HALVINGS = 10


class GaussNewton(torch.optim.Optimizer):
    """Moves all parameters by (J' J + damping)^-1 J' r, or by the largest half, quarter, ... that lowers the loss.

    It is the energy natural gradient of Müller & Zeinhofer 2023 for least squares. The damping falls while full steps
    lower the loss, and rises when they do not (Marquardt 1963). It is a reference, not a method for large networks,
    since J has residuals x parameters numbers.

    Args:
        model: the network, whose parameters all belong to linear layers.
        lr: the first damping, which takes the place of a learning rate here.

    Raises:
        UnavailableError: if a parameter does not belong to a linear layer.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-4) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        linear = [part for module in model.modules() if isinstance(module, nn.Linear) for part in module.parameters()]
        if len(linear) < len(list(model.parameters())):
            raise UnavailableError("not available: it is written for linear layers alone")
        self._model = model
        self._damping = lr

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]  # it needs residuals
        """Take a step, and return the loss before it."""
        matrix, flat = jacobian(closure)
        loss = flat.square().sum()
        step = _solved(matrix.double(), flat.double(), self._damping)
        start = nn.utils.parameters_to_vector(self._model.parameters()).detach()
        for length in [0.5**halvings for halvings in range(HALVINGS)]:
            self._move(start + length * step.to(start))
            if closure.residuals().detach().square().sum() < loss:
                self._damping *= 0.5 if length == 1 else 2.0
                return loss
        self._move(start)
        self._damping *= 10
        return loss

    @torch.no_grad()
    def _move(self, place: Tensor) -> None:
        nn.utils.vector_to_parameters(place, self._model.parameters())


def jacobian(closure: Closure) -> tuple[Tensor, Tensor]:
    """Return the derivatives [residuals, parameters] of all residuals, and the residuals.

    Each point has a copy of the weights of its own, so that one backward pass gives the derivatives of all points.
    """
    rows, flat, count = [], [], len(list(closure.model.parameters()))
    with _copies(closure.model) as made:
        parts = closure.parts()
        # The passes of a model are one after another: all layers inside, then all on the boundary.
        per_pass = len(made) // len(parts)
        copies = [made[place * per_pass : (place + 1) * per_pass] for place in range(len(parts))]
        for part, own in zip(parts, copies, strict=True):
            leaves = [leaf for pair in own for leaf in pair]
            found = [
                torch.autograd.grad(one.sum(), leaves, retain_graph=True, materialize_grads=True)
                for one in part.unbind(1)
            ]
            # A pass may use all layers several times, one after another.
            rows += [
                torch.cat([torch.stack(each[place::count]).sum(0).flatten(1) for place in range(count)], 1)
                for each in found
            ]
            flat += [one.detach() for one in part.unbind(1)]
    return torch.cat(rows), torch.cat(flat)


@contextmanager
def _copies(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let the linear layers of a model use one copy of weight and bias for each row; yield them in order of use."""
    made: list[tuple[Tensor, Tensor]] = []

    def spread(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        (x,) = inputs
        pair = [p.detach().expand(len(x), *p.shape).clone().requires_grad_() for p in layer.parameters()]
        made.append((pair[0], pair[1]))
        return torch.baddbmm(pair[1][:, None], x[:, None], pair[0].mT)[:, 0]

    handles = [layer.register_forward_hook(spread) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _solved(matrix: Tensor, flat: Tensor, damping: float) -> Tensor:
    """Return -(J' J + damping)^-1 J' r, in the smaller of the two spaces."""
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    gram.diagonal().add_(damping)
    right = flat if rows < columns else matrix.T @ flat
    solved: Tensor = torch.linalg.solve(gram, right)
    return -(matrix.T @ solved) if rows < columns else -solved
