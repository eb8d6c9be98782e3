"""Grouped options: how metrics are kept, and how AdamW trains the parameters without one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from relfisher.layers import Layer, check_kinds
from relfisher.observe import Role
from relfisher.optim.assignment import Rule, check_rules
from relfisher.optim.matching import ROLES, check_keys, entry
from relfisher.optim.schedule import WARMUP, Schedule
from relfisher.structures import Inversion
from relfisher.validation import (
    check_bool,
    check_integer,
    check_interval,
    check_keys_are_names,
    check_one_of,
    check_positive,
    check_rate,
    check_sequence,
)

__all__ = ["FITS", "AdamWOptions", "Damping", "Fit", "Inversions", "MetricOptions", "fit_named"]

#: A multiple of the metric's mean eigenvalue, an `Inversion`, or either of these by layer.
Damping = float | Inversion | Mapping[str, float | Inversion]


@dataclass(frozen=True)
class Fit:
    """The default regularization.

    Args:
        weight_decay: the decoupled weight decay.
        damping: the damping.
        raw_power: the power of the inverse for linear layers that read the model's raw inputs.
    """

    weight_decay: float
    damping: float
    raw_power: float


#: What the training is for. Noisy data are fitted to generalize: the metric of the raw inputs would make all their
#: directions equal, those of noise among them. Where the training loss is the accuracy, all of the metric is used.
FITS = {"generalize": Fit(0.1, 0.1, 0.0), "plain": Fit(0.0, 0.1, 1.0), "interpolate": Fit(0.0, 1e-4, 1.0)}


def fit_named(name: str) -> Fit:
    """Return the regularization of a name, or raise ValueError if there is no such name."""
    check_one_of("fit", name, tuple(FITS))
    return FITS[name]


@dataclass(frozen=True)
class MetricOptions:
    """How the metrics of a model's layers are kept; the same for `RNGD`, `Preconditioner`, `plan` and `coverage`.

    `structure` and `power` may be given by layer, as in `{"head": "kronecker", "encoder.*": "shared"}`. A key is the
    name of a layer or its module, a name pattern as in `fnmatch`, or the name of a module class. For `power` it may
    also be "first", for layers that read the model's raw inputs, or "head", for layers that output softmax logits.

    Args:
        structure: "auto", "neuron" (exact blocks), "shared", "kronecker", "diagonal", "published", "fallback" (AdamW)
            or the name of a registered structure; or a `Structure`. See `relfisher.optim.assign`. Embeddings use the
            diagonal unless a rule by layer says otherwise.
        structure_bytes: the memory limit in bytes for the metric and the inverse of one layer, used by "auto".
        power: the power of the inverse, in [0, 1]: 1 for the natural gradient, 0 for the gradient. None for 1, except
            that `RNGD(fit="generalize")` has 0 for linear layers that read raw inputs, unless `damping` names them.
        decay: the share of the moving average that is kept per iteration, in [0, 1).
        stats_interval: the number of iterations between updates of the metric.
        stats_samples: the approximate maximum number of samples (rows of a batch, positions of a sequence or an image)
            per layer in the statistics of a step, evenly spread over all of its calls; None for all. Accumulated
            batches give the same sample as one large batch if a layer is called once per pass with samples first.
        refresh_interval: the number of iterations between refreshes of the inverse.
        warmup_refreshes: additional iterations at which the metric is updated and the inverse refreshed.
        bias_correction: True starts the moving average empty and corrects its bias; False starts it at the identity.
        stagger: True spreads the layers' updates and refreshes over the intervals, so that no single step is slow, and
            layers of a kind share a turn, so that most steps have neither; False does them all at once.
        layers: additional kinds of layers, which take precedence over registered ones.

    Raises:
        ValueError: if an option is out of range.
        TypeError: if an option has the wrong type.
    """

    structure: Rule | Mapping[str, Rule] = "auto"
    structure_bytes: int = 256 << 20
    power: float | Mapping[str, float] | None = None
    decay: float = 0.995
    stats_interval: int = 20
    stats_samples: int | None = 256
    refresh_interval: int = 200
    warmup_refreshes: tuple[int, ...] = WARMUP
    bias_correction: bool = True
    stagger: bool = True
    layers: Sequence[type[Layer]] = ()

    def __post_init__(self) -> None:
        check_rules(self.structure)
        check_positive("structure_bytes", self.structure_bytes)
        if isinstance(self.power, Mapping):
            check_keys_are_names("power", self.power)
        for power in self.power.values() if isinstance(self.power, Mapping) else [self.power]:
            if power is not None:
                check_interval("power", power, 0, 1, closed="both")
        check_interval("decay", self.decay, 0, 1)
        if self.stats_samples is not None:
            check_integer("stats_samples", self.stats_samples)
        for name in ("bias_correction", "stagger"):
            check_bool(name, getattr(self, name))
        for name in ("layers", "warmup_refreshes"):
            check_sequence(name, getattr(self, name))
        check_kinds(self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "warmup_refreshes", tuple(self.warmup_refreshes))
        self.schedule  # noqa: B018  # checks the intervals

    @property
    def schedule(self) -> Schedule:
        """When statistics and refreshes are due."""
        return Schedule(self.stats_interval, self.refresh_interval, self.warmup_refreshes, staggered=self.stagger)

    @property
    def ema_decay(self) -> float:
        """The share of the moving average that is kept from one update to the next."""
        return self.decay**self.stats_interval

    def check(self, layers: list[Layer]) -> None:
        """Raise ValueError if a key of an option by layer matches no layer of a model."""
        check_rules(self.structure, layers)
        if isinstance(self.power, Mapping):
            check_keys("power", self.power, layers, ROLES)


@dataclass(frozen=True)
class AdamWOptions:
    """How AdamW trains the parameters without a metric (Loshchilov & Hutter 2019).

    Args:
        lr: the learning rate.
        betas: the decay rates of the two moments.
        eps: added to the root of the second moment.
        max_share: the largest share of all trained numbers that may be left to AdamW for want of a metric, in [0, 1].
            If more are, the constructor raises an error, or the first step, before it changes anything.

    Raises:
        ValueError: if an option is out of range.
        TypeError: if an option has the wrong type.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_share: float = 1.0

    def __post_init__(self) -> None:
        check_rate("fallback.lr", self.lr)
        check_interval("fallback.max_share", self.max_share, 0, 1, closed="both")
        check_moments("fallback.betas", self.betas, "fallback.eps", self.eps)


