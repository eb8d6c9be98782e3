"""Small models of many kinds of layers, and data for them: what several processes train together."""

import torch
from torch import nn

from relfisher import MetricOptions

METRIC = MetricOptions(stats_samples=None, stats_interval=3, refresh_interval=5)


class Language(nn.Module):
    """An LSTM with a head that is tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.lstm = nn.LSTM(5, 5, batch_first=True)
        self.head = nn.Linear(5, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0]).flatten(0, 1)


class Experts(nn.Module):
    """Two experts, of which the sign of the first input of a batch chooses one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.experts[int(x[0, 0] > 0)](self.first(x).relu()))


class Matrix(nn.Module):
    """A product with a bare matrix, whose form is not known before it runs."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 5) / 2)

    def forward(self, x):
        return x @ self.matrix


class Bare(nn.Module):
    """Experts that are bare matrices, and a response with a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.slopes = nn.Linear(4, 5), nn.PReLU()
        self.experts = nn.ModuleList(Matrix() for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.experts[int(x[0, 0] > 0)](self.slopes(self.first(x))).tanh())


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3))


def sloped():
    return nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3))


def images(generator, count):
    return torch.randn(count, 1, 4, 4, generator=generator).double(), torch.randint(4, (count,), generator=generator)


def vectors(generator, count):
    return torch.randn(count, 4, generator=generator).double(), torch.randint(3, (count,), generator=generator)


def sentences(generator, count):
    words = torch.randint(6, (count, 4), generator=generator)
    return words[:, :-1], words[:, 1:].flatten()


def distance(one, other):
    """Return the largest difference between two states of one model."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)
