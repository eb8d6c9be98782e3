"""Compare the steps of `RNGD(model)` with its defaults, bit by bit, with recorded ones.

`python benchmarks/trajectories.py` compares 300 steps on four models with `results/trajectories`; a refactoring must
not change any bit. Bits depend on the processor and the build of torch: on another machine, first record the older
commit with `--record` and another `--out`, then compare.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from relfisher import RNGD
from relfisher.files import write_atomically

STEPS = 300


class Network(nn.Module):
    """The paper's network, 784-64-64-64-10 with ReLU units."""

    def __init__(self) -> None:
        super().__init__()
        widths = (784, 64, 64, 64, 10)
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths[:-1])]
        self.body = nn.Sequential(*layers, nn.Linear(*widths[-2:]))

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss on 50 new noisy prototypes."""
        x, labels = images(generator, 50)
        return functional.cross_entropy(self.body(x.flatten(1)), labels)


class Convolutional(nn.Module):
    """Two convolutions with batch norm, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 16, 3, stride=2), nn.Linear(16 * 6 * 6, 10)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss on 32 new noisy prototypes."""
        x, labels = images(generator, 32)
        h = functional.max_pool2d(functional.relu(self.norm(self.first(x))), 2)
        return functional.cross_entropy(self.head(functional.gelu(self.second(h)).flatten(1)), labels)


class Transformer(nn.Module):
    """A language model of two blocks, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(40, 32), nn.Embedding(24, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 40, bias=False)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss on 16 new sequences."""
        text = sequences(generator, 16, 25)
        mask = nn.Transformer.generate_square_subsequent_mask(24)
        h = self.blocks(self.tokens(text[:, :-1]) + self.places(torch.arange(24)), mask=mask, is_causal=True)
        return functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), text[:, 1:].flatten())


class Recurrent(nn.Module):
    """A language model of one LSTM layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.cells, self.head = nn.Embedding(40, 24), nn.LSTM(24, 32, batch_first=True), nn.Linear(32, 40)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss on 16 new sequences."""
        text = sequences(generator, 16, 21)
        h, _ = self.cells(self.tokens(text[:, :-1]))
        return functional.cross_entropy(self.head(h).flatten(0, 1), text[:, 1:].flatten())


MODELS: dict[str, type[nn.Module]] = {
    "network": Network,
    "cnn": Convolutional,
    "transformer": Transformer,
    "lstm": Recurrent,
}


class Looped(nn.Module):
    """A model whose forward pass returns the loss, so that all of it is observed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, generator: torch.Generator) -> Tensor:
        """Return the loss on a new batch."""
        loss: Tensor = self.model.loss(generator)
        return loss


def images(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Return noisy prototypes [count, 1, 28, 28] of ten classes, and their classes."""
    prototypes = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(10, (count,), generator=generator)
    return prototypes[labels] + 2.0 * torch.randn(count, 1, 28, 28, generator=generator), labels


def sequences(generator: torch.Generator, count: int, length: int) -> Tensor:
    """Return sequences of 40 tokens, each the sum of the two before it and some noise."""
    text = torch.randint(40, (count, length), generator=generator)
    noise = torch.randint(3, (count, length), generator=generator)
    for place in range(2, length):
        text[:, place] = (text[:, place - 1] + text[:, place - 2] + noise[:, place]) % 40
    return text


def trajectory(name: str, steps: int = STEPS) -> dict[str, object]:
    """Return the losses of a run, as hexadecimal numbers, and a hash of its final weights."""
    torch.manual_seed(0)
    model = Looped(MODELS[name]())
    optimizer = RNGD(model)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(generator)
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    optimizer.close()
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return {"losses": losses, "weights": hashlib.sha256(weights).hexdigest()}


def main() -> int:
    """Record or compare all trajectories; return 0 if all agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the results as records")
    parser.add_argument("--out", type=Path, default=Path("results/trajectories"), help="directory of the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    agree = True
    for name in MODELS:
        found, path = trajectory(name), options.out / f"{name}.json"
        if options.record:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps({**machine, **found}, indent=1) + "\n").encode())
            continue
        recorded = json.loads(path.read_text())
        pairs = zip(found["losses"], recorded["losses"], strict=True)
        first = next((step for step, (a, b) in enumerate(pairs) if a != b), None)
        same = first is None and found["weights"] == recorded["weights"]
        agree &= same
        last = float.fromhex(found["losses"][-1])
        where = "the same" if same else f"differs from step {STEPS if first is None else first} on"
        print(f"{name:<12} {where}; last loss {last:.6f}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