def check_moments(name: str, betas: object, eps_name: str, eps: float) -> None:
    """Raise unless `betas` are the decay rates of two moments, and `eps` is above 0 in single precision, too."""
    check_sequence(name, betas)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{name} must be two numbers, got {betas!r}")
    for beta in betas:
        check_interval(name, beta, 0, 1)
    check_interval(eps_name, eps, torch.finfo(torch.float32).tiny, math.inf)


class Inversions:
    """The inversion of each layer, as given by `damping` and `MetricOptions.power`.

    Args:
        damping: the damping for all layers, or by layer.
        power: the power for all layers, or by layer; None for the default.
        raw_power: the default for linear layers that read raw inputs, unless `damping` names them or is an
            `Inversion`. It is 1 for others.

    Attributes:
        default: the damping of layers that no key matches, in groups without their own.
    """

    def __init__(self, damping: Damping, power: float | Mapping[str, float] | None, raw_power: float = 1.0) -> None:
        if isinstance(damping, Mapping):
            check_keys_are_names("damping", damping)
        given = damping.values() if isinstance(damping, Mapping) else [damping]
        for each in given:
            if isinstance(each, Inversion):
                if each.rank is not None:
                    raise ValueError(f"the rank belongs to the structure, as in SharedBlock({each.rank}); got {each}")
            else:
                check_interval("damping", each, 0, math.inf)
        self._by_layer: Mapping[str, float | Inversion] = damping if isinstance(damping, Mapping) else {}
        self._for_all = isinstance(damping, Inversion)
        if isinstance(damping, Inversion):
            self._base = damping
        else:
            self._base = Inversion() if isinstance(damping, Mapping) else Inversion(float(damping))
        self._power = power
        self._raw_power = raw_power
        self.default = self._base.damping

    def check(self, layers: list[Layer]) -> None:
        """Raise ValueError if a key of `damping` matches no layer of a model."""
        check_keys("damping", self._by_layer, layers, ROLES)

    def of(self, layer: Layer, role: Role | None, damping: float) -> Inversion:
        """Return the inversion of a layer.

        Args:
            layer: the layer.
            role: its role, if known.
            damping: the damping of its group, used if no key of `damping` matches the layer.
        """
        own, power = self._of(layer, role)
        if not isinstance(own, Inversion):
            own = replace(self._base, damping=float(damping if own is None else own))
        return own if power is None else replace(own, power=power)

    def is_flat(self, layer: Layer, role: Role | None) -> bool:
        """Return whether the gradient of a layer stays as it is: whether its inversion has the power 0."""
        own, power = self._of(layer, role)
        return (own.power if isinstance(own, Inversion) else self._base.power) == 0 if power is None else power == 0

    def _of(self, layer: Layer, role: Role | None) -> tuple[float | Inversion | None, float | None]:
        """Return the value of `damping` for a layer, and its power; None where neither names the layer."""
        own = entry(self._by_layer, layer, role) if self._by_layer else None
        if self._power is not None:
            return own, entry(self._power, layer, role) if isinstance(self._power, Mapping) else self._power
        given = own is not None or self._for_all
        raw = not given and role is not None and role.reads_input and layer.is_linear
        return own, self._raw_power if raw else None
