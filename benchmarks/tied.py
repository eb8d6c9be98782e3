"""A head that has the weight of an embedding: in its own metric, or by AdamW.

    python benchmarks/tied.py

prints rows as `rules.py` does, of its small GPT-2, and of its transformer with the head tied to the characters and that
weight as GPT-2 begins. The table is in docs/decisions/defaults.md. It needs the extras `experiments` and `clients`.
"""

import argparse
import warnings
from functools import partial

import torch
from rules import counting, course, transformer

from relfisher import RNGD

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def optimizers(head):
    """Return what makes an optimizer, by name, for a model whose head has this name."""
    by_adamw = {f"AdamW, lr {rate:g}": partial(RNGD, structure={head: "fallback"}, fallback_lr=rate) for rate in RATES}
    return {"metric": RNGD} | by_adamw


def tied():
    """Return the transformer with one weight for its characters and its head."""
    model, draw, _ = transformer()
    torch.nn.init.normal_(model.character.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    model.head.weight = model.character.weight
    return model, draw, 160


TASKS = {"GPT-2": (counting, "lm_head"), "tied transformer": (tied, "head")}


def main():
    """Train and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for task in options.tasks.split(","):
        make, head = TASKS[task]
        for name, optimizer in optimizers(head).items():
            print(f"| {task} | {name} | {' | '.join(course(*make(), optimizer))} |", flush=True)


if __name__ == "__main__":
    main()
