"""The observer by itself: frozen roles, samples of steps, and nothing of optimizers."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from builders import inputs, mlp
from torch import nn

from relfisher.layers import discover
from relfisher.observe import Observer, Reading
from relfisher.observe.statistics import Reserved, Streamed
from relfisher.responses import LinearGaussian, ReLUGaussian, TanhBernoulli
from relfisher.structures import SharedBlock, Statistics


def observed(model, limit=None):
    observer = Observer(model, {}, limit)
    layers = discover(model).layers
    observer.add(layers)
    return observer, layers


def test_a_pass_and_its_gradients_tell_the_roles_once():
    model = mlp(nn.Tanh)
    observer, (first, second, last) = observed(model)
    assert observer.resolve() == {}
    loss = model(inputs()).square().sum()
    new = observer.resolve()
    assert set(new) == {first, second}, "the last one waits for its gradients"
    assert new[first].response == TanhBernoulli()
    assert new[first].reads_input
    assert not new[second].reads_input
    assert new[second].following is last
    loss.backward()
    assert observer.resolve().keys() == {last}
    assert observer.roles[last].is_head is False
    assert observer.resolve() == {}
    with pytest.raises(FrozenInstanceError):
        observer.roles[last].is_head = True
    observer.close()


class Pair(nn.Module):
    """An encoder and a decoder, of which a program may call each by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def rebuild(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("call", [Pair.forward, Pair.rebuild, lambda pair, x: pair.decoder(pair.encoder(x))])
@pytest.mark.parametrize("held", [lambda pair: pair, lambda pair: nn.ModuleList(pair.children())])
def test_parts_that_are_called_by_themselves_tell_the_roles(call, held):
    pair = Pair()
    observer, layers = observed(held(pair))
    call(pair, torch.rand(7, 6)).square().sum().backward()
    roles = [observer.roles[layer] for layer in layers]
    assert [role.response for role in roles] == [TanhBernoulli(), LinearGaussian(), ReLUGaussian(), LinearGaussian()]
    assert [role.reads_input for role in roles] == [True, False, False, False]
    assert roles[0].following is layers[1]
    observer.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.modules())


def test_only_the_whole_model_is_watched_once_all_roles_are_known():
    pair = Pair()
    observer, _ = observed(pair)
    assert pair.decoder._forward_pre_hooks
    pair(torch.rand(7, 6)).sum().backward()
    assert not pair.decoder._forward_pre_hooks
    assert pair._forward_pre_hooks
    observer.close()


def test_the_inputs_stay_raw_without_parameters_on_the_way():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(torch.cat([x.flatten(1) / 255, torch.ones(len(x), 2)], 1))))

    model = Pixels()
    observer, (a, b) = observed(model)
    model(torch.rand(3, 2, 3)).sum().backward()
    assert observer.roles[a].reads_input
    assert observer.roles[a].response == ReLUGaussian()
    assert not observer.resolve()[b].reads_input
    observer.close()


@pytest.mark.parametrize(("limit", "kind"), [(None, Streamed), (5, Reserved)])
def test_samples_are_given_once_their_gradients_have_flowed(limit, kind):
    model = mlp(sizes=(6, 3))
    observer, (layer,) = observed(model, limit)
    assert type(observer._samplers[layer]) is kind
    loss = model(inputs(n=16)).square().sum()
    observer.readings[layer] = Reading(SharedBlock(), LinearGaussian())
    assert observer.take() == {}
    model(inputs(1, n=16)).square().sum().backward()
    found = observer.take()[layer]
    if limit is None:
        assert isinstance(found, Statistics)
        assert found.samples == 16
    else:
        assert found.x.shape == (6, 7), "about as many, evenly spread"
    assert observer.take() == {}
    del loss
    observer.close()


def test_statistics_of_several_calls_add_up():
    model = mlp(sizes=(6, 3))
    observer, (layer,) = observed(model)
    observer.readings[layer] = reading = Reading(SharedBlock(), LinearGaussian())
    (model(inputs(0)).sum() + model(inputs(1)).sum()).backward()
    found = observer.take()[layer]
    augmented = torch.cat([torch.cat([inputs(seed), inputs(seed).new_ones(16, 1)], 1) for seed in (0, 1)])
    torch.testing.assert_close(found.totals["metric"], augmented.T @ augmented)
    assert found.samples == 32
    assert reading.structure.tensors == tuple(found.totals)
    observer.close()
