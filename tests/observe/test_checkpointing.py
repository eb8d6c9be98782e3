"""Activation checkpointing, reentrant or not, changes neither roles nor steps."""

import itertools

import pytest
import torch
from builders import assert_same_weights
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from relfisher import RNGD

WIDTH, WORDS = 8, 11


class Own(nn.Module):
    """A layer with parameters of its own, which it multiplies by as a function."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return functional.linear(x, self.w, self.b)


class Block(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.last = last

    def forward(self, x, bias):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        return self.last(x + self.mlp(self.other(x)))


class Decoder(nn.Module):
    """Tokens through blocks, each of which may be run again in the backward pass."""

    def __init__(self, reentrant, what):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.what = reentrant, what
        self.embed, self.first = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        own = Own() if what == "modules" else nn.Identity()
        self.blocks = nn.ModuleList(Block(last) for last in (nn.Identity(), own, nn.Linear(WIDTH, WIDTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        self.double()

    def forward(self, tokens):
        x, bias = self.first(self.embed(tokens)), -(tokens == 0).double()[:, None, :]
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x, bias)
            elif self.what == "modules":
                x = checkpoint(block, x, bias, use_reentrant=self.reentrant)
            else:  # the call of the block itself is not seen
                x = checkpoint(block.forward, x, bias, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def trained(model, loss):
    optimizer = RNGD(model)
    for seed in range(3):
        optimizer.zero_grad()
        loss(model, torch.Generator().manual_seed(seed)).backward()
        optimizer.step()
    return {
        each.name: (each.role.reads_input, each.role.is_head, repr(each.role.response)) for each in optimizer.layers
    }


def predicted(model, generator):
    tokens = torch.randint(WORDS, (4, 6), generator=generator)
    return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["modules", "functions"])
def test_blocks_that_run_again_have_the_roles_and_steps_of_others(reentrant, what):
    plain, saving = Decoder(None, what), Decoder(reentrant, what)
    wanted, found = trained(plain, predicted), trained(saving, predicted)
    assert found == wanted
    assert [name for name, (_, is_head, _) in found.items() if is_head] == ["head"]
    assert [name for name, (reads, _, _) in found.items() if reads] == ["embed"]
    assert_same_weights(plain, saving)


class Sequence(nn.Module):
    """Layers, which may be run again in the backward pass, in two parts."""

    def __init__(self, saves):
        super().__init__()
        torch.manual_seed(0)
        pairs = itertools.pairwise((6, 5, 4, 4, 3))
        self.net = nn.Sequential(*[module for a, b in pairs for module in (nn.Linear(a, b), nn.Tanh())]).double()
        self.saves = saves

    def forward(self, x):
        return checkpoint_sequential(self.net, 2, x, use_reentrant=True) if self.saves else self.net(x)


def test_layers_that_run_again_alone_have_the_roles_and_steps_of_others():
    def loss(model, generator):
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        return (model(x) - 1).square().mean()

    plain, saving = Sequence(saves=False), Sequence(saves=True)
    wanted = trained(plain, loss)
    assert trained(saving, loss) == wanted
    assert [reads for reads, _, _ in wanted.values()] == [True, False, False, False]
    assert_same_weights(plain, saving)
