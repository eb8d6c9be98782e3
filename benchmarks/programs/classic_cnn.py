"""The convolutional network of PyTorch's first example, on digits."""

import torch
from digits import BATCH, TRAINING, classifying
from program import Program, adams
from torch import nn

STEPS = 310


def make(seed):
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )
    return classifying(model, seed)


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
