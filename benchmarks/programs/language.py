"""Language models: a run that predicts each token of a text from those before it."""

import torch
from program import Task
from torch.nn.functional import cross_entropy


def predicting(model, text, held, length, batch, seed, clip):
    """Return a run of a model of tokens [n, length], on places of a text that are drawn, judged by held windows."""
    generator = torch.Generator().manual_seed(seed)

    def nats(rows):
        return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def loss(_):
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        return nats(text[starts + torch.arange(length + 1)])

    return Task(model, loss, lambda: float(nats(held)), clip)
