"""A transformer on the words of Python's standard library."""

import math
import re
from collections import Counter

import torch
from language import predicting
from program import Program, adams
from torch import nn

from relfisher.studies.text import characters

STEPS, BATCH, LENGTH, WIDTH, WORDS = 400, 20, 35, 64, 1000


def tokens():
    """Return the text as numbers of its words and signs; all but the most frequent are number 0."""
    found = re.findall(r"\w+|[^\w\s]", bytes(characters()[:1_000_000].tolist()).decode())
    number = {word: place + 1 for place, (word, _) in enumerate(Counter(found).most_common(WORDS - 1))}
    return torch.tensor([number.get(word, 0) for word in found])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        angles = torch.arange(LENGTH)[:, None] * torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10_000) / WIDTH))
        self.register_buffer("places", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        self.register_buffer("later", torch.ones(LENGTH, LENGTH).triu(1).bool())
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.2, batch_first=True)
        self.layers, self.drop = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Dropout(0.2)

    def forward(self, words):
        x = self.drop(self.embed(words) * math.sqrt(WIDTH) + self.places)
        return self.head(self.layers(x, mask=self.later))


def make(seed):
    text = tokens()
    held, text = text[: 100 * (LENGTH + 1)].view(-1, LENGTH + 1), text[100 * (LENGTH + 1) :]
    return predicting(Network(), text, held, LENGTH, BATCH, seed, clip=0.25)


PROGRAM = Program(
    "a transformer on words",
    "pytorch/examples, word_language_model: SGD, lr 5, gradients clipped to 0.25",
    STEPS,
    make,
    lambda model: torch.optim.SGD(model.parameters(), 5.0),
    adams(STEPS, 1e-3, 3e-3, 1e-2),
    "nats a word",
)
