"""A gated recurrent network, its cell of linear layers, that writes names."""

import torch
from names import SIGNS, STEPS, writing
from program import Program, adam, adams
from torch import nn

WIDTH = 64


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.update, self.reset, self.new = (nn.Linear(2 * WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, before):
        both = torch.cat([x, before], 1)
        share = self.update(both).sigmoid()
        new = self.new(torch.cat([x, self.reset(both).sigmoid() * before], 1)).tanh()
        return (1 - share) * before + share * new


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.embed = nn.Parameter(torch.zeros(1, WIDTH)), nn.Embedding(SIGNS, WIDTH)
        self.cell, self.head = Cell(), nn.Linear(WIDTH, SIGNS)

    def forward(self, names):
        state, states = self.start.expand(len(names), -1), []
        for x in self.embed(names).unbind(1):
            state = self.cell(x, state)
            states.append(state)
        return self.head(torch.stack(states, 1))


PROGRAM = Program(
    "a gated recurrent network that writes names",
    "Karpathy's makemore: AdamW, lr 5e-4, betas 0.9 and 0.99, weight decay 0.01",
    STEPS,
    lambda seed: writing(Network(), seed),
    adam(5e-4, betas=(0.9, 0.99), weight_decay=0.01),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.01),
    "nats a character",
)
