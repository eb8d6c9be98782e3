"""What every optimizer of torch does, RNGD does: on a network with a layer of every kind."""

import itertools

import pytest
import torch
from builders import (
    KINDS,
    by_name,
    every_kind,
    inputs,
    mlp,
    predict,
    predicted,
    sentences,
    weights,
)
from reference import augment
from torch import nn

from relfisher import RNGD, MetricOptions, TrustRegion


@pytest.mark.supports("RNGD learns with all of them in one network", *KINDS)
def test_learns_with_every_kind_of_layer():
    model = every_kind()
    optimizer = RNGD(model, lr=0.1, momentum=0.0)
    losses = [predict(model, optimizer, seed) for seed in range(120)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert not any("exp_avg" in state for state in optimizer.state.values())
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
    optimizer = RNGD(model, lr=1e-3, step_rule=TrustRegion(None))
    torch.manual_seed(0)
    predicted(model, sentences(0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = model.head.weight.detach().clone()
    optimizer.step()
    clipped = (model.head.weight - before).norm()
    plain = every_kind()
    optimizer = RNGD(plain, lr=1e-3, step_rule=TrustRegion(None))
    predict(plain, optimizer, 0)
    assert 0 < clipped < 0.1 * (plain.head.weight - before).norm()


def test_several_models_and_losses_in_a_step_keep_their_samples_apart():
    """The discriminator sees fakes in the generator's step; clearing its gradients clears those samples."""
    generator, critic = mlp(sizes=(3, 5, 4)), mlp(nn.ReLU, (4, 5, 1))
    one, two = (
        RNGD(generator, metric=MetricOptions(stats_interval=1)),
        RNGD(
            critic, fit="plain", metric=MetricOptions(stats_interval=1, bias_correction=True, stagger=True, decay=0.0)
        ),
    )
    for seed in range(4):
        noise = inputs(seed, 8, 3)
        real = noise.new_ones(8, 4) * noise[:, :1]
        two.zero_grad()
        seen = [real, generator(noise).detach()]
        (critic(seen[1]).mean() - critic(seen[0]).mean()).backward()
        two.step()
        x = augment(torch.cat(seen))
        torch.testing.assert_close(two.state[critic[0].weight]["metric"], x.T @ x / 16)
        one.zero_grad()
        (-critic(generator(noise)).mean()).backward()
        one.step()


def test_two_optimizers_may_share_a_model():
    model = every_kind()
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]
    one, two = RNGD(model, params=body), RNGD(model, params=list(model.head.parameters()), step_rule="spectral")
    for seed in range(3):
        torch.manual_seed(seed)
        model.zero_grad()
        predicted(model, sentences(seed)).backward()
        stages = [weights(model)]
        for optimizer in (two, one):
            optimizer.step()
            stages.append(weights(model))
        by_two, by_one = (
            {name for name, value in before.items() if not torch.equal(value, after[name])}
            for before, after in itertools.pairwise(stages)
        )
        assert by_two == {"head.weight", "head.bias"}
        assert by_one == stages[0].keys() - by_two
