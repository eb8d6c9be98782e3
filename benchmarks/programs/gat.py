"""A graph attention network on the graph of nearest neighbors of scikit-learn's digits, 20 labels a class."""

import torch
from graph import classifying, nodes
from program import Program, adams
from torch import nn
from torch.nn.functional import dropout, elu, leaky_relu

STEPS, HEADS = 200, 8


class Attention(nn.Module):
    """Heads that weigh the neighbors of a node by a score of both."""

    def __init__(self, inputs, outputs, heads):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, inputs, outputs)))
        self.sent = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, outputs, 1)))
        self.received = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, outputs, 1)))

    def forward(self, x, senders, receivers):
        h = dropout(x, 0.6, self.training) @ self.weight
        score = leaky_relu((h @ self.sent)[:, senders, 0] + (h @ self.received)[:, receivers, 0], 0.2).exp()
        total = torch.zeros(h.shape[:2]).index_add(1, receivers, score)
        share = dropout(score / total[:, receivers], 0.6, self.training)
        return torch.zeros_like(h).index_add(1, receivers, share[..., None] * h[:, senders])


class Network(nn.Module):
    def __init__(self, graph):
        super().__init__()
        self.senders, self.receivers = graph.nonzero(as_tuple=True)
        self.first, self.second = Attention(64, 8, HEADS), Attention(8 * HEADS, 10, 1)

    def forward(self, x):
        h = elu(self.first(x, self.senders, self.receivers))
        return self.second(h.transpose(0, 1).flatten(1), self.senders, self.receivers)[0]


def make(seed):
    x, y, graph = nodes()
    return classifying(Network(graph), x, y, seed)


PROGRAM = Program(
    "a graph attention network on digits",
    "Velickovic et al. 2018: Adam, lr 0.005, L2 penalty 5e-4, dropout 0.6",
    STEPS,
    make,
    lambda model: torch.optim.Adam(model.parameters(), 0.005, weight_decay=5e-4),
    adams(STEPS, 3e-3, 1e-2, 3e-2, weight_decay=0.05),
    "share of wrong classes",
)
