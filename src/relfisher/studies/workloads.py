"""The workloads for comparing optimizers: a model, its samples, its loss and its batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from relfisher.studies import text
from relfisher.studies.data import Dataset, load
from relfisher.studies.networks import (
    Normalization,
    PatchTransformer,
    Transformer,
    convolutions,
    paper_network,
    residual,
    stack,
)

__all__ = ["WORKLOADS", "Samples", "Workload", "batches", "growing", "of_images", "samples"]

AUTOENCODER_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
CONTEXT = 128
TRANSFORMER_WIDTH = 256
TRANSFORMER_LAYERS = 4
HELD_OUT_WINDOWS = 64

Kind = Literal["classes", "images", "text"]


@dataclass(frozen=True)
class Samples:
    """Training and validation samples; the first axis of each tensor counts the samples."""

    name: str
    fingerprint: str
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor


@dataclass(frozen=True)
class Workload:
    """A model and its task.

    `kind` is the target: the classes of images, the images themselves, or text. `make` builds the model with torch's
    global generator; models without a place for batch norm only accept "none".
    """

    title: str
    kind: Kind
    batch_size: int
    make: Callable[[Normalization], nn.Module]

    def build(self, seed: int, normalization: Normalization = "none") -> nn.Module:
        """Return the model with the initial weights of a seed, without changing torch's global generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(normalization)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy: a mean over samples and positions and, for images, a sum over pixels."""
        outputs = model(inputs)
        if self.kind == "images":
            return binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(inputs)
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def validate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        """Return the accuracy of a classifier, or the loss of any other model."""
        if self.kind == "classes":
            return float((model(inputs).argmax(-1) == targets).double().mean())
        return float(self.loss(model, inputs, targets))

    @property
    def higher_is_better(self) -> bool:
        """Whether `validate` returns an accuracy."""
        return self.kind == "classes"


def batches(data: Samples, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw mini-batches without end; an incomplete last mini-batch of an epoch is dropped.

    Args:
        data: the samples.
        batch_size: the number of samples in a mini-batch.
        generator: shuffles each epoch.

    Yields:
        Inputs and targets.
    """
    while True:
        order = torch.randperm(len(data.inputs), generator=generator)
        for rows in torch.split(order[: len(order) - len(order) % batch_size], batch_size):
            yield data.inputs[rows], data.targets[rows]


@lru_cache(maxsize=2)
def samples(kind: Kind, source: str) -> Samples:
    """Load the samples of a kind of workload.

    Args:
        kind: see `Workload`.
        source: the data set of images, as for `load`; text is always the standard library's.

    Returns:
        The samples.
    """
    if kind == "text":
        return _windows()
    return of_images(load(source), kind)


def of_images(data: Dataset, kind: Kind = "classes") -> Samples:
    """Return images with their targets: the classes, or the images themselves."""
    targets = (data.train_labels, data.validation_labels)
    if kind == "images":
        targets = (data.train_images, data.validation_images)
    return Samples(data.name, data.fingerprint(), data.train_images, targets[0], data.validation_images, targets[1])


def growing(width: int, batch_size: int = 256) -> Workload:
    """Return a plain network with two hidden layers of a width, to measure how cost grows with width or batch size."""
    return Workload(
        f"784-{width}-{width}-10 ReLU, batch {batch_size}",
        "classes",
        batch_size,
        lambda _: stack((784, width, width, 10), nn.ReLU),
    )


def _windows() -> Samples:
    """Return the text in windows of the context's length, with the following characters; the last ones are held out."""
    characters = text.characters()
    count = (len(characters) - 1) // CONTEXT
    inputs = characters[: count * CONTEXT].view(count, CONTEXT)
    targets = characters[1 : count * CONTEXT + 1].view(count, CONTEXT)
    end = count - HELD_OUT_WINDOWS
    return Samples("stdlib", text.fingerprint(), inputs[:end], targets[:end], inputs[end:], targets[end:])


def _paper(activation: Callable[[], nn.Module]) -> Callable[[Normalization], nn.Module]:
    return lambda normalization: paper_network(normalization, torch.default_generator, activation)


WORKLOADS = {
    "mlp": Workload("784-64-64-64-10 ReLU, batch 50", "classes", 50, _paper(nn.ReLU)),
    "mlp-500": Workload("784-64-64-64-10 ReLU, batch 500", "classes", 500, _paper(nn.ReLU)),
    "mlp-tanh": Workload("784-64-64-64-10 tanh, batch 50", "classes", 50, _paper(nn.Tanh)),
    "mlp-sigmoid": Workload("784-64-64-64-10 sigmoid, batch 50", "classes", 50, _paper(nn.Sigmoid)),
    "autoencoder": Workload(
        f"{'-'.join(map(str, AUTOENCODER_WIDTHS))} tanh, batch 1000",
        "images",
        1000,
        lambda _: stack(AUTOENCODER_WIDTHS, nn.Tanh),
    ),
    "cnn": Workload(
        "two convolutions and two linear layers, ReLU, batch 128", "classes", 128, lambda _: convolutions()
    ),
    "resnet": Workload("a ResNet of three blocks with batch norm, batch 100", "classes", 100, lambda _: residual()),
    "vit": Workload("a vision transformer of two layers, batch 100", "classes", 100, lambda _: PatchTransformer()),
    "transformer": Workload(
        f"{TRANSFORMER_LAYERS} layers, width {TRANSFORMER_WIDTH}, {CONTEXT} characters, batch 16",
        "text",
        16,
        lambda _: Transformer(text.ALPHABET, CONTEXT, TRANSFORMER_WIDTH, TRANSFORMER_LAYERS),
    ),
}
