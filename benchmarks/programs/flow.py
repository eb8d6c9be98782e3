"""A continuous normalizing flow, whose weights at each time a network makes, of points on two circles."""

import math

import torch
from program import Program, Task, adam, adams
from sklearn.datasets import make_circles
from torch import nn

STEPS, BATCH, UNITS, HIDDEN, TIME, PARTS = 250, 256, 32, 32, 10.0, 8


class Flow(nn.Module):
    """The slope of points, and of their log-densities, at a time."""

    def __init__(self):
        super().__init__()
        self.maker = nn.Sequential(
            *(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 7 * UNITS)),
        )

    def forward(self, time, z):
        made = self.maker(torch.full((1, 1), time)).view(7, UNITS)
        inward, outward, gate, shift = made[:2], made[2:4], made[4:6], made[6]
        h = torch.tanh(z @ inward + shift)
        outward = outward * gate.sigmoid()
        return h @ outward.t() / UNITS, ((1 - h.square()) * (inward * outward).sum(0)).mean(1)


def log_density(flow, z):
    """Return the log-densities of points: back to a normal distribution, by Runge and Kutta's rule of order 4."""
    width, change = -TIME / PARTS, torch.zeros(len(z))
    for part in range(PARTS):
        time = TIME + part * width
        first, d1 = flow(time, z)
        second, d2 = flow(time + width / 2, z + width / 2 * first)
        third, d3 = flow(time + width / 2, z + width / 2 * second)
        fourth, d4 = flow(time + width, z + width * third)
        z = z + width / 6 * (first + 2 * second + 2 * third + fourth)
        change = change + width / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    normal = torch.distributions.Normal(0.0, math.sqrt(0.1))
    return normal.log_prob(z).sum(1) + change


def points(count, seed):
    return torch.tensor(make_circles(count, noise=0.06, factor=0.5, random_state=seed)[0], dtype=torch.float32)


def make(seed):
    model, held = Flow(), points(2000, 10_000_000)

    def loss(step):
        return -log_density(model, points(BATCH, 100_000 * seed + step)).mean()

    return Task(model, loss, lambda: -float(log_density(model, held).mean()))


PROGRAM = Program(
    "a continuous normalizing flow of two circles",
    "torchdiffeq, cnf: Adam, lr 1e-3",
    STEPS,
    make,
    adam(1e-3),
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "nats of unseen points",
)
