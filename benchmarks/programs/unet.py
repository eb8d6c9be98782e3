"""A U-Net that finds the pixels of a digit on a piece of a photograph."""

import torch
from digits import split
from program import Program, Task, adams
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d

STEPS, BATCH, SIDE, WIDTH = 300, 12, 32, 8


def scenes(images, name, count, generator):
    """Return pieces of a photograph with a digit [n, 1, SIDE, SIDE], lighter or darker, and the pixels of the digit."""
    photograph = torch.tensor(load_sample_image(name), dtype=torch.float32).mean(-1) / 255
    down = torch.randint(photograph.shape[0] - SIDE, (count, 1, 1), generator=generator) + torch.arange(SIDE)[:, None]
    right = torch.randint(photograph.shape[1] - SIDE, (count, 1, 1), generator=generator) + torch.arange(SIDE)
    which = torch.randint(len(images), (count,), generator=generator)
    digit = nn.functional.pad(images[which].view(-1, 1, 28, 28), (2, 2, 2, 2))
    shade = (torch.rand(count, 1, 1, 1, generator=generator) - 0.5) * 1.2
    return photograph[down, right][:, None] + shade * digit, (digit > 0.5).float()


class Pair(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(
            *(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.LeakyReLU(0.01)),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.LeakyReLU(0.01)),
        )


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([Pair(1, WIDTH), Pair(WIDTH, 2 * WIDTH), Pair(2 * WIDTH, 4 * WIDTH)])
        self.up = nn.ModuleList([
            nn.ConvTranspose2d(4 * WIDTH, 2 * WIDTH, 2, 2),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, 2),
        ])
        self.joined = nn.ModuleList([Pair(4 * WIDTH, 2 * WIDTH), Pair(2 * WIDTH, WIDTH)])
        self.head = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x):
        first = self.down[0](x)
        second = self.down[1](max_pool2d(first, 2))
        x = self.down[2](max_pool2d(second, 2))
        for up, joined, skipped in zip(self.up, self.joined, (second, first), strict=True):
            x = joined(torch.cat([skipped, up(x)], 1))
        return self.head(x)


def make(seed):
    (images, _), (held_images, _) = split()
    held, wanted = scenes(held_images, "flower.jpg", 100, torch.Generator().manual_seed(0))
    model, generator = Network(), torch.Generator().manual_seed(seed)

    def loss(_):
        x, pixels = scenes(images, "china.jpg", BATCH, generator)
        logits = model(x)
        found = logits.sigmoid()
        dice = 2 * (found * pixels).sum() / (found + pixels).sum()
        return binary_cross_entropy_with_logits(logits, pixels) + 1 - dice

    def error():
        said = (model(held) > 0).float()
        return 1 - float(2 * (said * wanted).sum() / (said + wanted).sum())

    return Task(model, loss, error, clip=12.0)


def own(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, STEPS, 0.9)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


PROGRAM = Program(
    "a U-Net that finds the pixels of digits",
    "Isensee et al. 2021 (nnU-Net): SGD, lr 0.01 that falls to 0, momentum 0.99, gradients clipped to 12",
    STEPS,
    make,
    own,
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.01),
    "1 - Dice coefficient on another photograph",
)
