"""ResNet-18: convolutions, batch normalisation and shortcuts beside one linear layer."""

import torch
from resnet18 import ResNet18, train


def test_it_is_the_published_network():
    with torch.device("meta"):
        model = ResNet18(classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962


def test_it_learns():
    losses = train(width=4, samples=128, epochs=5, batch=16)
    assert losses[-1] < losses[0] / 2
