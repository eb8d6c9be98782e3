"""The workloads for comparing optimizers: a model, its samples, its loss and its batch size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from relfisher.studies import text
from relfisher.studies.data import Dataset, load
from relfisher.studies.networks import (
    Normalization,
    PatchTransformer,
    Recurrent,
    Transformer,
    adapt,
    convolutions,
    paper_network,
    residual,
    stack,
)

__all__ = ["WORKLOADS", "Samples", "Workload", "batches", "growing", "of_images", "samples"]

AUTOENCODER_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
CONTEXT = 128
SUBWORD_CONTEXT = 64
PRETRAINED_EPOCHS = 5
ADAPTED_RANK = 4
TRANSFORMER_WIDTH = 256
TRANSFORMER_LAYERS = 4
HELD_OUT_WINDOWS = 64

Kind = Literal["classes", "images", "text", "subwords", "table", "values"]


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

    `kind` is the target: the classes of images, the images themselves, the next character or subword of a text, the
    classes of a table's rows, or their values. `make` builds the model with torch's global generator; models without a
    place for batch norm only accept "none".
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
        """Return the mean squared error of values, or the cross entropy, which is a sum over the pixels of images."""
        outputs = model(inputs)
        if self.kind == "values":
            return mse_loss(outputs.squeeze(-1), targets)
        if self.kind == "images":
            return binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(inputs)
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def validate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        """Return the accuracy of a classifier, or the loss of any other model."""
        if self.higher_is_better:
            return float((model(inputs).argmax(-1) == targets).double().mean())
        return float(self.loss(model, inputs, targets))

    @property
    def higher_is_better(self) -> bool:
        """Whether `validate` returns an accuracy."""
        return self.kind in {"classes", "table"}


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
        source: the data set of images, as for `load`; texts and tables have their own.

    Returns:
        The samples.
    """
    if kind in OWN:
        return OWN[kind]()
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


def _windows(name: str, text: Tensor, context: int) -> Samples:
    """Return a text in windows, with the characters or subwords that follow each; the last ones are held out."""
    count = (len(text) - 1) // context
    inputs = text[: count * context].view(count, context)
    targets = text[1 : count * context + 1].view(count, context)
    end = count - HELD_OUT_WINDOWS
    parts = (inputs[:end], targets[:end], inputs[end:], targets[end:])
    return Samples(name, hashlib.sha256(text.numpy().tobytes()).hexdigest(), *parts)


def _table(name: str) -> Samples:
    """Return a table of scikit-learn's with standardized columns, its rows in a random order; a quarter is held out."""
    from sklearn import datasets  # which takes seconds

    columns, answers = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(columns))
    columns, answers = columns[order], answers[order]
    end = len(columns) * 3 // 4
    columns = (columns - columns[:end].mean(0)) / np.maximum(columns[:end].std(0), 1e-3)
    if answers.dtype == np.float64:
        answers = (answers - answers[:end].mean()) / answers[:end].std()
    inputs = torch.from_numpy(columns).float()
    targets = torch.from_numpy(answers)
    targets = targets.float() if targets.is_floating_point() else targets.long()
    digest = hashlib.sha256(inputs.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()
    return Samples(f"scikit-learn's {name}", digest, inputs[:end], targets[:end], inputs[end:], targets[end:])


OWN: dict[Kind, Callable[[], Samples]] = {
    "text": lambda: _windows("stdlib", text.characters(), CONTEXT),
    "subwords": lambda: _windows("SciPy's docstrings", text.subwords(), SUBWORD_CONTEXT),
    "table": lambda: _table("digits"),
    "values": lambda: _table("diabetes"),
}


def _fine_tuned() -> nn.Module:
    """Return the vision transformer after five epochs of AdamW on the digits that ship, ready for new classes."""
    digits, workload = samples("classes", "mnist5k"), WORKLOADS["vit"]
    model = PatchTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    drawn = batches(digits, workload.batch_size, torch.default_generator)
    for _ in range(PRETRAINED_EPOCHS * (len(digits.inputs) // workload.batch_size)):
        optimizer.zero_grad()
        workload.loss(model, *next(drawn)).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    adapt(model, ADAPTED_RANK)
    return model


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
    "lora": Workload(
        f"the vision transformer from digits to clothes, by changes of rank {ADAPTED_RANK}, batch 100",
        "classes",
        100,
        lambda _: _fine_tuned(),
    ),
    "table": Workload("64-128-128-10 ReLU, batch 50", "table", 50, lambda _: stack((64, 128, 128, 10), nn.ReLU)),
    "values": Workload("10-64-64-1 ReLU, batch 20", "values", 20, lambda _: stack((10, 64, 64, 1), nn.ReLU)),
    "characters": Workload(
        f"2 layers, width 128, {CONTEXT} characters, batch 16",
        "text",
        16,
        lambda _: Transformer(text.ALPHABET, CONTEXT, 128, 2),
    ),
    "gpt": Workload(
        f"2 layers, width 128, {SUBWORD_CONTEXT} of {text.SUBWORDS} subwords, tied, batch 16",
        "subwords",
        16,
        lambda _: Transformer(text.SUBWORDS, SUBWORD_CONTEXT, 128, 2, tied=True),
    ),
    "lstm": Workload(
        f"an LSTM of width 128, {CONTEXT} characters, batch 16", "text", 16, lambda _: Recurrent(text.ALPHABET, 128)
    ),
    "transformer": Workload(
        f"{TRANSFORMER_LAYERS} layers, width {TRANSFORMER_WIDTH}, {CONTEXT} characters, batch 16",
        "text",
        16,
        lambda _: Transformer(text.ALPHABET, CONTEXT, TRANSFORMER_WIDTH, TRANSFORMER_LAYERS),
    ),
}
