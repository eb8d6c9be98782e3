"""A variational autoencoder of digits."""

import torch
from digits import TRAINING, split
from program import Program, Task, adam, adams, batch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS, BATCH = 600, 128


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.mean, self.log_variance = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.decoded, self.pixels = nn.Linear(20, 400), nn.Linear(400, 784)

    def forward(self, x):
        h = torch.relu(self.hidden(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        code = mean + torch.exp(0.5 * log_variance) * noise
        return self.pixels(torch.relu(self.decoded(code))), mean, log_variance


def make(seed):
    (x, _), (held, _) = split()
    model = Network()

    def bound(images):
        pixels, mean, log_variance = model(images)
        fit = binary_cross_entropy_with_logits(pixels, images, reduction="sum")
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return (fit + divergence) / len(images)

    return Task(model, lambda step: bound(x[batch(step, TRAINING, BATCH, seed)]), lambda: float(bound(held)))


PROGRAM = Program(
    "a variational autoencoder of digits",
    "pytorch/examples, vae: Adam, lr 1e-3",
    STEPS,
    make,
    adam(1e-3),
    adams(STEPS, 5e-4, 1e-3, 3e-3),
    "negative evidence bound at the mean code, nats",
)
