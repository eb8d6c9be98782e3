"""A sub-pixel convolutional network that doubles the resolution of pieces of a photograph."""

import torch
from program import Program, Task, adam, adams
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.functional import avg_pool2d, mse_loss

STEPS, BATCH, SIDE = 400, 8, 32


def brightness(name):
    return torch.tensor(load_sample_image(name), dtype=torch.float32).mean(-1) / 255


def pieces(picture, count, generator):
    """Return pieces [count, 1, SIDE, SIDE] of a picture at places drawn at random."""
    down = torch.randint(picture.shape[0] - SIDE, (count, 1, 1), generator=generator) + torch.arange(SIDE)[:, None]
    right = torch.randint(picture.shape[1] - SIDE, (count, 1, 1), generator=generator) + torch.arange(SIDE)
    return picture[down, right][:, None]


def make(seed):
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 5, 1, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(32, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 4, 3, 1, 1), nn.PixelShuffle(2)),
    )
    for layer in (model[0], model[2], model[4]):
        nn.init.orthogonal_(layer.weight, 2**0.5)
    nn.init.orthogonal_(model[6].weight)
    picture, generator = brightness("china.jpg"), torch.Generator().manual_seed(seed)
    held = pieces(brightness("flower.jpg"), 200, torch.Generator().manual_seed(0))

    def error(images):
        return mse_loss(model(avg_pool2d(images, 2)), images)

    return Task(model, lambda _: error(pieces(picture, BATCH, generator)), lambda: float(error(held)))


PROGRAM = Program(
    "a sub-pixel network that doubles the resolution of a photograph",
    "pytorch/examples, super_resolution: Adam, lr 1e-3",
    STEPS,
    make,
    adam(1e-3),
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "squared error of another photograph",
)
