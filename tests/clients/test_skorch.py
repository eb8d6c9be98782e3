"""skorch makes the optimizer from parameters, and pickles it with the network."""

import pickle

import pytest

pytest.importorskip("skorch")

import numpy as np
import torch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

from relfisher import RNGD

pytestmark = pytest.mark.filterwarnings("ignore:RNGD observes:UserWarning")


class Network(nn.Module):
    """Two linear layers with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def samples():
    x = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] > 0).astype(np.int64)


def classifier(epochs=3):
    torch.manual_seed(0)
    return NeuralNetClassifier(
        Network, criterion=nn.CrossEntropyLoss, optimizer=RNGD, lr=0.05, max_epochs=epochs, verbose=0, train_split=None
    )


def test_it_learns_and_finds_what_it_trains():
    net = classifier(20).fit(*samples())
    x, y = samples()
    assert (net.predict(x) == y).mean() > 0.9
    head = net.optimizer_.layers[-1]
    assert (head.name, head.role.is_head) == ("head", True)


def test_a_pickled_net_goes_on_as_the_original_does():
    net = classifier().fit(*samples())
    twin = pickle.loads(pickle.dumps(net))
    for each in (net, twin):
        torch.manual_seed(1)
        each.partial_fit(*samples())
    assert net.history[-1, "train_loss"] == twin.history[-1, "train_loss"]


def test_saved_parameters_of_net_and_optimizer_go_on(tmp_path):
    files = {"f_params": tmp_path / "net.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net = classifier().fit(*samples())
    net.save_params(**files)
    twin = classifier().initialize()
    twin.load_params(**files)
    for each in (net, twin):
        torch.manual_seed(1)
        each.partial_fit(*samples())
    assert net.history[-1, "train_loss"] == twin.history[-1, "train_loss"]


def test_a_grid_is_searched():
    search = GridSearchCV(classifier(2), {"lr": [1e-4, 3e-2]}, cv=2).fit(*samples())
    assert search.best_params_ == {"lr": 3e-2}
