"""The graph of nearest neighbors of scikit-learn's digits, with 20 labels a class."""

import torch
from program import Task
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch.nn.functional import cross_entropy


def nodes():
    """Return the digits [n, 64] in [0, 1], their classes [n], and which are neighbors, themselves among them [n, n]."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    neighbors = torch.tensor(kneighbors_graph(data.data, 8).toarray(), dtype=torch.float32)
    return x, y, ((neighbors + neighbors.t()) > 0).float() + torch.eye(len(x))


def classifying(model, x, y, seed):
    """Return a run of a model that tells the classes of the nodes of a graph, 20 of each class labeled."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    labeled = torch.cat([order[y[order] == label][:20] for label in range(10)])
    held_out = order[~torch.isin(order, labeled)][:1000]

    def error():
        return 1 - float((model(x)[held_out].argmax(1) == y[held_out]).float().mean())

    return Task(model, lambda _: cross_entropy(model(x)[labeled], y[labeled]), error)
