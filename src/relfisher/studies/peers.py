"""The compared optimizers, each with equally many configurations to choose from, and RNGD with its defaults."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import relfisher
from relfisher.studies.networks import Normalization

__all__ = [
    "CONFIGURATIONS",
    "PEERS",
    "UNTUNED",
    "Configuration",
    "Joint",
    "Peer",
    "UnavailableError",
    "available",
    "described",
    "installed",
    "with_adamw",
]

CONFIGURATIONS = 8
UNTUNED = "RNGD-defaults"
SMALL_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
LARGE_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
MIDDLE_RATES = (1e-3, 3e-3, 1e-2, 3e-2)

Configuration = Mapping[str, float]


def described(options: Configuration) -> str:
    """Return the options of an optimizer as text."""
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


"""The options of an optimizer by name, including the learning rate `lr`."""


class UnavailableError(Exception):
    """An optimizer is not available here; the message says why in a few words."""


@dataclass(frozen=True)
class Peer:
    """An optimizer: a function that creates it for a model, its tuning grid, and the batch norm to use with it.

    With `scheduled`, a cosine takes its learning rates to 0 over a run whose length is known.
    """

    make: Callable[..., torch.optim.Optimizer]
    grid: Mapping[str, tuple[float, ...]]
    normalization: Normalization = "none"
    scheduled: bool = False

    @property
    def configurations(self) -> list[Configuration]:
        """All combinations of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Joint(torch.optim.Optimizer):
    """Several optimizers as one, each with its share of a model's parameters; its state is their combined state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here passes a closure
        """Take the step of each."""
        for part in self._parts:
            part.step()


class _InSingle(Joint):
    """Optimizers that would convert everything to bfloat16, run in single precision."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here passes a closure
        with patch.object(Tensor, "bfloat16", Tensor.clone):
            super().step()


def _sgd(model: nn.Module, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def _adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), **options)


def _fused_adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), fused=True, **options)


def _adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **options)


def _muon(model: nn.Module, lr: float = 1e-2, rest_lr: float = 1e-3) -> torch.optim.Optimizer:
    """Create Muon for matrices other than embeddings and heads, and AdamW for the rest, as its authors recommend."""
    if not hasattr(torch.optim, "Muon"):
        raise UnavailableError(f"not available: Muon comes with torch 2.9, this is {torch.__version__}")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = [layer.weight for layer in layers[:-1]]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)
    return with_adamw(muon, model, rest_lr)


def _single_muon(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return _InSingle(_muon(model, **options))


def _soap(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return installed("SOAP")(model.parameters(), weight_decay=0.0, **options)


def _shampoo(model: nn.Module, *, lr: float = 1e-2, interval: float = 20) -> torch.optim.Optimizer:
    return installed("Shampoo")(model.parameters(), lr=lr, preconditioning_compute_steps=int(interval))


def _kfac(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Create inverse-free K-FAC for linear layers and convolutions, and AdamW for the rest."""
    make = installed("optim.optimizer.SINGD", "singd")
    kfac = make(model, kfac_like=True, warn_unsupported=False, normalize_lr_cov=True, alpha1=0.0, **options)
    return with_adamw(kfac, model, 1e-3)


def _rngd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return relfisher.RNGD(model, **options)


def _published(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return relfisher.RNGD.as_published(model, **options)


def _shared(model: nn.Module, lr: float = 0.03, damping: float = 0.1) -> torch.optim.Optimizer:
    metric = relfisher.MetricOptions(structure="shared")
    return relfisher.RNGD(model, lr, damping=damping, step_rule=relfisher.TrustRegion(None), metric=metric)


def _trust_region(model: nn.Module, trust_region: float = 2e-3, **options: Any) -> torch.optim.Optimizer:
    return relfisher.RNGD(model, step_rule=relfisher.TrustRegion(trust_region), **options)


def _normalized(model: nn.Module, lr: float | None = None, averaging: float | None = None) -> torch.optim.Optimizer:
    """Create RNGD with the normalized rule, with or without an average."""
    return relfisher.RNGD(model, lr, step_rule="normalized", averaging=averaging)


def with_adamw(
    optimizer: torch.optim.Optimizer, model: nn.Module, lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Add AdamW for the trained parameters of a model that an optimizer does not train."""
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in known]
    return Joint(optimizer, torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)) if rest else optimizer


def installed(name: str, package: str = "pytorch-optimizer") -> Callable[..., torch.optim.Optimizer]:
    """Return an optimizer of another package by its name.

    Args:
        name: the name, after that of the module.
        package: the package.

    Returns:
        The class.

    Raises:
        UnavailableError: if the package is not installed.
    """
    module, _, attribute = f"{package.replace('-', '_')}.{name}".rpartition(".")
    try:
        optimizer: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        remedy = "comes with the extra `bench`, pip install 'relfisher[bench]'"
        raise UnavailableError(f"not installed: {package} {remedy}") from error
    return optimizer


def available(
    methods: tuple[str, ...], peers: Mapping[str, Peer], build: Callable[[int, Normalization], nn.Module]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Separate the available methods from the others.

    Args:
        methods: keys of `peers`.
        peers: the methods.
        build: returns the model for which they are created, from a seed and its normalization.

    Returns:
        The reasons why methods are not available, by method, and the names of the available methods.
    """
    notes = {}
    for method in methods:
        try:
            peers[method].make(build(0, peers[method].normalization))
        except UnavailableError as error:
            notes[method] = str(error)
    return notes, tuple(method for method in methods if method not in notes)


PEERS = {
    "SGD": Peer(_sgd, {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)}),
    "Adam": Peer(_adam, {"lr": SMALL_RATES}),
    "Adam-fused": Peer(_fused_adam, {"lr": SMALL_RATES}),
    "AdamW": Peer(_adamw, {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "weight_decay": (1e-2, 1e-1)}),
    "BNA+Adam": Peer(_adam, {"lr": SMALL_RATES}, "after"),
    "BNB+Adam": Peer(_adam, {"lr": SMALL_RATES}, "before"),
    "Muon": Peer(_muon, {"lr": MIDDLE_RATES, "rest_lr": (1e-3, 3e-3)}),
    "Muon-float32": Peer(_single_muon, {"lr": MIDDLE_RATES, "rest_lr": (1e-3, 3e-3)}),
    "SOAP": Peer(_soap, {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "precondition_frequency": (10, 50)}),
    "Shampoo": Peer(_shampoo, {"lr": (1e-3, 1e-2, 0.1, 1.0), "interval": (20, 100)}),
    "K-FAC": Peer(_kfac, {"lr": MIDDLE_RATES, "damping": (1e-3, 1e-1)}),
    "FOOF": Peer(_shared, {"lr": (0.01, 0.03, 0.1, 0.3), "damping": (1e-2, 1e-1)}),
    "RNGD": Peer(_rngd, {"lr": (5e-3, 1e-2, 2e-2, 4e-2), "damping": (1e-1, 1.0)}),
    UNTUNED: Peer(_rngd, {"lr": (1e-2,)}),
    "RNGD-trust-region": Peer(
        _trust_region, {"lr": (0.3,), "trust_region": (5e-4, 2e-3, 5e-3, 2e-2), "averaging": (0.0, 0.1)}
    ),
    "RNGD-normalized": Peer(_normalized, {"lr": (3e-3, 1e-2, 2e-2, 4e-2), "averaging": (0.0, 0.1)}),
    "RNGD-published": Peer(_published, {"lr": LARGE_RATES}),
}
