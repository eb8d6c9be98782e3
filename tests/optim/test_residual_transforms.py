"""Residuals by torch.func and by forward-mode derivatives: what residual RNGD and RNGD see of them."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from relfisher import RNGD, ResidualRNGD
from relfisher.optim.rows import drawn_rows, scaled_parts
from relfisher.optim.rowwise import taped


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def points():
    return torch.rand(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def laplacian_of_hessians(model):
    return vmap(hessian(lambda point: model(point)[0]))(points()).diagonal(dim1=1, dim2=2).sum(1) + 1


def slopes_in_reverse(model):
    return vmap(jacrev(model))(points())[:, 0] - 1


def slopes_of_the_sum(model):
    return grad(lambda x: model(x).sum())(points()) - 1


def along_a_direction(model):
    return jvp(model, (points(),), (torch.ones(6, 2, dtype=torch.float64),))[1] - 1


def by_dual_numbers(model):
    with forward_ad.dual_level():
        made = forward_ad.make_dual(points(), torch.ones(6, 2, dtype=torch.float64))
        found = forward_ad.unpack_dual(model(made))
        return found.primal + found.tangent - 1


def by_functional_call(model):
    return functional_call(model, dict(model.named_parameters()), (points(),)) - 1


def by_create_graph(model):
    x = points().requires_grad_()
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0] - 1


UNSEEN = [laplacian_of_hessians, slopes_in_reverse, slopes_of_the_sum, along_a_direction]
SEEN = [by_dual_numbers, by_functional_call, by_create_graph]


@pytest.mark.parametrize("residuals", [*UNSEEN, *SEEN])
def test_the_derivatives_of_rows_are_those_of_each_residual(residuals):
    model = network()
    layers = [model[0], model[2]]
    with taped(layers, model) as tape:
        rows = drawn_rows(scaled_parts([residuals(model)]), tape, layers, [], 100, torch.Generator())
    flat = residuals(model)
    flat = (flat / math.sqrt(flat.numel())).view(len(flat), -1).T.flatten()
    torch.testing.assert_close(rows.residuals, flat.detach())
    for one, place in zip(layers, rows.layers, strict=True):
        found = [
            torch.autograd.grad(each, [one.weight, one.bias], retain_graph=True, materialize_grads=True)
            for each in flat
        ]
        expected = torch.stack([torch.cat([weight, bias[:, None]], 1) for weight, bias in found])
        torch.testing.assert_close(place.dense(), expected)


@pytest.mark.parametrize("lr", [0.03, None])
@pytest.mark.parametrize("residuals", [laplacian_of_hessians, along_a_direction])
def test_residual_rngd_lowers_the_loss(residuals, lr):
    model = network()
    optimizer = ResidualRNGD(model, lr)
    losses = [float(optimizer.step(lambda: residuals(model))) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_vmap_over_weights_is_refused():
    model, other = network(), network()
    weights, x = torch.stack([model[2].weight.detach(), other[2].weight.detach()]), points()

    def residuals():
        return vmap(lambda weight: functional_call(model, {"2.weight": weight}, (x,)))(weights)

    with pytest.raises(ValueError, match="not over its weights"):
        ResidualRNGD(model).step(residuals)


@pytest.mark.parametrize("residuals", UNSEEN)
def test_rngd_says_that_it_does_not_see_passes_in_transforms(residuals):
    model = network()
    optimizer = RNGD(model, 0.01)
    residuals(model).square().mean().backward()
    with pytest.warns(UserWarning, match=r"not seen in a forward pass outside of torch\.func transforms"):
        optimizer.step()
    assert all(layer.structure is None for layer in optimizer.layers)


@pytest.mark.parametrize("residuals", SEEN)
def test_rngd_sees_the_values_of_units_and_not_their_derivatives(residuals):
    model = network()
    optimizer = RNGD(model, 0.01)
    residuals(model).square().mean().backward()
    optimizer.step()
    values = network()
    other = RNGD(values, 0.01)
    values(points()).square().mean().backward()
    other.step()
    for one, same in ((model[0], values[0]), (model[2], values[2])):
        torch.testing.assert_close(optimizer.state[one.weight]["metric"], other.state[same.weight]["metric"])
