"""Two networks against each other, on points of eight normal distributions in a ring."""

import torch
from program import Program, Task, adam, adams
from torch import nn
from torch.nn.functional import softplus

STEPS, BATCH, NOISE, WIDTH = 1500, 128, 8, 64


def perceptron(inputs, outputs, activation):
    return nn.Sequential(
        *(nn.Linear(inputs, WIDTH), activation, nn.Linear(WIDTH, WIDTH), activation, nn.Linear(WIDTH, outputs)),
    )


def ring(count, generator):
    angle = torch.randint(8, (count,), generator=generator) * torch.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=generator)


def distance(a, b):
    """Return the mean Wasserstein distance of the shadows of two sets of points on lines in 50 directions."""
    angles = torch.arange(50) * torch.pi / 50
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ directions).sort(0)[0] - (b @ directions).sort(0)[0]).abs().mean())


def make(seed):
    maker, judge = perceptron(NOISE, 2, nn.ReLU()), perceptron(2, 1, nn.LeakyReLU(0.2))
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000)
    points, noise = ring(4000, fixed), torch.randn(4000, NOISE, generator=fixed)

    def made():
        return maker(torch.randn(BATCH, NOISE, generator=generator))

    def judged(_):
        return (softplus(-judge(ring(BATCH, generator))) + softplus(judge(made().detach()))).mean()

    def deceived(_):
        return softplus(-judge(made())).mean()

    return Task(maker, deceived, lambda: distance(maker(noise), points), rival=(judge, judged))


PROGRAM = Program(
    "two networks against each other (GAN), points of a ring",
    "pytorch/examples, dcgan: Adam, lr 2e-4, betas 0.5 and 0.999, for each network",
    STEPS,
    make,
    adam(2e-4, betas=(0.5, 0.999)),
    adams(STEPS, 2e-4, 1e-3, 3e-3, betas=(0.5, 0.999)),
    "Wasserstein distance of shadows",
)
