"""A graph convolutional network on the graph of nearest neighbors of scikit-learn's digits, 20 labels a class."""

import torch
from program import Program, Task, adams
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import nn
from torch.nn.functional import cross_entropy, dropout, relu

STEPS = 200


class Convolution(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).uniform_(-1, 1) / outputs**0.5)
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-1, 1) / outputs**0.5)

    def forward(self, x, adjacency):
        return torch.sparse.mm(adjacency, x @ self.weight) + self.bias


class Network(nn.Module):
    def __init__(self, adjacency):
        super().__init__()
        self.adjacency = adjacency
        self.first, self.second = Convolution(64, 16), Convolution(16, 10)

    def forward(self, x):
        x = dropout(relu(self.first(x, self.adjacency)), 0.5, self.training)
        return self.second(x, self.adjacency)


def make(seed):
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    neighbors = torch.tensor(kneighbors_graph(data.data, 8).toarray(), dtype=torch.float32)
    graph = ((neighbors + neighbors.t()) > 0).float() + torch.eye(len(x))
    degree = graph.sum(1).rsqrt()
    model = Network((degree[:, None] * graph * degree).to_sparse())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    labeled = torch.cat([order[y[order] == label][:20] for label in range(10)])
    held_out = order[~torch.isin(order, labeled)][:1000]

    def error():
        return 1 - float((model(x)[held_out].argmax(1) == y[held_out]).float().mean())

    return Task(model, lambda _: cross_entropy(model(x)[labeled], y[labeled]), error)


PROGRAM = Program(
    "a graph convolutional network on digits",
    "Kipf & Welling 2017 (pygcn): Adam, lr 0.01, L2 penalty 5e-4, 200 epochs",
    STEPS,
    make,
    lambda model: torch.optim.Adam(model.parameters(), 0.01, weight_decay=5e-4),
    adams(STEPS, 3e-3, 1e-2, 3e-2, weight_decay=0.05),
    "share of wrong classes",
)
