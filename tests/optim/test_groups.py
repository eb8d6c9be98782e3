"""Parameter groups: options of their own, halves with a metric and without, what is added or left out."""

import copy

import pytest
import torch
from torch import nn

from relfisher import RNGD
from relfisher.structures import NeuronBlocks, SharedBlock


def network():
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def batch(seed=0, n=16):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(model, optimizer, seed=0):
    optimizer.zero_grad()
    loss = (model(batch(seed)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def moves(model, optimizer, seed=0):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, optimizer, seed)
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def structures(optimizer):
    return {layer.name: type(layer.structure) for layer in optimizer._place}


def test_each_group_is_kept_as_one_with_a_metric_and_one_without():
    model = nn.ModuleDict({"body": network(), "own": nn.ParameterDict({"scale": nn.Parameter(torch.ones(3))})})
    optimizer = RNGD(model, lr=0.2, fallback_lr=0.05)
    assert [(group["kind"], group["lr"]) for group in optimizer.param_groups] == [("metric", 0.2), ("adamw", 0.05)]
    assert optimizer.param_groups[1]["param_names"] == ["own.scale"]


def test_options_of_a_group_hold_for_its_layers():
    """Each of two layers moves as it does where its options are those of all."""
    groups = [
        {"params": ["0.weight", "0.bias"], "lr": 0.1, "damping": 0.3, "structure": "neuron"},
        {"params": ["2.weight", "2.bias", "3.weight", "3.bias"], "lr": 0.02, "structure": "shared", "momentum": 0.5},
    ]
    model, (one, two) = network(), (network(), network())
    named = dict(model.named_parameters())
    given = [{**group, "params": [named[name] for name in group["params"]]} for group in groups]
    optimizer = RNGD(model, params=given, step_rule="trust-region", trust_region=None)
    assert len(optimizer.param_groups) == 2
    found = [moves(model, optimizer, seed) for seed in range(3)]
    assert structures(optimizer) == {"0": NeuronBlocks, "2": SharedBlock, "3": SharedBlock}
    expected = moves(
        one, RNGD(one, lr=0.1, damping=0.3, structure="neuron", step_rule="trust-region", trust_region=None)
    )
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(found[0][name], expected[name])
    expected = moves(
        two, RNGD(two, lr=0.02, structure="shared", step_rule="trust-region", trust_region=None, momentum=0.5)
    )
    for name in ("2.weight", "3.weight", "3.bias"):
        torch.testing.assert_close(found[0][name], expected[name])
    assert "momentum" in optimizer.state[model[3].weight]
    assert "momentum" not in optimizer.state[model[0].weight]


def test_weight_decay_is_each_parameters_own():
    """As in fine-tuning: weights decay, biases and norms do not."""
    model = network()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain, one = network(), RNGD(model, lr=0.5, params=groups)
    two = RNGD(plain, lr=0.5)
    mine, theirs = moves(model, one), moves(plain, two)
    start = dict(network().named_parameters())
    for name in mine:
        shrunk = 0.05 * start[name].detach() if start[name].ndim > 1 else 0.0
        torch.testing.assert_close(mine[name], theirs[name] - shrunk)


def test_what_is_not_given_stays_and_is_no_part_of_the_metric():
    """Weights alone move as if the biases were frozen."""
    model, frozen = network(), network()
    optimizer = RNGD(model, params=[parameter for parameter in model.parameters() if parameter.ndim > 1])
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    twin = RNGD(frozen)
    for seed in range(8):
        mine, theirs = moves(model, optimizer, seed), moves(frozen, twin, seed)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name])
            assert bool(mine[name].any()) == (mine[name].ndim > 1)


def test_a_frozen_part_is_left_out_at_once_when_it_is_frozen_later():
    model = network()
    optimizer = RNGD(model, step_rule="trust-region", trust_region=None)
    for seed in range(7):
        step(model, optimizer, seed)
    model[0].bias.requires_grad_(False)
    step(model, optimizer, 8)
    inverse = optimizer.state[model[0].weight]["inverse"]
    assert not inverse[..., :-1, -1].any()
    model[0].bias.requires_grad_(True)
    step(model, optimizer, 9)
    assert optimizer.state[model[0].weight]["inverse"][..., :-1, -1].all()


def test_bias_alone_moves_in_its_own_metric():
    """With the weight frozen a linear unit's metric about its bias is 1, whatever the inputs."""
    model = nn.Sequential(nn.Linear(6, 3)).double()
    model[0].weight.requires_grad_(False)
    optimizer = RNGD(model, lr=0.5, damping=0.0, step_rule="trust-region", trust_region=None)
    before = model[0].bias.detach().clone()
    step(model, optimizer)
    torch.testing.assert_close(model[0].bias.detach(), before - 0.5 * model[0].bias.grad)


