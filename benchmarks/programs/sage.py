"""GraphSAGE with batch norm on the graph of nearest neighbors of scikit-learn's digits, 20 labels a class."""

import torch
from graph import classifying, nodes
from program import Program, adam, adams
from torch import nn
from torch.nn.functional import dropout

STEPS, WIDTH = 200, 64


class Convolution(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.node, self.neighbors = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x, mean):
        return self.node(x) + self.neighbors(torch.sparse.mm(mean, x))


class Network(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.mean = mean
        self.layers = nn.ModuleList([Convolution(64, WIDTH), Convolution(WIDTH, WIDTH), Convolution(WIDTH, 10)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)])

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = dropout(norm(layer(x, self.mean)).relu(), 0.5, self.training)
        return self.layers[-1](x, self.mean)


def make(seed):
    x, y, graph = nodes()
    others = graph - torch.eye(len(x))
    return classifying(Network((others / others.sum(1, keepdim=True)).to_sparse()), x, y, seed)


PROGRAM = Program(
    "GraphSAGE on digits",
    "Hu et al. 2020 (Open Graph Benchmark, arxiv): Adam, lr 0.01, dropout 0.5",
    STEPS,
    make,
    adam(0.01),
    adams(STEPS, 3e-3, 1e-2, 3e-2, weight_decay=0.05),
    "share of wrong classes",
)
