"""A language model of two LSTM layers on the characters of Python's standard library."""

import torch
from language import predicting
from program import Program, adams
from torch import nn

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
    return predicting(Network(), text, held, LENGTH, BATCH, seed, clip=0.25)


PROGRAM = Program(
    "an LSTM on characters",
    "pytorch/examples, word_language_model: SGD, lr 20, gradients clipped to 0.25",
    STEPS,
    make,
    lambda model: torch.optim.SGD(model.parameters(), 20.0),
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "nats a character",
)
