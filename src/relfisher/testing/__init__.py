"""Checks for your extensions: one call each for a response, a metric, a structure, a layer or a step rule.

Nothing here relies on the code that it checks. Expectations are sums or integrals computed from `log_prob` alone, and
derivatives come from automatic differentiation. A metric is compared with the matrix built from its products, a layer
with the computation of its module, and a step rule with itself after saving and loading.
"""

from relfisher.testing.layers import check_layer
from relfisher.testing.metrics import check_metric
from relfisher.testing.responses import check_response
from relfisher.testing.rules import check_rule
from relfisher.testing.structures import check_structure

__all__ = ["check_layer", "check_metric", "check_response", "check_rule", "check_structure"]
