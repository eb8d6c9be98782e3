"""A masked autoencoder that estimates the density of digits of 8 x 8 black or white pixels."""

import torch
from program import Program, Task, adam, adams, batch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

STEPS, BATCH, WIDTH, PIXELS = 600, 100, 200, 64


class Masked(nn.Linear):
    def __init__(self, before, after, *, strict):
        super().__init__(len(before), len(after))
        order = after[:, None] > before if strict else after[:, None] >= before
        self.register_buffer("mask", order.float())

    def forward(self, x):
        return linear(x, self.mask * self.weight, self.bias)


def make(seed):
    pixels = torch.tensor(load_digits().data > 8, dtype=torch.float32)
    x, held = pixels[:1300], pixels[1300:]
    order = torch.arange(PIXELS)
    hidden = [torch.randint(0, PIXELS - 1, (WIDTH,)) for _ in range(2)]
    model = nn.Sequential(
        *(Masked(order, hidden[0], strict=False), nn.ReLU(), Masked(hidden[0], hidden[1], strict=False), nn.ReLU()),
        Masked(hidden[1], order, strict=True),
    )

    def nats(images):
        return binary_cross_entropy_with_logits(model(images), images, reduction="sum") / len(images)

    return Task(model, lambda step: nats(x[batch(step, len(x), BATCH, seed)]), lambda: float(nats(held)))


PROGRAM = Program(
    "a masked autoencoder for the density of digits (MADE)",
    "Karpathy's pytorch-made: Adam, lr 1e-3, weight decay 1e-4",
    STEPS,
    make,
    adam(1e-3, weight_decay=1e-4),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.05),
    "nats of unseen digits",
)