def test_biases_that_alone_are_given_move_as_those_of_frozen_weights_do():
    """In their own metric, which is there before the first step, whether the weights are frozen or just not given."""
    whole, filtered, unfrozen = network(), network(), network()
    for model in (whole, filtered):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    one = RNGD(whole, momentum=0.5)
    biases = [[p for name, p in model.named_parameters() if name.endswith("bias")] for model in (filtered, unfrozen)]
    others = [RNGD(model, params=p, momentum=0.5) for model, p in zip((filtered, unfrozen), biases, strict=True)]
    for other in others:
        assert [group["kind"] for group in other.param_groups] == ["metric"]
        assert all("metric" in other.state[parameter] for parameter in other.param_groups[0]["params"])
    for seed in range(8):
        expected = moves(whole, one, seed)
        assert expected["0.bias"].any()
        assert not expected["0.weight"].any()
        for model, other in zip((filtered, unfrozen), others, strict=True):
            for name, move in moves(model, other, seed).items():
                torch.testing.assert_close(move, expected[name])
    twin = network()
    last = RNGD(twin, params=[p for name, p in twin.named_parameters() if name.endswith("bias")], momentum=0.5)
    twin.load_state_dict(filtered.state_dict())
    last.load_state_dict(others[0].state_dict())
    assert step(twin, last, 8) == step(filtered, others[0], 8)
    assert step(twin, last, 9) == step(filtered, others[0], 9)


def test_a_weight_that_is_given_later_joins_its_bias_and_their_metric():
    model = network()
    names = dict(model.named_parameters())
    optimizer = RNGD(model, params=[names["0.bias"], names["3.bias"]])
    for seed in range(3):
        step(model, optimizer, seed)
    kept = optimizer.state[names["0.bias"]]["metric"].clone()
    optimizer.add_param_group({"params": [names["0.weight"]], "lr": 0.05})
    assert torch.equal(optimizer.state[names["0.weight"]]["metric"], kept)
    assert not optimizer.state[names["0.bias"]]
    found = moves(model, optimizer, 3)
    assert found["0.weight"].any()
    assert found["0.bias"].any()
    assert not found["3.weight"].any()
    assert optimizer.state_dict()["param_groups"][1]["lr"] == 0.05
    layer = next(layer for layer in optimizer._place if layer.name == "0")
    assert optimizer._group(layer)["lr"] == 0.05


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_a_bias_whose_weight_is_left_to_adamw_is_so_too(first):
    model = network()
    groups = [
        {"params": [model[0].weight], "structure": "fallback"},
        {"params": [p for name, p in model.named_parameters() if name != "0.weight"]},
    ]
    optimizer = RNGD(model, params=groups if first == "weight" else groups[::-1])
    assert set(structures(optimizer)) == {"2", "3"}
    assert "exp_avg" in optimizer.state[model[0].bias]
    assert moves(model, optimizer)["0.bias"].any()


def test_a_group_added_later_joins_with_its_metric():
    model = network()
    optimizer = RNGD(model, params=list(model[3].parameters()))
    for seed in range(3):
        found = moves(model, optimizer, seed)
        assert not found["0.weight"].any()
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
    for seed in range(3, 9):
        found = moves(model, optimizer, seed)
    assert found["0.weight"].any()
    assert structures(optimizer)["0"] is NeuronBlocks
    assert not found["2.weight"].any()


def test_a_layer_that_the_model_has_got_since_is_found():
    model = network()
    optimizer = RNGD(model)
    step(model, optimizer)
    model.append(nn.Linear(3, 2).double())
    optimizer.add_param_group({"params": list(model[4].parameters())})
    for seed in range(7):
        found = moves(model, optimizer, seed)
    assert found["4.weight"].any()
    assert "metric" in optimizer.state[model[4].weight]


