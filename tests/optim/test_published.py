"""RNGD.as_published against equations (31)-(33), written out plainly, a neuron at a time."""

import math

import pytest
import torch
from builders import mlp, train
from torch import nn

from relfisher import RNGD, MetricOptions, TrustRegion

STEPS, INTERVAL, DECAY, EPSILON = 300, 100, 0.995, 1e-4


class PlainRNGD:
    """The published algorithm on weight matrices (weight, bias) [out, in + 1]; nothing of the library is used."""

    def __init__(self, matrices, activation, information, lr):
        self.matrices = [matrix.clone().requires_grad_() for matrix in matrices]
        self.activation, self.information, self.lr = activation, information, lr
        last = len(matrices) - 1
        self.metrics = [
            [torch.eye(matrix.shape[1], dtype=matrix.dtype) for _ in range(1 if place in (0, last) else len(matrix))]
            for place, matrix in enumerate(matrices)
        ]
        self.inverses = [list(blocks) for blocks in self.metrics]

    def step(self, iteration, x, y):
        inputs, outputs, h = [], [], x
        for place, matrix in enumerate(self.matrices):
            augmented = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], dim=1)
            z = augmented @ matrix.T
            inputs.append(augmented.detach())
            outputs.append(z.detach())
            h = z if place == len(self.matrices) - 1 else self.activation(z)
        cost = -torch.log_softmax(h, 1)[torch.arange(len(y)), y].mean()
        gradients = torch.autograd.grad(cost, self.matrices)
        last = len(self.matrices) - 1
        for place, matrix in enumerate(self.matrices):
            shared = place in (0, last)
            for unit in range(len(self.metrics[place])):
                d = inputs[place].shape[1]
                batch = torch.zeros(d, d, dtype=x.dtype)
                for sample, z in zip(inputs[place], outputs[place][:, unit].tolist(), strict=True):
                    weight = 1.0 if shared else self.information(z)
                    batch += weight * torch.outer(sample, sample) / len(x)
                self.metrics[place][unit] = DECAY * self.metrics[place][unit] + (1 - DECAY) * batch
                if iteration % INTERVAL == 0:
                    metric = self.metrics[place][unit]
                    epsilon = EPSILON * torch.trace(metric)
                    self.inverses[place][unit] = torch.linalg.inv(metric + epsilon * torch.eye(d, dtype=x.dtype))
            with torch.no_grad():
                for unit in range(len(matrix)):
                    inverse = self.inverses[place][0 if shared else unit]
                    matrix[unit] -= self.lr * inverse @ gradients[place][unit]
        return float(cost.detach())


@pytest.mark.parametrize(
    ("activation", "function", "information"),
    [
        (nn.ReLU, torch.relu, lambda z: 1 / (1 + math.exp(-z)) ** 2),
        (nn.Tanh, torch.tanh, lambda z: 1 - math.tanh(z) ** 2),
        (nn.Sigmoid, torch.sigmoid, lambda z: math.exp(-z) / (1 + math.exp(-z)) ** 2),
    ],
)
def test_agrees_with_the_plain_algorithm(activation, function, information):
    model = mlp(activation, (5, 4, 3, 3), seed=1)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    matrices = [torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1) for layer in linears]
    plain = PlainRNGD(matrices, function, information, lr=0.3)
    optimizer = RNGD.as_published(model, lr=0.3)
    generator = torch.Generator().manual_seed(2)
    costs = []
    for iteration in range(STEPS):
        x = torch.randn(8, 5, dtype=torch.float64, generator=generator)
        y = (x[:, :3] + 0.3 * x[:, 2:]).argmax(1)
        optimizer.zero_grad()
        cost = nn.functional.cross_entropy(model(x), y)
        cost.backward()
        optimizer.step()
        expected = plain.step(iteration, x, y)
        costs.append(expected)
        assert cost.item() == pytest.approx(expected, rel=1e-9)
    for layer, matrix in zip(linears, plain.matrices, strict=True):
        found = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        assert float((found - matrix.detach()).norm() / matrix.detach().norm()) < 1e-9
    assert sum(costs[-30:]) < 0.95 * sum(costs[:30])  # the runs compared are runs that learn


def test_a_loaded_metric_of_another_structure_is_refused():
    """An average that starts at the identity holds something from its first update on."""
    model = mlp()
    optimizer = RNGD.as_published(model)
    train(model, optimizer, 2)
    options = MetricOptions(structure="diagonal", bias_correction=False, stagger=False, stats_interval=1)
    other = RNGD(model, step_rule=TrustRegion(None), metric=options)
    train(model, other, 1)
    with pytest.raises(ValueError, match=r"the loaded metric of '0' has the shapes .*, but the structure 'diagonal'"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="the layer '0' has no statistics yet"):
        RNGD.as_published(mlp()).metric("0")
