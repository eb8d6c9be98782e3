"""A vision transformer on digits, in 16 patches of 7 x 7 pixels."""

import torch
from digits import classifying
from program import Program, adam, adams, with_cosine
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

STEPS, WIDTH, HEADS, DEPTH = 300, 64, 4, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.queries, self.joined = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.layers = nn.Sequential(
            *(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
        )

    def forward(self, x):
        parts = self.queries(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.joined(scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.layers(x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 7, 7)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, WIDTH))
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(DEPTH))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.patches(x.view(-1, 1, 28, 28)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


PROGRAM = Program(
    "a vision transformer on digits",
    "Touvron et al. 2021 (DeiT): AdamW, lr 5e-4, weight decay 0.05, a cosine",
    STEPS,
    lambda seed: classifying(Network(), seed),
    with_cosine(adam(5e-4, weight_decay=0.05), STEPS),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.05),
    "share of wrong classes",
)
