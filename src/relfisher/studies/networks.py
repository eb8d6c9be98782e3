"""The trained models: the paper's network, plain stacks, convolutions and a small transformer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

__all__ = [
    "WIDTHS",
    "Normalization",
    "PatchTransformer",
    "Recurrent",
    "Transformer",
    "adapt",
    "convolutions",
    "paper_network",
    "residual",
    "stack",
]

WIDTHS = (784, 64, 64, 64, 10)
INITIAL_STD = 0.1
BATCH_NORM_EPSILON = 1e-3
HEADS = 4
TIED_STD = 0.02

Normalization = Literal["none", "after", "before"]


def paper_network(
    normalization: Normalization, generator: torch.Generator, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Return the paper's network, with optional batch norm before or after each hidden activation.

    Args:
        normalization: the position of batch norm.
        generator: draws the weights and biases; batch norm draws nothing, so that all variants start alike.
        activation: creates the activation of a hidden layer.

    Returns:
        The network, from images `[n, 784]` to logits `[n, 10]`.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        linear = nn.Linear(inputs, outputs)
        for parameter in linear.parameters():
            nn.init.trunc_normal_(
                parameter, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD, generator=generator
            )
        layers.append(linear)
        if outputs == WIDTHS[-1]:
            break
        if normalization == "before":
            layers.append(nn.BatchNorm1d(outputs, eps=BATCH_NORM_EPSILON))
        layers.append(activation())
        if normalization == "after":
            layers.append(nn.BatchNorm1d(outputs, eps=BATCH_NORM_EPSILON))
    return nn.Sequential(*layers)


def stack(widths: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    """Return linear layers of the given widths with activations in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    """Return two convolutions and two linear layers, from images `[n, 784]` to logits `[n, 10]`."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class _Residual(nn.Module):
    """Two convolutions with batch norm, added to their input, which is projected if its shape differs."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = relu(self.norms[0](self.first(x)))
        result: Tensor = relu(self.norms[1](self.second(hidden)) + self.shortcut(x))
        return result


def residual(width: int = 12) -> nn.Module:
    """Return a ResNet with three blocks of 1, 2 and 4 times a width, from images `[n, 784]` to logits `[n, 10]`."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Residual(width, width, 1),
        _Residual(width, 2 * width, 2),
        _Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class _Block(nn.Module):
    """Attention, causal or not, then a network for each position, both with normalized inputs."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.network_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's output to the stream `[n, positions, width]`."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.movedim(-2, 1).unbind(-2)
        seen = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.mixed(seen.movedim(1, -2).flatten(-2))
        change: Tensor = self.network(self.network_norm(x))
        return x + change


class Transformer(nn.Module):
    """A language model: at each position it predicts the next character or subword, as GPT-2 with a tied head."""

    def __init__(self, alphabet: int, context: int, width: int, layers: int, *, tied: bool = False) -> None:
        super().__init__()
        self.character = nn.Embedding(alphabet, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=not tied)
        if tied:
            nn.init.normal_(self.character.weight, std=TIED_STD)
            self.head.weight = self.character.weight

    def forward(self, characters: Tensor) -> Tensor:
        """Return the logits `[n, positions, characters]` of characters `[n, positions]`."""
        position = torch.arange(characters.shape[1], device=characters.device)
        stream = self.blocks(self.character(characters) + self.position(position))
        logits: Tensor = self.head(self.norm(stream))
        return logits


class Recurrent(nn.Module):
    """A character model with an LSTM."""

    def __init__(self, alphabet: int, width: int) -> None:
        super().__init__()
        self.character = nn.Embedding(alphabet, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the logits `[n, positions, characters]` of characters `[n, positions]`."""
        hidden, _ = self.lstm(self.character(characters))
        logits: Tensor = self.head(hidden)
        return logits


class _Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank change B A, which starts at zero. Hu et al. 2022 (LoRA)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.frozen(x) + self.up(self.down(x))
        return result


def adapt(model: nn.Module, rank: int) -> None:
    """Freeze a model, and give each linear layer in its blocks a trained change of a rank; its head is trained, too."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, child.requires_grad_() if name == "head" else _Adapted(child, rank))


class PatchTransformer(nn.Module):
    """A vision transformer: images in 16 patches of 7 x 7 pixels, whose mean it classifies."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(49, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(_Block(width, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, 10]` of images `[n, 784]`."""
        patches = images.view(-1, 4, 7, 4, 7).movedim(2, 3).reshape(-1, 16, 49)
        stream = self.blocks(self.patch(patches) + self.position)
        logits: Tensor = self.head(self.norm(stream).mean(1))
        return logits
