"""The oracle for what you add: one call checks a response, a metric, a structure, a layer or a step rule of your own.

Nothing here trusts what it checks. Expectations are enumerated or integrated from `log_prob` alone, derivatives come
from automatic differentiation, a metric is compared with the matrix that its products spell out, a layer with what its
module computes, and a step rule with itself after saving and loading.
"""

from relfisher.testing.layers import check_layer
from relfisher.testing.metrics import check_metric
from relfisher.testing.responses import check_response
from relfisher.testing.rules import check_rule
from relfisher.testing.structures import check_structure

__all__ = ["check_layer", "check_metric", "check_response", "check_rule", "check_structure"]
