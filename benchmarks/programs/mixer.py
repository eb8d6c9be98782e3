"""An MLP-Mixer on digits, in 16 patches of 7 x 7 pixels."""

from digits import classifying
from program import Program, adam, adams, with_cosine
from torch import nn

STEPS, WIDTH, PATCHES, DEPTH = 300, 64, 16, 3


def perceptron(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.patches, self.channels = perceptron(PATCHES, 2 * PATCHES), perceptron(WIDTH, 2 * WIDTH)

    def forward(self, x):
        x = x + self.patches(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.second(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(1, WIDTH, 7, 7), nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.embed(x.view(-1, 1, 28, 28)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def make(seed):
    task = classifying(Network(), seed)
    task.clip = 1.0
    return task


PROGRAM = Program(
    "an MLP-Mixer on digits",
    "Tolstikhin et al. 2021: Adam, lr 1e-3, weight decay 0.1, a decay to 0, gradients clipped to 1",
    STEPS,
    make,
    with_cosine(adam(1e-3, weight_decay=0.1), STEPS),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.1),
    "share of wrong classes",
)
