"""ResNet-18 (He et al. 2015) in plain PyTorch, on noisy gratings of 3x32x32 pixels: `python examples/resnet18.py`."""

import torch
from synthetic import gratings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        narrowed = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if inputs == out and stride == 1 else narrowed

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [n, out, h / stride, w / stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """A stem for small images and eight blocks; the published network has width 64."""

    def __init__(self, classes: int, width: int = 64) -> None:
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = []
        for stage in range(4):
            inputs, out = widths[stage], widths[stage + 1]
            blocks += [Block(inputs, out, stride=1 if stage == 0 else 2), Block(out, out, stride=1)]
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )


def train(width: int = 8, samples: int = 512, epochs: int = 4, batch: int = 32) -> list[float]:
    """Train on noisy gratings and return the mean loss of each epoch."""
    torch.manual_seed(0)
    model = ResNet18(classes=4, width=width)
    optimizer = RNGD(model)
    images, labels = gratings(samples)
    means = []
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(samples).split(batch):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        print(f"epoch {len(means)}: loss {means[-1]:.4f}")
    return means


if __name__ == "__main__":
    train()
