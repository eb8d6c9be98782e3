"""A step rule of the user's own keeps its state through saving, loading and copying."""

import copy

import pytest
import torch
from builders import assert_same_weights, inputs, mlp, resumed, step

from relfisher import RNGD, StepRule
from relfisher.optim.rules import Normalized, Spectral, Step, TrustRegion
from relfisher.optim.sharing import check_replicate
from relfisher.structures import Kept
from relfisher.testing import check_rule


class Heavy(StepRule):
    """Keeps a matrix and a counter."""

    name = "heavy"
    default_lr = 0.1

    def declares(self, shape):
        return {"heavy_sum": Kept(shape), "heavy_steps": Kept((), on_host=True, dtype=torch.float32)}

    def steps(self, moves):
        found = []
        for move in moves:
            total = move.state["heavy_sum"].mul_(0.9).add_(move.preconditioned())
            move.state["heavy_steps"].add_(1)
            found.append(Step(total, move.lr / float(move.state["heavy_steps"])))
        return found


class Clashing(Heavy):
    def declares(self, shape):
        return {"metric": Kept(shape)}


class Forgetful(Heavy):
    """Keeps something that nobody saves."""

    def __init__(self):
        self.count = 0

    def declares(self, shape):
        return {}

    def steps(self, moves):
        self.count += 1
        return [Step(move.preconditioned(), move.lr / self.count) for move in moves]


@pytest.mark.parametrize("rule", [Heavy, Normalized, Spectral, TrustRegion])
def test_rules_pass_their_check(rule):
    check_rule(rule)


class Coupled(TrustRegion):
    """Shortens all layers alike, although it says that a layer's step depends on that layer alone."""

    def steps(self, moves):
        steps = super().steps(moves)
        least = min(step.scale.min() for step in steps)
        return [step._replace(scale=least) for step in steps]


def test_only_rules_of_single_layers_share_out_their_work():
    with pytest.raises(AssertionError, match="after steps of one layer at a time"):
        check_rule(Coupled)
    with pytest.raises(ValueError, match="replicate must be True or None for Heavy, unless it declares is_layerwise"):
        RNGD(mlp(), step_rule=Heavy(), replicate=False)
    with pytest.raises(TypeError, match="replicate"):
        RNGD(mlp(), replicate="no")
    assert check_replicate(None, Heavy()) is True
    assert check_replicate(None, Spectral()) is None


def test_the_check_sees_a_key_of_others_and_state_outside():
    with pytest.raises(AssertionError, match="keys of its own, but metric are others'"):
        check_rule(Clashing)
    with pytest.raises(AssertionError, match="of the loaded optimizer"):
        check_rule(Forgetful)


def test_its_state_is_there_before_the_first_step_and_goes_on():
    model = mlp()
    optimizer = RNGD(model, step_rule=Heavy())
    assert optimizer.state[model[0].weight]["heavy_sum"].shape == (5, 7)
    for seed in range(4):
        step(model, optimizer, inputs(seed))
    assert float(optimizer.state[model[0].weight]["heavy_steps"]) == 4
    twin, other = resumed(model, optimizer, step_rule=Heavy())
    first, second = copy.deepcopy((model, optimizer))
    for seed in range(4, 8):
        for each, its in ((model, optimizer), (twin, other), (first, second)):
            step(each, its, inputs(seed))
    assert_same_weights(model, twin, first)
    assert float(second.state[first[0].weight]["heavy_steps"]) == 8


def test_a_state_of_other_shapes_is_refused():
    model = mlp()
    optimizer = RNGD(model, step_rule=Heavy())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["heavy_sum"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"the heavy_sum of '0.weight' has the shape \[2, 2\]"):
        RNGD(mlp(), step_rule=Heavy()).load_state_dict(state)


def test_its_state_follows_a_change_of_dtype_before_the_first_step():
    model = mlp()
    optimizer = RNGD(model, step_rule=Heavy(), momentum=0.5)
    model.float()
    step(model, optimizer, inputs().float())
    state = optimizer.state[model[2].weight]
    assert state["heavy_sum"].dtype == state["momentum"].dtype == state["metric"].dtype == torch.float32
    assert state["heavy_sum"].any()
