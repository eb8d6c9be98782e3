"""Mixed precision by autocast, with a gradient scaler for float16, on noisy gratings: `python examples/amp.py`."""

import torch
from synthetic import gratings
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD


def network() -> nn.Sequential:
    """Return a small perceptron for images of 3x8x8 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4))


def train(dtype: torch.dtype, *, epochs: int = 10, samples: int = 512, batch: int = 64) -> list[float]:
    """Train in the given precision and return the loss of each step; only float16 needs the gradient scaler."""
    model = network()
    optimizer = RNGD(model)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    images, labels = gratings(samples, size=8)
    losses = []
    for _ in range(epochs):
        for chosen in torch.randperm(samples).split(batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = cross_entropy(model(images[chosen]), labels[chosen])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # only for what looks at gradients, such as clipping
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float16):
        losses = train(dtype)
        print(f"{dtype}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
