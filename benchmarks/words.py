"""Time the step of small language models relative to their passes: few tokens a step, and a head of all words.

    python benchmarks/words.py [--out results/words]

The models have two layers of torch's encoder; a batch is 32 rows of 35 words. Optimizers take turns in one process,
each with its own copy of the model. Times are medians of processor time, for one thread; the last column has the mean
of all steps, with statistics and refreshes, relative to the passes.
"""

import argparse
import copy
import time
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from operations import muon
from tables import tell
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD
from relfisher.studies.report import markdown

ROWS, LENGTH = 32, 35
WARM_UP, ITERATIONS = 5, 20
MODELS = {  # words, width, whether the head is tied to the embedding
    "10,000 words, width 200": (10_000, 200, False),
    "33,278 words, width 200": (33_278, 200, False),
    "50,304 words, width 64, tied": (50_304, 64, True),
}


class Words(nn.Module):
    """A model of the next word."""

    def __init__(self, words, width, tied):
        super().__init__()
        self.word = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 2, width, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words, bias=not tied)
        if tied:
            self.head.weight = self.word.weight

    def forward(self, words):
        """Return the logits [n, positions, words]."""
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.head(self.blocks(self.word(words), mask, is_causal=True))


OPTIMIZERS = {
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "Muon": muon,
    "RNGD": RNGD,
    "RNGD, normalized": partial(RNGD, step_rule="normalized"),
}


def iteration(model, optimizer, rows):
    """Return the milliseconds of the passes and of the step."""
    optimizer.zero_grad()
    start = time.process_time()
    cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
    middle = time.process_time()
    optimizer.step()
    return 1e3 * (middle - start), 1e3 * (time.process_time() - middle)


def lines(name):
    """Return the lines of a model."""
    torch.manual_seed(0)
    model = Words(*MODELS[name])
    lanes = {kind: (own := copy.deepcopy(model), make(own)) for kind, make in OPTIMIZERS.items()}
    times = {kind: [] for kind in lanes}
    for _ in range(WARM_UP + ITERATIONS):
        rows = torch.randint(MODELS[name][0], (ROWS, LENGTH + 1))
        for kind, lane in lanes.items():
            times[kind].append(iteration(*lane, rows))
    passes = median(own for kind in times for own, _ in times[kind][WARM_UP:])
    found = []
    for kind, own in times.items():
        steps = [step for _, step in own[WARM_UP:]]
        found.append([name, kind, f"{passes:.0f}", f"{median(steps):.0f}", f"{median(steps) / passes:.2f}",
                      f"{mean(steps) / passes:.2f}"])  # fmt: skip
    return found


def main():
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    header = ["model", "", "forward and backward, ms", "step, ms", "relative to the passes", "mean"]
    tell(markdown(header, [line for name in MODELS for line in lines(name)]), out)


if __name__ == "__main__":
    main()
