"""The settings of the paper's section 5.2, equations (31)-(33), with those of its reference implementation."""

from __future__ import annotations

from typing import Any

from torch import nn

from relfisher.optim.options import MetricOptions
from relfisher.optim.rules import TrustRegion
from relfisher.responses import SmoothReLUGaussian
from relfisher.structures import Inversion

__all__ = ["PUBLISHED"]

#: The arguments of `RNGD`.
PUBLISHED: dict[str, Any] = {
    "weight_decay": 0.0,
    "damping": Inversion(1e-4, relative_to="trace", pooled=False),
    "step_rule": TrustRegion(None),
    "metric": MetricOptions(
        structure="published",
        stats_interval=1,
        stats_samples=None,
        refresh_interval=100,
        warmup_refreshes=(),
        bias_correction=False,
        stagger=False,
    ),
    "responses": {nn.ReLU: SmoothReLUGaussian(1.0)},
}
