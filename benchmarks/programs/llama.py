"""A small llama whose head is its embedding, on the characters of Python's standard library."""

import torch
from language import predicting
from program import Program, adam, adams, with_cosine
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from relfisher.studies.text import characters

STEPS, BATCH, LENGTH, WIDTH, HEADS, DEPTH = 400, 12, 64, 64, 4, 2


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())


def turned(x, angles):
    """Return queries or keys [..., LENGTH, size], each pair of numbers turned by the angle of its place."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Norm(), Norm()
        self.query, self.key, self.value, self.joined = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 176, bias=False) for _ in range(2))
        self.down = nn.Linear(176, WIDTH, bias=False)

    def forward(self, x, angles):
        h = self.first(x)
        query, key, value = (
            each(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        seen = scaled_dot_product_attention(turned(query, angles), turned(key, angles), value, is_causal=True)
        x = x + self.joined(seen.transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(silu(self.gate(h)) * self.up(h))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.norm = (
            nn.Embedding(128, WIDTH),
            nn.ModuleList(Block() for _ in range(DEPTH)),
            Norm(),
        )
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, 0, 0.02 / (2 * DEPTH) ** 0.5 if "joined" in name or "down" in name else 0.02)
        half = WIDTH // HEADS // 2
        self.register_buffer("angles", torch.arange(LENGTH)[:, None] * 10_000 ** (-torch.arange(half) / half))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.angles)
        return linear(self.norm(x), self.embed.weight)


def make(seed):
    text = characters().long()
    held, text = text[: 100 * (LENGTH + 1)].view(-1, LENGTH + 1), text[100 * (LENGTH + 1) :]
    return predicting(Network(), text, held, LENGTH, BATCH, seed, clip=1.0)


PROGRAM = Program(
    "a llama with a tied head on characters",
    "Karpathy's llama2.c: AdamW, lr 5e-4, betas 0.9 and 0.95, weight decay 0.1, a cosine, gradients clipped to 1",
    STEPS,
    make,
    with_cosine(adam(5e-4, betas=(0.9, 0.95), weight_decay=0.1), STEPS),
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.1),
    "nats a character",
)
