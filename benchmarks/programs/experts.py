"""A mixture of experts, by products of stacked matrices, that classifies digits."""

import torch
from digits import classifying
from program import Program, adam, adams
from torch import nn
from torch.nn.functional import gelu

STEPS, COUNT, WIDTH = 500, 8, 64


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, COUNT)
        self.w1 = nn.Parameter(torch.randn(COUNT, WIDTH, 2 * WIDTH) / WIDTH**0.5)
        self.w2 = nn.Parameter(torch.randn(COUNT, 2 * WIDTH, WIDTH) / (2 * WIDTH) ** 0.5)

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        each = torch.einsum("ned,edh->neh", x[:, None].expand(-1, COUNT, -1), self.w1)
        each = torch.einsum("neh,ehd->ned", gelu(each), self.w2)
        return x + (shares[..., None] * each).sum(1)


def make(seed):
    model = nn.Sequential(nn.Linear(784, WIDTH), nn.LayerNorm(WIDTH), Experts(), Experts(), nn.Linear(WIDTH, 10))
    return classifying(model, seed)


PROGRAM = Program(
    "a mixture of experts on digits",
    "the settings of most mixtures of experts: AdamW, lr 1e-3, weight decay 0.01",
    STEPS,
    make,
    adam(1e-3, weight_decay=0.01),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.1),
    "share of wrong classes",
)
