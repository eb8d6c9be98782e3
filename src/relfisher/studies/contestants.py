"""The optimizers of a race by validation: tuned peers with schedules and decay, RNGD, and RNGD without its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from relfisher import RNGD, MetricOptions
from relfisher.optim.rules import Move, Step
from relfisher.optim.rules.spectral import Spectral, polar_factor
from relfisher.studies.peers import PEERS, UNTUNED, Peer, installed, with_adamw

__all__ = ["CONTESTANTS", "OURS", "PARTS", "RIVALS", "AverageWhenEvaluated", "Muon"]

DECAYS = {"weight_decay": (0.1, 0.5)}
REST_RATE = 2e-3
MOMENTUM = 0.95
WINDOW = 0.1


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for weights, of convolutions flattened as well, which torch's does not take.

    Args:
        weights: the weights.
        lr: the learning rate.
        weight_decay: the decoupled weight decay.
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here passes a closure
        """Move each weight by the polar factor of its Nesterov momentum."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                direction = polar_factor(weight.grad.lerp(momentum, MOMENTUM).flatten(1))
                scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction.view_as(weight), alpha=-group["lr"] * scale)


class InverseInside(Spectral):
    """The polar factor of the natural gradient, Newton-Muon's form: the metric acts inside the polar factor alone."""

    name = "inverse-inside"
    needs_root = False

    def steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return the steps."""
        fields = [move.preconditioned() for move in moves]
        return self.scaled(moves, [self.polar(field) for field in fields], fields)


class FixedLength(Spectral):
    """Steps that are not longer while gradients agree."""

    name = "fixed-length"

    def steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return the steps."""
        return super().steps([move._replace(velocity=move.latest, momentum=0.0) for move in moves])


def _muon(model: nn.Module, lr: float = 1e-2, weight_decay: float = 0.05) -> torch.optim.Optimizer:
    """Create Muon for the weights of all layers but embeddings and the last, and AdamW for the rest."""
    kinds = (nn.Linear, nn.Conv2d, nn.LSTM)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    trained = [p for layer in layers[:-1] for p in layer.parameters(recurse=False) if p.requires_grad]
    weights = [parameter for parameter in trained if parameter.ndim > 1]
    return with_adamw(Muon(weights, lr, weight_decay), model, REST_RATE, weight_decay)


def _schedule_free(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Create Schedule-Free AdamW (Defazio et al. 2024), in training mode whenever its model is."""
    make = installed("AdamWScheduleFree", "schedulefree")
    optimizer: Any = make(_trained(model), warmup_steps=50, **options)

    def follow(module: nn.Module, _: object) -> None:
        (optimizer.train if module.training else optimizer.eval)()

    model.register_forward_pre_hook(follow)
    return optimizer  # type: ignore[no-any-return]  # the package has no types


class AverageWhenEvaluated:
    """The average of the last tenth of a model's iterates, which the model holds while it is evaluated.

    It is the average of RNGD, for other optimizers: after step t it moves by 1 / (t / 10) towards the iterate.

    Args:
        model: the model.
        optimizer: its optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        trained = _trained(model)
        self._iterates: list[Tensor] = [parameter.detach() for parameter in trained]
        self._others = [iterate.clone() for iterate in self._iterates]
        for parameter, other in zip(trained, self._others, strict=True):
            optimizer.state[parameter]["average"] = other
        self._swapped = False
        self._steps = 0
        model.register_forward_pre_hook(self._follow)
        optimizer.register_step_post_hook(self._average)

    @torch.no_grad()
    def _average(self, *_: object) -> None:
        self._steps += 1
        torch._foreach_lerp_(self._others, self._iterates, min(1.0, 1 / (WINDOW * self._steps)))

    @torch.no_grad()
    def _follow(self, module: nn.Module, _: object) -> None:
        """Swap the two if the model is evaluated and holds the iterate, or trains and holds the average."""
        if module.training == self._swapped:
            kept = torch._foreach_clone(self._iterates)
            torch._foreach_copy_(self._iterates, self._others)
            torch._foreach_copy_(self._others, kept)
            self._swapped = not self._swapped


def _averaged_muon(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Create Muon whose model holds the average of its last iterates while it is evaluated."""
    optimizer = _muon(model, **options)
    AverageWhenEvaluated(model, optimizer)
    return optimizer


def _shampoo(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Create Shampoo without momentum, which makes this one diverge, and with a damping that lets it take steps."""
    shampoo = installed("Shampoo")
    return shampoo(_trained(model), weight_decouple=True, preconditioning_compute_steps=20, matrix_eps=1e-3, **options)


def _of_trained(make: Callable[..., torch.optim.Optimizer], model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return make(_trained(model), **options)


def _soap(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return installed("SOAP")(_trained(model), **options)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _part(**options: Any) -> Peer:
    """Return RNGD with some of its options changed, untuned."""
    return Peer(partial(RNGD, **options), {"lr": (Spectral.default_lr,)})


SGD = Peer(
    partial(_of_trained, partial(torch.optim.SGD, momentum=0.9)),
    {"lr": (1e-2, 3e-2, 0.1, 0.3), "weight_decay": (5e-4, 5e-3)},
    scheduled=True,
)
ADAMW = Peer(partial(_of_trained, torch.optim.AdamW), {"lr": (1e-3, 2e-3, 4e-3, 8e-3), **DECAYS}, scheduled=True)
RIVALS = {
    "SGD": SGD,
    "AdamW": ADAMW,
    "BNB+AdamW": replace(ADAMW, normalization="before"),
    "Schedule-Free AdamW": Peer(_schedule_free, {"lr": (2e-3, 4e-3, 8e-3, 1.6e-2), **DECAYS}),
    "Muon": Peer(_muon, {"lr": (5e-3, 1e-2, 2e-2, 4e-2), "weight_decay": (0.05, 0.2)}, scheduled=True),
    "averaged Muon": Peer(_averaged_muon, {"lr": (5e-3, 1e-2, 2e-2, 4e-2), "weight_decay": (0.05, 0.2)}),
    "SOAP": Peer(_soap, {"lr": (1e-3, 2e-3, 4e-3, 8e-3), **DECAYS}, scheduled=True),
    "Shampoo": Peer(_shampoo, {"lr": (1e-2, 3e-2, 0.1, 0.2), "weight_decay": (1e-3, 1e-2)}, scheduled=True),
    "K-FAC": Peer(PEERS["K-FAC"].make, {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (1e-3, 1e-1)}, scheduled=True),
}
OURS = {
    UNTUNED: _part(),
    "RNGD": Peer(RNGD, {"lr": (5e-3, 1e-2, 2e-2, 4e-2), "damping": (0.1, 1.0)}),
}
PARTS = {
    "no metric": _part(metric=MetricOptions(power=0.0)),
    "shared block only": _part(metric=MetricOptions(structure="shared")),
    "inverse inside": _part(step_rule=InverseInside()),
    "the metric of raw inputs, too": _part(metric=MetricOptions(power=1.0)),
    "no average": _part(averaging=0.0),
    "a cosine for the average": replace(_part(averaging=0.0), scheduled=True),
    "no decay": _part(weight_decay=0.0),
    "heads as other layers": _part(step_rule=Spectral(head=1.0), weight_decay=0.1),
    "steps of fixed length": _part(step_rule=FixedLength()),
    "no momentum": _part(momentum=0.0),
    "normalized rule": _part(step_rule="normalized"),
}
CONTESTANTS = {**RIVALS, **OURS, **PARTS}
