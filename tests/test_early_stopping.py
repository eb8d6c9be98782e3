"""The recipe for early stopping leaves the best weights in the model."""

import early_stopping
import torch
from synthetic import gratings
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 4))


def test_training_stops_and_the_best_weights_stay():
    model = network()
    accuracies = early_stopping.train(model, epochs=30, patience=3)
    best = max(accuracies)
    assert len(accuracies) == min(30, accuracies.index(best) + 1 + 3)
    x, y = gratings(256, size=16, seed=1)
    with torch.no_grad():
        assert (model(x).argmax(1) == y).double().mean().item() == best > 0.5
