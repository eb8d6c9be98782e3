"""A graph convolutional network on the graph of nearest neighbors of scikit-learn's digits, 20 labels a class."""

import torch
from graph import classifying, nodes
from program import Program, adams
from torch import nn
from torch.nn.functional import dropout, relu

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
    x, y, graph = nodes()
    degree = graph.sum(1).rsqrt()
    return classifying(Network((degree[:, None] * graph * degree).to_sparse()), x, y, seed)


PROGRAM = Program(
    "a graph convolutional network on digits",
    "Kipf & Welling 2017 (pygcn): Adam, lr 0.01, L2 penalty 5e-4, 200 epochs",
    STEPS,
    make,
    lambda model: torch.optim.Adam(model.parameters(), 0.01, weight_decay=5e-4),
    adams(STEPS, 3e-3, 1e-2, 3e-2, weight_decay=0.05),
    "share of wrong classes",
)
