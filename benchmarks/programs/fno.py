"""A Fourier neural operator: from the start of Burgers' equation to its solution at a later time."""

import torch
from program import Program, Task, adams, batch
from torch import nn
from torch.nn.functional import gelu

STEPS, BATCH, POINTS, MODES, WIDTH, TRAINING = 500, 20, 64, 12, 24, 300


def solve(u, time=1.0, parts=500, viscosity=0.02):
    """Return the solution of u' = viscosity u'' - u u', periodic on [0, 1): the linear part exact, the rest by Heun."""
    waves = 2j * torch.pi * torch.arange(POINTS // 2 + 1)
    decay, kept = torch.exp(viscosity * waves**2 * (time / parts)), torch.arange(POINTS // 2 + 1) < POINTS // 3

    def rate(spectrum):
        u = torch.fft.irfft(spectrum, POINTS)
        return -0.5 * waves * kept * torch.fft.rfft(u * u)

    spectrum = torch.fft.rfft(u)
    for _ in range(parts):
        first = time / parts * rate(spectrum)
        spectrum = decay * (spectrum + first / 2) + time / parts / 2 * rate(decay * (spectrum + first))
    return torch.fft.irfft(spectrum, POINTS)


def starts(count):
    """Return smooth functions [count, POINTS] of random waves."""
    generator = torch.Generator().manual_seed(0)
    size = POINTS / (1 + torch.arange(9) ** 2)
    waves = torch.randn(count, 9, 2, generator=generator) * size[:, None] / 2
    return torch.fft.irfft(torch.view_as_complex(waves), POINTS)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, WIDTH, MODES, dtype=torch.cfloat) / WIDTH**2)
        self.point = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        waves = torch.einsum("bik,iok->bok", torch.fft.rfft(x)[..., :MODES], self.weight)
        return torch.fft.irfft(waves, x.shape[-1]) + self.point(x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.layers = nn.Linear(2, WIDTH), nn.ModuleList(Layer() for _ in range(3))
        self.first, self.second = nn.Linear(WIDTH, 64), nn.Linear(64, 1)

    def forward(self, u):
        places = torch.linspace(0, 1, POINTS).expand_as(u)
        x = self.lift(torch.stack([u, places], -1)).transpose(1, 2)
        for layer in self.layers[:-1]:
            x = gelu(layer(x))
        return self.second(gelu(self.first(self.layers[-1](x).transpose(1, 2)))).squeeze(-1)


def make(seed):
    u = starts(TRAINING + 200)
    later, model = solve(u), Network()

    def error(rows):
        return ((model(u[rows]) - later[rows]).norm(dim=1) / later[rows].norm(dim=1)).mean()

    held = torch.arange(TRAINING, len(u))
    return Task(model, lambda step: error(batch(step, TRAINING, BATCH, seed)), lambda: float(error(held)))


def own(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, STEPS // 5, 0.5)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


PROGRAM = Program(
    "a Fourier neural operator of Burgers' equation",
    "Li et al. 2021: Adam, lr 1e-3, L2 penalty 1e-4, halved every fifth of the steps",
    STEPS,
    make,
    own,
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "relative error",
)
