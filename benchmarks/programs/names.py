"""The names of the functions of Python's standard library, character by character."""

import re
from functools import cache

import torch
from program import Task
from torch.nn.functional import cross_entropy

from relfisher.studies.text import characters

STEPS, BATCH, LENGTH, SIGNS = 500, 32, 16, 28


@cache
def split():
    """Return names [n, LENGTH + 1] of letters 1 to 26 and underlines 27, 0 around them; 500 for validation."""
    text = bytes(characters().tolist()).decode()
    found = sorted(set(re.findall(rf"def ([a-z_]{{3,{LENGTH - 1}}})\(", text)))
    rows = torch.zeros(len(found), LENGTH + 1, dtype=torch.long)
    for row, name in zip(rows, found, strict=True):
        row[1 : len(name) + 1] = torch.tensor([27 if sign == "_" else ord(sign) - 96 for sign in name])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[500:], rows[:500]


def writing(model, seed):
    """Return a run of a model that says the next sign of a name; what follows its end does not count."""
    names, held = split()
    generator = torch.Generator().manual_seed(seed)

    def nats(rows):
        ended = (rows[:, 1:] == 0).cumsum(1) > 1
        return cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:].masked_fill(ended, -1), ignore_index=-1)

    def loss(_):
        return nats(names[torch.randint(len(names), (BATCH,), generator=generator)])

    return Task(model, loss, lambda: float(nats(held)))
