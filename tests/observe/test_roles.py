"""What a layer is to those around it: whether it is the head of a softmax, by the gradients of its outputs."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from builders import average, classified, inputs, mlp, step, structures
from torch import Tensor, nn
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


HEADS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "plain": lambda head, h: head(h),
    "divided": lambda head, h: head(h) / 0.7,
    "divided and shifted": lambda head, h: 2 * head(h) - 1.0,
    "joined": lambda head, h: torch.cat([head(h[:7]), head(h[7:])]),
    "joined again": lambda head, h: torch.cat([(z := head(h))[:5], z[5:]]),
    "stacked": lambda head, h: torch.stack([head(h[:8]), head(h[8:])], 1).transpose(0, 1).reshape(16, -1),
    "scaled by a parameter": lambda head, h: head(h) * nn.Parameter(torch.tensor(1.5, dtype=torch.float64)),
    "joined and divided": lambda head, h: torch.cat([head(h[:8]), head(h[8:])]).view(16, -1) / 2,
}


class Scored(nn.Module):
    """A network whose own forward pass makes something of the logits."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64)
        self.way = HEADS[way]

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.head, torch.tanh(self.fc(x)))


@pytest.mark.parametrize("way", HEADS)
@pytest.mark.parametrize("is_softmax", [True, False])
def test_a_head_may_scale_and_join_its_logits(way: str, is_softmax: bool) -> None:
    """As outside of the model; a squared error makes none of it a head."""
    model, y = Scored(way), torch.arange(16) % 4
    optimizer = RNGD(model)
    target = functional.one_hot(y).double()
    optimizer.zero_grad()
    out = model(inputs())
    (functional.cross_entropy(out, y) if is_softmax else functional.mse_loss(out, target)).backward()
    optimizer.step()
    assert {each.name: each.role.is_head for each in optimizer.layers}["head"] is is_softmax


@pytest.mark.parametrize("after", [torch.tanh, lambda z: z.softmax(-1), lambda z: z + z.mean(0), lambda z: z * z])
def test_what_goes_on_from_joined_or_scaled_outputs_makes_no_head(after: Callable[[Tensor], Tensor]) -> None:
    class Going(Scored):
        def forward(self, x: Tensor) -> Tensor:
            return after(super().forward(x))

    for way in ("divided", "joined"):
        model = Going(way)
        optimizer = RNGD(model)
        step(model, optimizer, (inputs(), torch.arange(16) % 4), classified)
        assert not {each.name: each.role.is_head for each in optimizer.layers}["head"]
