"""Synthetic data for the examples: gratings to classify, and token sequences to continue or to classify."""

import math

import torch
from torch import Tensor


def gratings(samples: int, *, size: int = 32, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return color images [samples, 3, size, size] of gratings at one of four angles, and their labels [samples]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (samples,), generator=generator)
    angle = (labels * math.pi / 4).reshape(-1, 1, 1)
    phase = 2 * math.pi * torch.rand(samples, 1, 1, generator=generator)
    place = torch.arange(size, dtype=torch.float32)
    wave = torch.cos(angle.cos() * place + angle.sin() * place.unsqueeze(1) + phase)
    color = torch.rand(samples, 3, 1, 1, generator=generator)
    return color * wave.unsqueeze(1) + noise * torch.randn(samples, 3, size, size, generator=generator), labels


def progressions(
    samples: int, *, vocabulary: int = 32, length: int = 12, steps: tuple[int, ...] = (1, 2, 3), seed: int = 0
) -> Tensor:
    """Return tokens [samples, length] that count up in steps of a given size, modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(vocabulary, (samples, 1), generator=generator)
    step = torch.tensor(steps)[torch.randint(len(steps), (samples, 1), generator=generator)]
    return (start + step * torch.arange(length)) % vocabulary


def topics(samples: int, *, vocabulary: int = 32, length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens [samples, length], about four fifths of them from one half of the vocabulary, and which half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (samples,), generator=generator)
    astray = torch.rand(samples, length, generator=generator) < 0.2
    half = labels.unsqueeze(1) ^ astray.long()
    return half * (vocabulary // 2) + torch.randint(vocabulary // 2, (samples, length), generator=generator), labels
