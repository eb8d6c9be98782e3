"""A residual network without normalizations, whose convolutions have standardized weights with gains, on digits."""

import torch
from digits import classifying
from program import Program, adams, with_cosine
from torch import nn
from torch.nn.functional import batch_norm, conv2d, relu

STEPS = 310


class Convolution(nn.Conv2d):
    def __init__(self, inputs, outputs, size, stride=1):
        super().__init__(inputs, outputs, size, stride, size // 2)
        self.gain = nn.Parameter(torch.ones(outputs))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = batch_norm(rows, None, None, weight=self.gain * self.scale, training=True)
        return conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first, self.second = Convolution(inputs, outputs, 3, stride), Convolution(outputs, outputs, 3)
        self.skip = Convolution(inputs, outputs, 1, stride)

    def forward(self, x):
        h = 1.7 * relu(x)
        return self.skip(h) + 0.2 * self.second(1.7 * relu(self.first(h)))


def make(seed):
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), Convolution(1, 16, 3, 2), Block(16, 32, 2), Block(32, 64, 2)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    return classifying(model, seed)


def own(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=2e-5)


PROGRAM = Program(
    "a residual network with standardized weights (NF-ResNet) on digits",
    "Brock et al. 2021: SGD, lr 0.1, momentum 0.9, a cosine",
    STEPS,
    make,
    with_cosine(own, STEPS),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.05),
    "share of wrong classes",
)
