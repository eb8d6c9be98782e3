"""A diffusion model of points on two spirals."""

from itertools import pairwise

import torch
from program import Program, Task, adam, adams
from torch import nn
from torch.nn.functional import mse_loss

STEPS, BATCH, TIMES = 1000, 128, 50


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -6, 16)))
        sizes = (2 + 32, 128, 128, 128)
        layers = [each for a, b in pairwise(sizes) for each in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*layers, nn.Linear(128, 2))

    def forward(self, x, time):
        angles = time[:, None] * self.frequencies
        return self.layers(torch.cat([4 * x, angles.sin(), angles.cos()], 1))


def spirals(count, generator):
    angle = 3 * torch.pi * torch.rand(count, generator=generator).sqrt()
    sign = torch.randint(2, (count,), generator=generator) * 2 - 1
    points = torch.stack([angle.cos(), angle.sin()], 1) * (sign * angle / 10)[:, None]
    return points + 0.02 * torch.randn(count, 2, generator=generator)


def make(seed):
    model, generator = Network(), torch.Generator().manual_seed(seed)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.1, TIMES), 0)

    def noisy(count, generator):
        points, time = spirals(count, generator), torch.randint(TIMES, (count,), generator=generator)
        noise, share = torch.randn(count, 2, generator=generator), kept[time, None]
        return share.sqrt() * points + (1 - share).sqrt() * noise, time.float(), noise

    x, time, noise = noisy(4000, torch.Generator().manual_seed(10_000))

    def loss(_):
        points, at, added = noisy(BATCH, generator)
        return mse_loss(model(points, at), added)

    return Task(model, loss, lambda: float(mse_loss(model(x, time), noise)), clip=1.0)


PROGRAM = Program(
    "a diffusion model of points",
    "tiny-diffusion: AdamW, lr 1e-3, gradients clipped to 1",
    STEPS,
    make,
    adam(1e-3, weight_decay=0.01),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.01),
    "squared error of the noise",
)
