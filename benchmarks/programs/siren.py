"""A sine network that fits a photograph, with pixels between those that it sees for validation."""

import math

import torch
from program import Program, Task, adam, adams
from sklearn.datasets import load_sample_image
from torch import nn

STEPS = 400
WIDTH, FREQUENCY = 64, 30


class Sine(nn.Module):
    def __init__(self, inputs, outputs, *, first=False):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / FREQUENCY
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(FREQUENCY * self.linear(x))


def make(_):
    picture = torch.tensor(load_sample_image("china.jpg")[100:356:4, 100:356:4], dtype=torch.float32).mean(-1)
    side = torch.linspace(-1, 1, len(picture))
    places = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(-1, 2)
    values = picture.view(-1, 1) / 127.5 - 1
    seen = torch.rand(len(places), generator=torch.Generator().manual_seed(0)) < 0.9
    head = nn.Linear(WIDTH, 1)
    bound = math.sqrt(6 / WIDTH) / FREQUENCY
    nn.init.uniform_(head.weight, -bound, bound)
    model = nn.Sequential(Sine(2, WIDTH, first=True), Sine(WIDTH, WIDTH), Sine(WIDTH, WIDTH), head)

    def error():
        return float((model(places[~seen]) - values[~seen]).square().mean())

    return Task(model, lambda _: (model(places[seen]) - values[seen]).square().mean(), error)


PROGRAM = Program(
    "a sine network (SIREN) on a photograph",
    "Sitzmann et al. 2020: Adam, lr 1e-4",
    STEPS,
    make,
    adam(1e-4),
    adams(STEPS, 3e-4, 1e-3, 3e-3),
    "squared error of unseen pixels",
    recipe={"total_steps": STEPS},
)
