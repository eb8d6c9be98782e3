"""What the optimizers are compared on: a model, its samples, its loss and its batch size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, scaled_dot_product_attention

from relfisher.studies import mlp
from relfisher.studies.bench import text
from relfisher.studies.data import load
from relfisher.studies.mlp import Normalization

__all__ = ["WORKLOADS", "Samples", "Workload", "batches", "growing", "samples"]

AUTOENCODER_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
CONTEXT = 128
TRANSFORMER_WIDTH = 256
TRANSFORMER_LAYERS = 4
HEADS = 4
HELD_OUT_WINDOWS = 64

Kind = Literal["classes", "images", "text"]


@dataclass(frozen=True)
class Samples:
    """What is trained on and what is held out; the first axis of each tensor counts the samples."""

    name: str
    fingerprint: str
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor


@dataclass(frozen=True)
class Workload:
    """A model and what it learns.

    `kind` says what of: the classes of images, the images themselves, or text. `make` builds the model with torch's
    global generator; where it has no place for batch norm it takes none but "none".
    """

    title: str
    kind: Kind
    batch_size: int
    make: Callable[[Normalization], nn.Module]

    def build(self, seed: int, normalization: Normalization = "none") -> nn.Module:
        """Returns the model with the initial weights of a seed; torch's global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(normalization)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross entropy: a mean over samples and positions, of images a sum over their pixels."""
        outputs = model(inputs)
        if self.kind == "images":
            return binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(inputs)
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def validate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        """Returns the accuracy of a classifier, and the loss of anything else."""
        if self.kind == "classes":
            return float((model(inputs).argmax(-1) == targets).double().mean())
        return float(self.loss(model, inputs, targets))

    @property
    def higher_is_better(self) -> bool:
        """Whether what `validate` returns is an accuracy."""
        return self.kind == "classes"


def batches(data: Samples, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws mini-batches without end; what does not fill an epoch's last one is left out of that epoch.

    Args:
        data: The samples.
        batch_size: How many make a mini-batch.
        generator: Shuffles each epoch.

    Yields:
        Inputs and targets.
    """
    while True:
        order = torch.randperm(len(data.inputs), generator=generator)
        for rows in torch.split(order[: len(order) - len(order) % batch_size], batch_size):
            yield data.inputs[rows], data.targets[rows]


@lru_cache(maxsize=2)
def samples(kind: Kind, source: str) -> Samples:
    """Loads what a kind of workload learns.

    Args:
        kind: See `Workload`.
        source: The images' data set, as `load` takes it; text is always the standard library's.

    Returns:
        The samples.
    """
    if kind == "text":
        return _windows()
    data = load(source)
    targets = (data.train_labels, data.validation_labels)
    if kind == "images":
        targets = (data.train_images, data.validation_images)
    return Samples(data.name, data.fingerprint(), data.train_images, targets[0], data.validation_images, targets[1])


def growing(width: int, batch_size: int = 256) -> Workload:
    """Returns a plain network with two hidden layers of a width, whose cost is followed as it or its batch grows."""
    return Workload(
        f"784-{width}-{width}-10 ReLU, batch {batch_size}",
        "classes",
        batch_size,
        partial(_stack, (784, width, width, 10), nn.ReLU),
    )


def _windows() -> Samples:
    """The text in windows of the context's length, each with the characters that follow; the last ones are held out."""
    characters = text.characters()
    count = (len(characters) - 1) // CONTEXT
    inputs = characters[: count * CONTEXT].view(count, CONTEXT)
    targets = characters[1 : count * CONTEXT + 1].view(count, CONTEXT)
    end = count - HELD_OUT_WINDOWS
    return Samples("stdlib", text.fingerprint(), inputs[:end], targets[:end], inputs[end:], targets[end:])


def _paper(activation: Callable[[], nn.Module], normalization: Normalization) -> nn.Module:
    return mlp.network(normalization, torch.default_generator, activation)


def _stack(widths: tuple[int, ...], activation: Callable[[], nn.Module], _: Normalization) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def _convolutions(_: Normalization) -> nn.Module:
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


class _Block(nn.Module):
    """Attention to what came before, then a network for each position; both see normalised inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.network_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the block finds to the stream `[n, positions, width]`."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.movedim(-2, 1).unbind(-2)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mixed(seen.movedim(1, -2).flatten(-2))
        change: Tensor = self.network(self.network_norm(x))
        return x + change


class _Transformer(nn.Module):
    """A character model: of each position it says which character comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.character = nn.Embedding(text.ALPHABET, TRANSFORMER_WIDTH)
        self.position = nn.Embedding(CONTEXT, TRANSFORMER_WIDTH)
        self.blocks = nn.Sequential(*(_Block(TRANSFORMER_WIDTH) for _ in range(TRANSFORMER_LAYERS)))
        self.norm = nn.LayerNorm(TRANSFORMER_WIDTH)
        self.head = nn.Linear(TRANSFORMER_WIDTH, text.ALPHABET)

    def forward(self, characters: Tensor) -> Tensor:
        """Returns the logits `[n, positions, characters]` of characters `[n, positions]`."""
        position = torch.arange(characters.shape[1], device=characters.device)
        stream = self.blocks(self.character(characters) + self.position(position))
        logits: Tensor = self.head(self.norm(stream))
        return logits


WORKLOADS = {
    "mlp": Workload("784-64-64-64-10 ReLU, batch 50", "classes", 50, partial(_paper, nn.ReLU)),
    "mlp-500": Workload("784-64-64-64-10 ReLU, batch 500", "classes", 500, partial(_paper, nn.ReLU)),
    "mlp-tanh": Workload("784-64-64-64-10 tanh, batch 50", "classes", 50, partial(_paper, nn.Tanh)),
    "mlp-sigmoid": Workload("784-64-64-64-10 sigmoid, batch 50", "classes", 50, partial(_paper, nn.Sigmoid)),
    "autoencoder": Workload(
        f"{'-'.join(map(str, AUTOENCODER_WIDTHS))} tanh, batch 1000",
        "images",
        1000,
        partial(_stack, AUTOENCODER_WIDTHS, nn.Tanh),
    ),
    "cnn": Workload("two convolutions and two linear layers, ReLU, batch 128", "classes", 128, _convolutions),
    "transformer": Workload(
        f"{TRANSFORMER_LAYERS} layers, width {TRANSFORMER_WIDTH}, {CONTEXT} characters, batch 16",
        "text",
        16,
        lambda _: _Transformer(),
    ),
}
