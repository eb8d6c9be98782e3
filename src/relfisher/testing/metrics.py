"""The check of a metric."""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.metric import Metric
from relfisher.shapes import Float
from relfisher.testing.comparison import same

__all__ = ["check_metric"]


def check_metric(metric: Metric, expected: Float[Tensor, "D D"] | None = None, rtol: float = 1e-8) -> None:
    """Check that a metric's operations agree with a single matrix, and that this matrix is a metric.

    The matrix is built column by column with `matvec`. It must be symmetric and positive semi-definite, and `matmat`,
    `to_dense`, `blocks`, `diagonal`, `trace`, `eigvalsh`, `inner`, `solve` and `logdet` must agree with it.

    Args:
        metric: the metric to check, with at most a few hundred parameters.
        expected: the matrix that the metric should equal, such as `relative_fisher(...).to_dense()`; None to check only
            that the operations agree with each other.
        rtol: the tolerance, relative to the largest entry.

    Raises:
        AssertionError: if a check fails; the message says which one, and by how much.
    """
    size = metric.shape[0]
    eye = torch.eye(size, dtype=metric.dtype, device=metric.device)
    matrix = torch.stack([metric.matvec(column) for column in eye], dim=1)
    same("symmetry", matrix, matrix.T, rtol)
    if expected is not None:
        same("the matrix", matrix, expected, rtol)
    values = torch.linalg.eigvalsh(matrix)
    if float(values[0]) < -rtol * max(float(values[-1]), 1.0):
        raise AssertionError(
            f"the metric is not positive semi-definite: its least eigenvalue is {float(values[0]):.3e}"
        )
    probe = torch.linspace(-1, 2, size, dtype=metric.dtype, device=metric.device)
    damping = float(values[-1]) * 0.1 + 1e-3
    damped = matrix + damping * eye
    same("matmat", metric.matmat(eye), matrix, rtol)
    same("to_dense", metric.to_dense(), matrix, rtol)
    same("blocks", torch.block_diag(*metric.blocks()), matrix, rtol)  # type: ignore[no-untyped-call]  # torch's own
    same("diagonal", metric.diagonal(), matrix.diagonal(), rtol)
    same("trace", metric.trace(), matrix.trace(), rtol)
    same("eigvalsh", metric.eigvalsh(), values, rtol)
    same("inner", metric.inner(probe, probe), probe @ matrix @ probe, rtol)
    same("solve", metric.solve(probe, damping), torch.linalg.solve(damped, probe), rtol)
    same("logdet", metric.logdet(damping), torch.logdet(damped), rtol)
