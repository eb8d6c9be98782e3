"""What a layer is to those around it: whether it is the head of a softmax, by the gradients of its outputs."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from builders import average, classified, inputs, mlp, step, structures
from torch import Tensor
from torch.nn import functional

from relfisher import RNGD
from relfisher.observe.roles import is_softmax_gradient

Loss = Callable[[Tensor, Tensor], Tensor]


def one_hot(y: Tensor, z: Tensor) -> Tensor:
    """Return the classes as rows like those of z."""
    return functional.one_hot(y, z.shape[-1]).to(z)


def focal(z: Tensor, y: Tensor) -> Tensor:
    """Return the focal loss: classes that are likely count less."""
    each = functional.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (functional.cross_entropy, True),
        (partial(functional.cross_entropy, label_smoothing=0.1, reduction="sum"), True),
        (lambda z, y: 1000 * functional.cross_entropy(z, y), True),
        (lambda z, y: functional.kl_div(z.log_softmax(-1), one_hot(y, z), reduction="batchmean"), True),
        (lambda z, y: functional.cross_entropy(z, y, weight=torch.arange(1, 7).to(z)), True),
        (partial(functional.cross_entropy, ignore_index=2), True),
        (lambda z, y: functional.cross_entropy(z / 7, y), True),
        (lambda z, y: functional.cross_entropy(z, z.detach()[y].softmax(-1)), True),
        (lambda z, y: functional.cross_entropy(z, 0.7 * one_hot(y, z) + 0.3 * one_hot(y.roll(1), z)), True),
        (
            lambda z, y: functional.cross_entropy(z.masked_fill(one_hot(y + 1 - 6 * (y == 5), z) > 0, -torch.inf), y),
            True,
        ),
        (focal, True),
        (lambda z, y: functional.mse_loss(z, one_hot(y, z)), False),
        (lambda z, y: functional.mse_loss(functional.layer_norm(z, (6,)), one_hot(y, z)), False),
        (lambda z, y: functional.cross_entropy(functional.layer_norm(z, (6,)), y), False),
        (lambda z, y: (1 - z.gather(1, y[:, None]) + z - one_hot(y, z)).relu().mean(), False),
        (lambda z, y: functional.binary_cross_entropy_with_logits(z, one_hot(y, z)), False),
        (lambda z, y: 0 * functional.cross_entropy(z, y), False),
    ],
)
@pytest.mark.parametrize("scale", [3.0, 0.3])
def test_gradients_tell_a_loss_of_the_softmax(loss: Loss, told: bool, dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = (scale * torch.randn(2, 8, 6, generator=generator)).to(dtype).requires_grad_()
    y = torch.randint(6, (16,), generator=generator)
    (gradient,) = torch.autograd.grad(loss(z.view(16, 6), y), z)
    assert is_softmax_gradient(gradient, z) == told


def test_rows_that_rounding_spoils_do_not_hide_a_softmax() -> None:
    """The gradient of a confident row is what rounding has left of 1 - p."""
    z = torch.zeros(2, 6)
    z[0, 0] = 16.0
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(z, torch.tensor([0, 1])), z)
    assert abs(float(gradient[0].sum())) > 1e-3 * float(gradient[0].abs().sum())
    assert is_softmax_gradient(gradient, z)


def test_a_gradient_of_zeros_does_not_say_what_scores_the_outputs() -> None:
    model, twin = mlp(), mlp()
    optimizer, other = (RNGD(each, fit="plain", lr=1e-9) for each in (model, twin))
    given = inputs(), torch.arange(16) % 3
    step(model, optimizer, given, lambda model, given: 0 * classified(model, given))
    assert "4" not in structures(optimizer)
    for each, watcher in ((model, optimizer), (twin, other)):
        step(each, watcher, given, classified)
    assert structures(optimizer) == structures(other) == dict.fromkeys("024", "kronecker")
    for key in ("metric", "output"):
        torch.testing.assert_close(average(optimizer, model[4], key), average(other, twin[4], key))
