"""Parameter groups: options of their own, halves with a metric and without, and structures by name."""

import pytest
import torch
from builders import inputs, moves, normed_mlp, step, structures
from torch import nn

from relfisher import RNGD, AdamWOptions, MetricOptions, TrustRegion
from relfisher.optim.groups import OptionChecks, check_options
from relfisher.structures import SharedBlock


def test_each_group_is_kept_as_one_with_a_metric_and_one_without():
    model = nn.ModuleDict({"body": normed_mlp(), "own": nn.ParameterDict({"scale": nn.Parameter(torch.ones(3))})})
    optimizer = RNGD(model, lr=0.2, fallback=AdamWOptions(lr=0.05))
    assert [(group["kind"], group["lr"]) for group in optimizer.param_groups] == [("metric", 0.2), ("adamw", 0.05)]
    assert optimizer.param_groups[1]["param_names"] == ["own.scale"]


def test_options_of_a_group_hold_for_its_layers():
    """Each of two layers moves as it does where its options are those of all."""
    groups = [
        {"params": ["0.weight", "0.bias"], "lr": 0.1, "damping": 0.3, "structure": "neuron"},
        {"params": ["2.weight", "2.bias", "3.weight", "3.bias"], "lr": 0.02, "structure": "shared", "momentum": 0.5},
    ]
    bounds = {"step_rule": TrustRegion(None)}
    model, (one, two) = normed_mlp(), (normed_mlp(), normed_mlp())
    named = dict(model.named_parameters())
    given = [{**group, "params": [named[name] for name in group["params"]]} for group in groups]
    optimizer = RNGD(model, params=given, **bounds)
    assert len(optimizer.param_groups) == 2
    found = [moves(model, optimizer, inputs(seed)) for seed in range(3)]
    assert structures(optimizer) == {"0": "neuron", "2": "shared", "3": "shared"}
    expected = moves(one, RNGD(one, lr=0.1, damping=0.3, **bounds, metric=MetricOptions(structure="neuron")), inputs())
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(found[0][name], expected[name])
    expected = moves(
        two, RNGD(two, lr=0.02, momentum=0.5, **bounds, metric=MetricOptions(structure="shared")), inputs()
    )
    for name in ("2.weight", "3.weight", "3.bias"):
        torch.testing.assert_close(found[0][name], expected[name])
    assert "momentum" in optimizer.state[model[3].weight]
    assert "momentum" not in optimizer.state[model[0].weight]


def test_weight_decay_is_each_parameters_own():
    """As in fine-tuning: weights decay, biases and norms do not."""
    model = normed_mlp()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain, one = normed_mlp(), RNGD(model, lr=0.5, params=groups)
    two = RNGD(plain, lr=0.5, weight_decay=0.0)
    mine, theirs = moves(model, one, inputs()), moves(plain, two, inputs())
    start = dict(normed_mlp().named_parameters())
    for name in mine:
        shrunk = 0.05 * start[name].detach() if start[name].ndim > 1 else 0.0
        torch.testing.assert_close(mine[name], theirs[name] - shrunk)


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_a_bias_whose_weight_is_left_to_adamw_is_so_too(first):
    model = normed_mlp()
    groups = [
        {"params": [model[0].weight], "structure": "fallback"},
        {"params": [p for name, p in model.named_parameters() if name != "0.weight"]},
    ]
    optimizer = RNGD(model, params=groups if first == "weight" else groups[::-1])
    assert "exp_avg" in optimizer.state[model[0].bias]
    assert moves(model, optimizer, inputs())["0.bias"].any()
    assert set(structures(optimizer)) == {"2", "3"}


def test_a_learning_rate_given_for_parameters_without_a_metric_is_theirs():
    own = nn.Parameter(torch.ones(3))
    model = normed_mlp()
    optimizer = RNGD(model, params=[{"params": list(model.parameters())}, {"params": [own], "lr": 0.07}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.07]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1.0}, r"lr must lie in \(0, 1e\+06\], got -1.0"),
        ({"damping": -0.1}, r"damping must lie in \[0, inf\), got -0.1"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"structure": "blocks"}, "structure must be one of .*, got 'blocks'"),
        ({"structure": {"nothing": "shared"}}, "structure names 'nothing', which is no layer"),
    ],
)
def test_options_outside_what_is_allowed_are_named(group, message):
    model = normed_mlp()
    with pytest.raises(ValueError, match=message):
        RNGD(model, params=[{"params": list(model.parameters()), **group}])


