"""The convolutional network of PyTorch's first example, on digits."""

import torch
from digits import TRAINING, split
from program import Program, Task, adams, batch
from torch import nn
from torch.nn.functional import cross_entropy

STEPS, BATCH = 310, 64


def make(seed):
    (x, y), (held_x, held_y) = split()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )

    def loss(step):
        rows = batch(step, TRAINING, BATCH, seed)
        return cross_entropy(model(x[rows]), y[rows])

    return Task(model, loss, lambda: 1 - float((model(held_x).argmax(1) == held_y).float().mean()))


def own(model):
    optimizer = torch.optim.Adadelta(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, TRAINING // BATCH, 0.7)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


PROGRAM = Program(
    "the classic CNN on digits",
    "pytorch/examples, mnist: Adadelta, lr 1, times 0.7 each epoch",
    STEPS,
    make,
    own,
    adams(STEPS, 5e-4, 1e-3, 2e-3, weight_decay=0.05),
    "share of wrong classes",
)
