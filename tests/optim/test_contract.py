"""What every optimizer of torch does, RNGD does: on a network with a layer of every kind."""

import copy

import pytest
import torch
from builders import (
    KINDS,
    by_name,
    every_kind,
    predict,
    predicted,
    sentences,
)
from torch import nn

from relfisher import RNGD


@pytest.mark.supports("RNGD learns with all of them in one network", *KINDS)
def test_learns_with_every_kind_of_layer():
    model = every_kind()
    optimizer = RNGD(model, lr=0.1)
    losses = [predict(model, optimizer, seed) for seed in range(120)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert {name for group in optimizer.param_groups for name in group["param_names"] if group["kind"] == "adamw"} == {
        "scale"
    }
    ranked = {name for name, state in by_name(optimizer).items() if any(key.endswith("_scale") for key in state)}
    assert ranked == {"narrow.weight"}


def test_a_closure_is_evaluated_first_and_its_loss_returned():
    model, twin = every_kind(), every_kind()
    one, two = RNGD(model), RNGD(twin)
    for seed in range(4):

        def closure(seed=seed):
            torch.manual_seed(seed)
            one.zero_grad()
            loss = predicted(model, sentences(seed))
            loss.backward()
            return loss

        assert one.step(closure).item() == predict(twin, two, seed)


def test_clipped_gradients_move_as_smaller_ones_do():
    model = every_kind()
    optimizer = RNGD(model, lr=1e-3, step_rule="trust-region", trust_region=None)
    torch.manual_seed(0)
    predicted(model, sentences(0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = model.head.weight.detach().clone()
    optimizer.step()
    clipped = (model.head.weight - before).norm()
    plain = every_kind()
    optimizer = RNGD(plain, lr=1e-3, step_rule="trust-region", trust_region=None)
    predict(plain, optimizer, 0)
    assert 0 < clipped < 0.1 * (plain.head.weight - before).norm()


def test_several_models_and_losses_in_a_step_keep_their_samples_apart():
    """The discriminator sees fakes in the generator's step; clearing its gradients clears those samples."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    critic = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    one, two = RNGD(generator, stats_interval=1), RNGD(critic, stats_interval=1, unbiased=True, decay=0.0)
    for seed in range(4):
        noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        real = noise.new_ones(8, 4) * noise[:, :1]
        two.zero_grad()
        seen = [real, generator(noise).detach()]
        (critic(seen[1]).mean() - critic(seen[0]).mean()).backward()
        two.step()
        x = torch.cat([torch.cat(seen), noise.new_ones(16, 1)], 1)
        torch.testing.assert_close(two.state[critic[0].weight]["metric"], x.T @ x / 16)
        one.zero_grad()
        (-critic(generator(noise)).mean()).backward()
        one.step()


def test_two_optimizers_may_share_a_model():
    model = every_kind()
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]
    one, two = RNGD(model, params=body), RNGD(model, params=list(model.head.parameters()), step_rule="spectral")
    for seed in range(3):
        before = copy.deepcopy(model.state_dict())
        torch.manual_seed(seed)
        model.zero_grad()
        predicted(model, sentences(seed)).backward()
        two.step()
        after = model.state_dict()
        changed = {name for name, _ in model.named_parameters() if not torch.equal(before[name], after[name])}
        assert changed == {"head.weight", "head.bias"}
        one.step()


@pytest.mark.parametrize("structure", ["auto", {"Embedding": "fallback"}])
def test_sparse_gradients_move_as_dense_ones_do(structure):
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 2)).double()
        optimizer = RNGD(model, structure=structure)
        for tokens in ([1, 2], [2, 2], [4, 1]):
            optimizer.zero_grad()
            (model(torch.tensor(tokens)) - 1).square().sum().backward()
            optimizer.step()
        ends.append(model[0].weight.detach())
    torch.testing.assert_close(*ends)
