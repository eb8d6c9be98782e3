"""Two digits through one network: are they of the same class?"""

import torch
from digits import TRAINING, split
from program import Program, Task, adams, batch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS, BATCH = 310, 64


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Unflatten(1, (1, 28, 28)),
                nn.Conv2d(1, 16, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, 2, 1),
                nn.ReLU(),
            ),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64)),
        )
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, first, second):
        return self.head(torch.cat([self.body(first), self.body(second)], 1)).squeeze(1)


def partners(y, generator):
    """Return for each image another one, half of them of the same class."""
    other = torch.randint(len(y), (len(y),), generator=generator)
    order = torch.argsort(y, stable=True)
    starts, counts = torch.searchsorted(y[order], torch.arange(10)), torch.bincount(y, minlength=10)
    alike = order[starts[y] + (torch.rand(len(y), generator=generator) * counts[y]).long()]
    return torch.where(torch.rand(len(y), generator=generator) < 0.5, alike, other)


def make(seed):
    (x, y), (held_x, held_y) = split()
    model, generator = Network(), torch.Generator().manual_seed(seed)
    fixed = partners(held_y, torch.Generator().manual_seed(0))

    def loss(step):
        rows = batch(step, TRAINING, BATCH, seed)
        others = partners(y, generator)[rows]
        return binary_cross_entropy_with_logits(model(x[rows], x[others]), (y[rows] == y[others]).float())

    def error():
        said = model(held_x, held_x[fixed]) > 0
        return 1 - float((said == (held_y == held_y[fixed])).float().mean())

    return Task(model, loss, error)


def own(model):
    return torch.optim.Adadelta(model.parameters(), 1.0)


PROGRAM = Program(
    "a siamese network on digits",
    "pytorch/examples, siamese_network: Adadelta, lr 1",
    STEPS,
    make,
    own,
    adams(STEPS, 5e-4, 1e-3, 3e-3, weight_decay=0.05),
    "share of wrong answers",
)
