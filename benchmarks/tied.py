"""Compare two optimizers for a head that is tied to an embedding: its own metric, or AdamW.

    python benchmarks/tied.py

prints rows in the format of `rules.py`: for its small GPT-2, and for its transformer with the head tied to the
characters and the weight initialized as in GPT-2. The table is in docs/decisions/defaults.md. It needs the extras
`experiments` and `clients`.
"""

from functools import partial

import torch
from rules import compare, counting, transformer

from relfisher import RNGD, AdamWOptions, MetricOptions

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
HEADS = {"GPT-2": "lm_head", "tied transformer": "head"}


def optimizers(task):
    """Return functions by name that create an optimizer for the model of a task."""
    head = HEADS[task]
    by_adamw = {
        f"AdamW, lr {rate:g}": partial(
            RNGD, metric=MetricOptions(structure={head: "fallback"}), fallback=AdamWOptions(lr=rate)
        )
        for rate in RATES
    }
    return {"metric": RNGD} | by_adamw


def tied():
    """Return the transformer with a single weight for its characters and its head."""
    model, draw, _ = transformer()
    torch.nn.init.normal_(model.character.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    model.head.weight = model.character.weight
    return model, draw, 160


TASKS = {"GPT-2": counting, "tied transformer": tied}


if __name__ == "__main__":
    compare(__doc__, TASKS, optimizers)
