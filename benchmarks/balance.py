"""Compare trust regions for the whole step and for each layer (the rule's choice).

    python benchmarks/balance.py

prints the mean mini-batch loss of each epoch on the paper's network and on a small BERT; the table is in
docs/decisions/defaults.md. It needs the extras `experiments` and `clients`. All runs use the same initial weights and
batches.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from relfisher import RNGD
from relfisher.optim.rules import Step, TrustRegion
from relfisher.studies.data import load
from relfisher.studies.training import iterate

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from synthetic import topics


class OneFactor(TrustRegion):
    """A trust region that shortens all layers by one factor."""

    def steps(self, moves):
        """Return the steps."""
        steps = TrustRegion(None).steps(moves)
        length = sum(squared_length(move, step) for move, step in zip(moves, steps, strict=True))
        factor = math.sqrt(self.bound / length) if length > self.bound else 1.0
        return [Step(step.direction, step.scale * factor) for step in steps]


def squared_length(move, step):
    """Return the squared length of the steps of a move's layers in the damped metric."""
    products = (step.direction * move.gradient).flatten(1).sum(1)
    return float(torch.sum(step.scale**2 * products))


def paper(activation):
    """Return the paper's network and its mini-batches on the embedded digits."""
    data = load("mnist5k")
    torch.manual_seed(0)
    layers = [nn.Linear(784, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return model, model, data.train_images, data.train_labels, 50


def bert():
    """Return a small BERT, the function from it to logits, and sequences of two classes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    return model, lambda tokens: model(input_ids=tokens).logits, *topics(256), 16


WORKLOADS = {
    "ReLU, batch 50": (lambda: paper(nn.ReLU), 6),
    "tanh, batch 50": (lambda: paper(nn.Tanh), 4),
    "BERT, batch 16": (bert, 3),
}

RULES = [(OneFactor, bound) for bound in (1e-2, 2e-2, 5e-2)] + [(TrustRegion, bound) for bound in (1e-3, 2e-3, 5e-3)]


def main():
    """Print the table."""
    torch.set_num_threads(1)
    print("| workload | rule | bound | loss of each epoch |")
    print("|---|---|---|---|", flush=True)
    for workload, (build, epochs) in WORKLOADS.items():
        for rule, bound in RULES:
            model, forward, inputs, targets, batch = build()
            optimizer = RNGD(model, step_rule=rule(bound))
            means = [epoch(optimizer, forward, inputs, targets, batch) for _ in range(epochs)]
            losses = ", ".join(f"{mean:.3f}" for mean in means)
            print(f"| {workload} | {rule.__name__} | {bound} | {losses} |", flush=True)


def epoch(optimizer, forward, inputs, targets, batch):
    """Return the mean loss of an epoch of training."""

    def loss(rows):
        return cross_entropy(forward(inputs[rows]), targets[rows])

    losses = [iterate(optimizer, loss, rows) for rows in torch.randperm(len(inputs)).split(batch)]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
