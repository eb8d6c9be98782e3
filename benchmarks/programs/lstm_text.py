"""A language model of two LSTM layers on the characters of Python's standard library."""

import torch
from program import Program, Task, adams
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher.studies.text import characters

STEPS, BATCH, LENGTH, WIDTH = 400, 20, 35, 96


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(128, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, dropout=0.2, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(WIDTH, 128)

    def forward(self, tokens):
        return self.head(self.drop(self.lstm(self.drop(self.embed(tokens)))[0]))


def make(seed):
    text = characters().long()
    held, text = text[:21_000].view(-1, LENGTH), text[21_000:]
    model, generator = Network(), torch.Generator().manual_seed(seed)

    def nats(rows):
        return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def loss(_):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
        return nats(text[starts + torch.arange(LENGTH + 1)])

    return Task(model, loss, lambda: float(nats(held)), clip=0.25)


PROGRAM = Program(
    "an LSTM on characters",
    "pytorch/examples, word_language_model: SGD, lr 20, gradients clipped to 0.25",
    STEPS,
    make,
    lambda model: torch.optim.SGD(model.parameters(), 20.0),
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "nats a character",
)