def test_a_parameter_in_two_groups_is_refused():
    model = normed_mlp()
    with pytest.raises(ValueError, match="more than one parameter group"):
        RNGD(model, params=[{"params": [model[0].weight]}, {"params": list(model.parameters())}])


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ({"0": "shared"}, {"0": "shared", "2": "neuron", "3": "shared"}),
        ({"[03]": "diagonal"}, {"0": "diagonal", "2": "neuron", "3": "diagonal"}),
        ({"Linear": "diagonal", "3": "neuron"}, {"0": "diagonal", "2": "neuron", "3": "neuron"}),
        ({"LayerNorm": "fallback"}, {"0": "diagonal", "3": "shared"}),
        ({"3": SharedBlock(), "*": "neuron"}, {"0": "neuron", "2": "neuron", "3": "shared"}),
    ],
)
def test_structures_by_name_pattern_and_class(structure, expected):
    model = normed_mlp()
    optimizer = RNGD(model, metric=MetricOptions(structure=structure))
    step(model, optimizer, inputs())
    assert structures(optimizer) == expected


@pytest.mark.parametrize("structure", ["shared", "kronecker", "neuron", "published"])
def test_embeddings_keep_tokens_squared_numbers_only_where_a_rule_is_theirs(structure):
    model = nn.ModuleDict({"embed": nn.Embedding(3000, 4), "bag": nn.EmbeddingBag(3000, 4), "head": nn.Linear(4, 3)})
    optimizer = RNGD(model, averaging=0, momentum=0, metric=MetricOptions(structure=structure))
    for layer in ("embed", "bag"):
        assert all(value.numel() <= 3000 for value in optimizer.state[model[layer].weight].values())
    grouped = RNGD(
        model, params=[{"params": list(model.parameters()), "structure": structure}], averaging=0, momentum=0
    )
    assert all(value.numel() <= 3000 for value in grouped.state[model["embed"].weight].values())
    model["bag"] = nn.EmbeddingBag(30, 4)
    optimizer = RNGD(model, metric=MetricOptions(structure={"bag": "shared", "Embedding": "diagonal"}))
    assert optimizer.state[model["bag"].weight]["metric"].shape == (30, 30)


def test_a_group_without_parameters_stays_one():
    """Schedulers count groups, and so do saved states."""
    model = normed_mlp()
    groups = [{"params": [], "lr": 0.5}, {"params": list(model.parameters())}]
    optimizer = RNGD(model, params=groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.01]
    moves(model, optimizer, inputs())
    other = RNGD(model, params=groups)
    other.load_state_dict(optimizer.state_dict())
    assert [len(group["params"]) for group in other.param_groups] == [0, len(list(model.parameters()))]


@pytest.mark.parametrize("group", [{"lr": 0.1}, "weights"])
def test_what_is_no_group_is_named(group):
    with pytest.raises(TypeError, match="parameter"):
        RNGD(normed_mlp(), params=[group])


def test_a_step_checks_the_options_that_were_set_anew():
    """What `check_options` looks at is what is compared with the step before."""
    looked_at = set()

    class Recording(dict):
        def __getitem__(self, key):
            looked_at.add(key)
            return super().__getitem__(key)

    check_options(Recording(RNGD(nn.Linear(2, 2), total_steps=5).param_groups[0]))
    checks, found = OptionChecks(), set()

    class Compared(Recording):
        def __getitem__(self, key):
            found.add(key)
            return dict.__getitem__(self, key)

    groups = [Compared(RNGD(nn.Linear(2, 2)).param_groups[0])]
    checks.check(groups)
    found.clear()
    checks.check(groups)
    assert found == looked_at