def test_a_learning_rate_given_for_parameters_without_a_metric_is_theirs():
    own = nn.Parameter(torch.ones(3))
    model = network()
    optimizer = RNGD(model, params=[{"params": list(model.parameters())}, {"params": [own], "lr": 0.07}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.07]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number > 0, got -1.0"),
        ({"damping": -0.1}, r"damping must lie in \[0, inf\), got -0.1"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"structure": "blocks"}, "structure must be one of .*, got 'blocks'"),
        ({"structure": {"nothing": "shared"}}, "structure names 'nothing', which is no layer"),
    ],
)
def test_options_outside_what_is_allowed_are_named(group, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        RNGD(model, params=[{"params": list(model.parameters()), **group}])


def test_a_parameter_in_two_groups_is_refused():
    model = network()
    with pytest.raises(ValueError, match="more than one parameter group"):
        RNGD(model, params=[{"params": [model[0].weight]}, {"params": list(model.parameters())}])


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ({"0": "shared"}, {"0": "shared", "2": "neuron", "3": "shared"}),
        ({"[03]": "diagonal"}, {"0": "diagonal", "2": "neuron", "3": "diagonal"}),
        ({"Linear": "diagonal", "3": "neuron"}, {"0": "diagonal", "2": "neuron", "3": "neuron"}),
        ({"LayerNorm": "fallback"}, {"0": "neuron", "3": "shared"}),
        ({"3": SharedBlock(), "*": "neuron"}, {"0": "neuron", "2": "neuron", "3": "shared"}),
    ],
)
def test_structures_by_name_pattern_and_class(structure, expected):
    model = network()
    optimizer = RNGD(model, structure=structure)
    step(model, optimizer)
    assert {layer.name: layer.structure.name for layer in optimizer._place} == expected


@pytest.mark.parametrize("structure", ["shared", "kronecker", "neuron", "published"])
def test_embeddings_keep_tokens_squared_numbers_only_where_a_rule_is_theirs(structure):
    model = nn.ModuleDict({"embed": nn.Embedding(3000, 4), "bag": nn.EmbeddingBag(3000, 4), "head": nn.Linear(4, 3)})
    optimizer = RNGD(model, structure=structure, averaging=0)
    for layer in ("embed", "bag"):
        assert all(value.numel() <= 3000 for value in optimizer.state[model[layer].weight].values())
    grouped = RNGD(model, params=[{"params": list(model.parameters()), "structure": structure}], averaging=0)
    assert all(value.numel() <= 3000 for value in grouped.state[model["embed"].weight].values())
    model["bag"] = nn.EmbeddingBag(30, 4)
    optimizer = RNGD(model, structure={"bag": "shared", "Embedding": "diagonal"})
    assert optimizer.state[model["bag"].weight]["metric"].shape == (30, 30)


def test_the_state_is_there_before_the_first_step_and_as_large_afterwards():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = network(), nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.body(x) * self.scale

    model = Scaled()
    optimizer = RNGD(model, structure="shared")
    before = {index: set(state) for index, state in optimizer.state_dict()["state"].items()}
    step(model, optimizer)
    assert before == {index: set(state) for index, state in optimizer.state_dict()["state"].items()}
    assert {key for state in before.values() for key in state} >= {"metric", "inverse", "mass", "lead", "exp_avg"}


def test_frozen_layers_take_no_state():
    model = network()
    model[0].requires_grad_(False)
    optimizer = RNGD(model)
    assert model[0].weight not in optimizer.state
    step(model, optimizer)
    assert model[0].weight not in optimizer.state or not optimizer.state[model[0].weight]


def test_a_state_of_other_parameters_is_refused_by_name():
    model = network()
    state = RNGD(model).state_dict()
    other = nn.ModuleDict({"first": model[0], "norm": model[2], "last": model[3]})
    with pytest.raises(ValueError, match=r"lacks first\.weight.*; it has 0\.weight"):
        RNGD(other).load_state_dict(state)


@pytest.mark.parametrize("options", [{"structure": "fallback"}, {"momentum": 0.5, "structure": "shared"}])
def test_a_state_of_parameters_of_other_shapes_is_refused_by_name(options):
    model = network()
    optimizer = RNGD(model, **options)
    step(model, optimizer)
    other = nn.Sequential(*model[:3], nn.Linear(5, 4).double())
    last = RNGD(other, **options)
    before = copy.deepcopy(last.state_dict())
    with pytest.raises(ValueError, match=r"of '3\.weight' has the shape \[3, [56]\], but .* \[4, [56]\]"):
        last.load_state_dict(optimizer.state_dict())
    after = last.state_dict()
    assert all(
        torch.equal(after["state"][place][key], value)
        for place in before["state"]
        for key, value in before["state"][place].items()
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_the_state_of_a_compiled_model_is_that_of_the_model():
    model = network()
    optimizer = RNGD(model)
    step(model, optimizer)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    other = RNGD(compiled)
    other.load_state_dict(optimizer.state_dict())
    assert step(model, optimizer, 1) == pytest.approx(step(compiled, other, 1), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_may_change_its_dtype_before_the_first_step(dtype):
    model = network()
    optimizer = RNGD(model)
    model.to(dtype)
    for seed in range(6):
        optimizer.zero_grad()
        (model(batch(seed).to(dtype)) - 1).square().mean().backward()
        optimizer.step()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[model[0].weight]["metric"].dtype == wanted
    assert optimizer.health.failed_refreshes == 0
