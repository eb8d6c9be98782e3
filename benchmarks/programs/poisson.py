"""A physics-informed network: -u'' = pi^2 sin(pi x) on [-1, 1] with u = 0 at both ends, from 16 points."""

import math
from itertools import pairwise

import torch
from program import Program, Task, adam, adams
from torch import nn

STEPS = 1000


def make(_):
    sizes = (1, 50, 50, 50, 1)
    layers = [each for a, b in pairwise(sizes) for each in (nn.Linear(a, b), nn.Tanh())][:-1]
    model = nn.Sequential(*layers)
    for layer in model[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    inside = torch.linspace(-1, 1, 18)[1:-1, None].requires_grad_()
    ends, grid = torch.tensor([[-1.0], [1.0]]), torch.linspace(-1, 1, 201)[:, None]

    def loss(_):
        u = model(inside)
        (slope,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), inside, create_graph=True)
        rest = bend + math.pi**2 * torch.sin(math.pi * inside)
        return rest.square().mean() + model(ends).square().mean()

    def error():
        exact = torch.sin(math.pi * grid)
        return float((model(grid) - exact).norm() / exact.norm())

    return Task(model, loss, error)


PROGRAM = Program(
    "Poisson's equation by a physics-informed network",
    "Lu et al. 2021 (DeepXDE): Adam, lr 1e-3, 16 points",
    STEPS,
    make,
    adam(1e-3),
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "relative error of the solution",
    recipe={"lr": 3e-3, "step_rule": "normalized", "fit": "interpolate", "total_steps": STEPS},
)
