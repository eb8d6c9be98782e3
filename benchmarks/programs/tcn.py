"""A weight-normed temporal convolutional network that adds two marked numbers of a sequence."""

import torch
from program import Program, Task, adam, adams
from torch import nn
from torch.nn.functional import mse_loss, pad
from torch.nn.utils.parametrizations import weight_norm

STEPS, LENGTH, BATCH, WIDTH = 400, 64, 32, 24


class Block(nn.Module):
    def __init__(self, inputs, spread):
        super().__init__()
        self.spread = spread
        self.first = weight_norm(nn.Conv1d(inputs, WIDTH, 6, dilation=spread))
        self.second = weight_norm(nn.Conv1d(WIDTH, WIDTH, 6, dilation=spread))
        self.skip = nn.Conv1d(inputs, WIDTH, 1) if inputs != WIDTH else nn.Identity()

    def forward(self, x):
        h = torch.relu(self.first(pad(x, (5 * self.spread, 0))))
        h = torch.relu(self.second(pad(h, (5 * self.spread, 0))))
        return torch.relu(h + self.skip(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(WIDTH if place else 2, 2**place) for place in range(4)))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.head(self.blocks(x)[..., -1]).squeeze(-1)


def drawn(count, generator):
    numbers = torch.rand(count, LENGTH, generator=generator)
    marks = torch.zeros(count, LENGTH)
    half = LENGTH // 2
    for start in (0, half):
        marks[torch.arange(count), start + torch.randint(half, (count,), generator=generator)] = 1
    return torch.stack([numbers, marks], 1), (numbers * marks).sum(1)


def make(seed):
    model, generator = Network(), torch.Generator().manual_seed(seed)
    x, y = drawn(1000, torch.Generator().manual_seed(10_000))

    def loss(_):
        inputs, sums = drawn(BATCH, generator)
        return mse_loss(model(inputs), sums)

    return Task(model, loss, lambda: float(mse_loss(model(x), y)))


PROGRAM = Program(
    "a weight-normed convolutional network that adds (TCN)",
    "Bai et al. 2018: Adam, lr 4e-3",
    STEPS,
    make,
    adam(4e-3),
    adams(STEPS, 1e-3, 4e-3, 1e-2),
    "squared error",
)
