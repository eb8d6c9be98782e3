"""Keep the weights that validate best, and stop when they no longer improve: `python examples/early_stopping.py`.

Between steps the model holds the average of its iterates. What is validated and saved is therefore the model as it is,
with no learning-rate schedule and without knowing the length of the run.
"""

import copy

import torch
from synthetic import gratings
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD


def train(model: nn.Module, epochs: int = 40, patience: int = 5) -> list[float]:
    """Train until validation has not improved for some epochs, and leave the best weights in the model.

    Args:
        model: the model.
        epochs: the largest number of epochs.
        patience: the number of epochs without an improvement after which training stops.

    Returns:
        The validation accuracy after each epoch.
    """
    (x, y), (held_x, held_y) = gratings(512, size=16), gratings(256, size=16, seed=1)
    optimizer = RNGD(model)
    accuracies: list[float] = []
    best = copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracies.append((model(held_x).argmax(1) == held_y).double().mean().item())
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            best = copy.deepcopy(model.state_dict())
        elif len(accuracies) - accuracies.index(max(accuracies)) > patience:
            break
    model.load_state_dict(best)
    return accuracies


if __name__ == "__main__":
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 4))
    found = train(network)
    print(f"{max(found):.1%} after epoch {1 + found.index(max(found))}, stopped after epoch {len(found)}")
