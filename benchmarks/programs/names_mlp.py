"""A multilayer perceptron that writes names, from the eight signs before."""

from names import SIGNS, STEPS, writing
from program import Program, adam, adams
from torch import nn
from torch.nn.functional import pad

BEFORE, WIDTH = 8, 64


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SIGNS, WIDTH)
        self.layers = nn.Sequential(nn.Linear(BEFORE * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, SIGNS))

    def forward(self, names):
        return self.layers(self.embed(pad(names, (BEFORE - 1, 0)).unfold(1, BEFORE, 1)).flatten(2))


PROGRAM = Program(
    "a perceptron that writes names",
    "Karpathy's makemore: AdamW, lr 5e-4, betas 0.9 and 0.99, weight decay 0.01",
    STEPS,
    lambda seed: writing(Network(), seed),
    adam(5e-4, betas=(0.9, 0.99), weight_decay=0.01),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.01),
    "nats a character",
)
