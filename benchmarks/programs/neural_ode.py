"""A neural differential equation that learns a spiral from short pieces of it."""

import torch
from program import Program, Task, adams
from torch import nn

STEPS, BATCH, PIECE, TIMES = 400, 20, 10, 400


def solve(slope, start, times):
    """Return the states at equally spaced times, by Runge and Kutta's rule of order 4."""
    width, states = float(times[1] - times[0]), [start]
    for _ in times[1:]:
        y = states[-1]
        first = slope(y)
        second = slope(y + width / 2 * first)
        third = slope(y + width / 2 * second)
        states.append(y + width / 6 * (first + 2 * second + 2 * third + slope(y + width * third)))
    return torch.stack(states)


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for layer in self.layers[::2]:
            nn.init.normal_(layer.weight, 0, 0.1)
            nn.init.zeros_(layer.bias)

    def forward(self, y):
        return self.layers(y**3)


def make(seed):
    times, matrix = torch.linspace(0, 25, TIMES), torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    true = solve(lambda y: y**3 @ matrix, torch.tensor([[2.0, 0.0]]), times)
    model, generator = Slope(), torch.Generator().manual_seed(seed)

    def loss(_):
        starts = torch.randperm(TIMES - PIECE, generator=generator)[:BATCH]
        wanted = true[starts + torch.arange(PIECE)[:, None], 0]
        return (solve(model, wanted[0], times[:PIECE]) - wanted).abs().mean()

    return Task(model, loss, lambda: float((solve(model, true[0], times) - true).abs().mean()))


def own(model):
    return torch.optim.RMSprop(model.parameters(), 1e-3)


PROGRAM = Program(
    "a neural differential equation of a spiral",
    "torchdiffeq, ode_demo: RMSprop, lr 1e-3",
    STEPS,
    make,
    own,
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "absolute error of the whole spiral",
)
