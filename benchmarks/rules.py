"""Compare normalized and spectral steps and Adam on language models and a sequence classifier.

    python benchmarks/rules.py

prints the mean loss of the last iterations before each eighth of a run: for the transformer of `relfisher bench race`,
a small GPT-2 that learns to count, and a small BERT that distinguishes two topics. The table is in
docs/decisions/defaults.md. It needs the extras `experiments` and `clients`. All runs of a task use the same initial
weights and batches.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from relfisher import RNGD
from relfisher.studies.training import iterate
from relfisher.studies.workloads import WORKLOADS, batches, samples

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from hf_gpt2 import gpt2
from synthetic import progressions, topics

WINDOW = 20
OPTIMIZERS = {
    "Adam, lr 1e-3": lambda model: torch.optim.Adam(model.parameters(), 1e-3),
    "Adam, lr 3e-3": lambda model: torch.optim.Adam(model.parameters(), 3e-3),
    "Adam, lr 1e-2": lambda model: torch.optim.Adam(model.parameters(), 1e-2),
    "normalized": lambda model: RNGD(model, step_rule="normalized"),
    "spectral": lambda model: RNGD(model, step_rule="spectral"),
}


def transformer():
    """Return the model, a function that draws its loss, and the number of iterations."""
    workload = WORKLOADS["transformer"]
    model = workload.build(0)
    drawn = batches(samples("text", ""), workload.batch_size, torch.Generator().manual_seed(0))
    return model, lambda: workload.loss(model, *next(drawn)), 320


def counting():
    """Return the same for a GPT-2 with two layers of width 32."""
    torch.manual_seed(0)
    model, tokens, rows = gpt2(), progressions(2000), torch.Generator().manual_seed(0)

    def loss():
        batch = tokens[torch.randint(len(tokens), (16,), generator=rows)]
        return model(input_ids=batch, labels=batch).loss

    return model, loss, 160


def classifying():
    """Return the same for a BERT with two layers of width 32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16}
    model = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))
    (tokens, labels), rows = topics(2000), torch.Generator().manual_seed(0)

    def loss():
        batch = torch.randint(len(tokens), (16,), generator=rows)
        return model(input_ids=tokens[batch], labels=labels[batch]).loss

    return model, loss, 160


TASKS = {"transformer": transformer, "GPT-2": counting, "BERT": classifying}


def course(model, draw, iterations, make):
    """Train a model, and return the mean loss before each eighth of the iterations."""
    optimizer = make(model)
    losses = [iterate(optimizer, draw) for _ in range(iterations)]
    marks = range(iterations // 8, iterations + 1, iterations // 8)
    return [f"{sum(losses[mark - WINDOW : mark]) / WINDOW:.3f}" for mark in marks]


def compare(description, tasks, optimizers):
    """Train the combinations selected on the command line, and print the rows.

    Args:
        description: the description of the command.
        tasks: functions by name; each returns a model, a function that draws its loss, and the number of iterations.
        optimizers: maps the name of a task to functions by name, which create an optimizer.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(tasks))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for task in options.tasks.split(","):
        for name, make in optimizers(task).items():
            print(f"| {task} | {name} | {' | '.join(course(*tasks[task](), make))} |", flush=True)


if __name__ == "__main__":
    compare(__doc__, TASKS, lambda _: OPTIMIZERS)
