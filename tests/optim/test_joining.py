"""What joins a run later: layers that are first reached, unfrozen, added or given after others have moved."""

import pytest
import torch
from builders import (
    affine,
    average,
    expected_blocks,
    inputs,
    mlp,
    moves,
    normed_mlp,
    step,
    structures,
)
from torch import nn
from torch.nn.utils import prune

from relfisher import RNGD, MetricOptions, Preconditioner
from relfisher.optim import HealthWarning
from relfisher.responses import ReLUGaussian


class Late(nn.Module):
    """An expert is busy or not."""

    def __init__(self):
        super().__init__()
        self.first, self.expert, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.busy = False

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(torch.relu(self.expert(h)) if self.busy else h)


@pytest.mark.parametrize("structure", ["auto", "neuron"])
def test_a_layer_first_reached_later_is_discovered_then(structure):
    model = Late().double()
    optimizer = RNGD(model, metric=MetricOptions(structure=structure, decay=0.0 if structure == "neuron" else 0.995))
    with pytest.warns(HealthWarning, match="no part in the first step had expert"):
        step(model, optimizer, inputs())
    model.busy = True
    expected = expected_blocks(model.expert, torch.tanh(model.first(inputs())).detach(), ReLUGaussian())
    step(model, optimizer, inputs())
    assert "expert" in structures(optimizer)
    if structure == "neuron":
        torch.testing.assert_close(average(optimizer, model.expert), expected)
    for seed in range(10):
        step(model, optimizer, inputs(seed))
    assert float(optimizer.state[model.expert.weight]["ema_weight"]) > 0
    eye = torch.eye(6, dtype=torch.float64)
    assert not torch.equal(optimizer.state[model.expert.weight]["root"], eye), "refreshed with its first batch"


def test_a_layer_without_statistics_gets_them_at_once():
    """One that is unfrozen, and one that is added, between two updates of the metric."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = RNGD(model, fit="plain", metric=MetricOptions(stats_interval=10, warmup_refreshes=(0,)))
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    model[0].requires_grad_(True)
    model.append(nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": model[5].parameters()})
    masses = []
    for seed in range(3, 23):
        step(model, optimizer, inputs(seed))
        masses.append([float(optimizer.state[model[place].weight]["ema_weight"]) for place in (0, 2, 5)])
    assert masses[0][0] > 0
    assert masses[0][2] > 0
    updates = [len(set(of_layer)) for of_layer in zip(*masses, strict=True)]
    assert updates == [3, 3, 3]  # at once, or in turn before it was counted, and then no more often than others
    weight = model[0].weight
    state = optimizer.state[weight]
    assert not torch.equal(state["root"], torch.eye(7, dtype=torch.float64).expand_as(state["root"]))


def test_a_group_added_later_is_trained():
    model, extra = mlp(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = RNGD(model)
    optimizer.add_param_group({"params": [extra]})
    (model(inputs()) * extra).sum().backward()
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3, dtype=torch.float64))


def test_a_weight_that_is_given_later_joins_its_bias_and_their_metric():
    model = normed_mlp()
    names = dict(model.named_parameters())
    optimizer = RNGD(model, params=[names["0.bias"], names["3.bias"]], fit="plain", averaging=0, momentum=0)
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    kept = optimizer.state[names["0.bias"]]["metric"].clone()
    optimizer.add_param_group({"params": [names["0.weight"]], "lr": 0.05})
    assert torch.equal(optimizer.state[names["0.weight"]]["metric"], kept)
    assert not optimizer.state[names["0.bias"]]
    found = moves(model, optimizer, inputs(3))
    assert found["0.weight"].any()
    assert found["0.bias"].any()
    assert not found["3.weight"].any()
    assert optimizer.state_dict()["param_groups"][1]["lr"] == 0.05
    whole = affine(found, 0)
    assert float(whole.square().mean().sqrt()) == pytest.approx(0.05 / 7**0.5), "the bias moves with its weight's rate"


def test_a_group_added_later_joins_with_its_metric():
    model = normed_mlp()
    optimizer = RNGD(model, params=list(model[3].parameters()))
    for seed in range(3):
        found = moves(model, optimizer, inputs(seed))
        assert not found["0.weight"].any()
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
    for seed in range(3, 9):
        found = moves(model, optimizer, inputs(seed))
    assert found["0.weight"].any()
    assert structures(optimizer)["0"] == "diagonal"
    assert not found["2.weight"].any()


def test_a_layer_that_the_model_has_got_since_is_found():
    model = normed_mlp()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    model.append(nn.Linear(3, 2).double())
    optimizer.add_param_group({"params": list(model[4].parameters())})
    for seed in range(7):
        found = moves(model, optimizer, inputs(seed))
    assert found["4.weight"].any()
    assert "metric" in optimizer.state[model[4].weight]


def test_a_layer_that_was_replaced_is_no_longer_listed():
    model = mlp(sizes=(6, 5, 3))
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    model[2] = nn.Linear(5, 2).double()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    step(model, optimizer, inputs())
    assert [(each.name, each.group) for each in optimizer.layers] == [("0", 0), ("2", 1)]


def test_a_layer_that_is_pruned_later_says_so():
    model = mlp(sizes=(6, 5, 3))
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(ValueError, match=r"'2' has lost its parameter 'weight', as by pruning"):
        step(model, optimizer, inputs())
    optimizer.close()
    step(model, RNGD(model), inputs())


@pytest.mark.parametrize("kind", [RNGD, Preconditioner])
def test_a_model_on_the_meta_device_is_refused(kind):
    """What `to_empty` puts in the place of its parameters would never move."""
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match=r"but 0\.weight is on the meta device: make the optimizer after"):
        kind(model)
