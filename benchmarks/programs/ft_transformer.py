"""A transformer on the columns of a table: Friedman's first function, with noise and columns that say nothing."""

import torch
from program import Program, Task, adam, adams, batch
from sklearn.datasets import make_friedman1
from torch import nn
from torch.nn.functional import mse_loss, relu, scaled_dot_product_attention

STEPS, BATCH, ROWS, COLUMNS, WIDTH, HEADS = 500, 64, 1500, 10, 32, 4


class Columns(nn.Module):
    """A vector for each number of a row, and one more for the answer."""

    def __init__(self):
        super().__init__()
        bound = WIDTH**-0.5
        self.weight = nn.Parameter(torch.empty(COLUMNS, WIDTH).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(COLUMNS, WIDTH).uniform_(-bound, bound))
        self.answer = nn.Parameter(torch.empty(1, 1, WIDTH).uniform_(-bound, bound))

    def forward(self, x):
        return torch.cat([self.answer.expand(len(x), -1, -1), x[..., None] * self.weight + self.bias], 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        parts = self.queries(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.joined(scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        value, gate = self.wide(self.second(x)).chunk(2, -1)
        return x + self.narrow(value * relu(gate))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.columns, self.blocks = Columns(), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.head(relu(self.norm(self.blocks(self.columns(x))[:, 0]))).squeeze(1)


def make(seed):
    x, y = (torch.tensor(each, dtype=torch.float32) for each in make_friedman1(ROWS + 1000, noise=1.0, random_state=0))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    model = Network()

    def loss(step):
        rows = batch(step, ROWS, BATCH, seed)
        return mse_loss(model(x[rows]), y[rows])

    return Task(model, loss, lambda: float(mse_loss(model(x[ROWS:]), y[ROWS:])))


PROGRAM = Program(
    "a transformer on a table (FT-Transformer)",
    "Gorishniy et al. 2021 (rtdl): AdamW, lr 1e-4, weight decay 1e-5",
    STEPS,
    make,
    adam(1e-4, weight_decay=1e-5),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.01),
    "squared error, as a share of the variance",
)
