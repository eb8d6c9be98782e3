"""What the hooks on a model see of its passes, whoever runs them and however, and that they leave nothing behind."""

import gc
import math
import weakref

import pytest
import torch
from builders import (
    assert_same_weights,
    average,
    every_kind,
    expected_blocks,
    inputs,
    is_hooked,
    mlp,
    predict,
    squares,
    step,
    structures,
    train,
)
from torch import nn

from relfisher import RNGD, MetricOptions, plan
from relfisher.observe import ResponseWarning
from relfisher.responses import LinearGaussian, ReLUGaussian, TanhBernoulli


def exact(model, **options):
    """An optimizer that keeps the exact metric of the last batch, which tells what it took for the response."""
    return RNGD(
        model, **options, metric=MetricOptions(structure="neuron", decay=0.0, stats_interval=1, stats_samples=None)
    )


@torch.no_grad()
def layer_by_layer(model, x, *responses):
    """The exact blocks of the linear layers of a sequential model with these responses, by their place."""
    places = [place for place, module in enumerate(model) if isinstance(module, nn.Linear)]
    return {
        place: expected_blocks(model[place], model[:place](x), response)
        for place, response in zip(places, responses, strict=False)
    }


def assert_seen(model, optimizer, expected):
    for place, blocks in expected.items():
        torch.testing.assert_close(average(optimizer, model[place]), blocks)


def test_layers_that_run_outside_the_forward_pass_are_linear_and_named():
    model = mlp()
    expected = layer_by_layer(model, inputs(), *[LinearGaussian()] * 3)
    optimizer = exact(model)
    (model[4](model[:4](inputs())) - 1).square().mean().backward()
    with pytest.warns(ResponseWarning, match="0, 2, 4 ran outside"):
        optimizer.step()
    assert_seen(model, optimizer, expected)


def test_evaluation_mode_with_gradients_is_training():
    model = mlp().eval()
    expected = layer_by_layer(model, inputs(), TanhBernoulli(), TanhBernoulli(), LinearGaussian())
    optimizer = exact(model)
    step(model, optimizer, inputs())
    assert_seen(model, optimizer, expected)


def test_keyword_calls_sequences_and_single_vectors():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return torch.tanh(self.fc(input=x))

    model = Odd().double()
    optimizer = exact(model)
    for x in (inputs().reshape(4, 4, 6), inputs()[0]):
        expected = expected_blocks(model.fc, x.reshape(-1, 6), TanhBernoulli())
        step(model, optimizer, x)
        torch.testing.assert_close(average(optimizer, model.fc), expected)


def test_a_long_unrolled_layer_is_one_subsystem_and_told_in_linear_time():
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x):
            for _ in range(300):
                x = torch.tanh(self.cell(x))
            return x

    model = Unrolled().double()
    seen = [inputs()]
    for _ in range(299):
        seen.append(torch.tanh(model.cell(seen[-1])).detach())
    expected = expected_blocks(model.cell, torch.cat(seen), TanhBernoulli())
    optimizer = exact(model)
    step(model, optimizer, inputs())
    assert structures(optimizer).keys() == {"cell"}
    torch.testing.assert_close(average(optimizer, model.cell), expected)


def test_says_once_which_activation_is_not_known():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(torch.atan(self.first(x)))

    model = Odd().double()
    optimizer = RNGD(model)
    with pytest.warns(ResponseWarning, match="first feeds atan") as caught:
        train(model, optimizer, 3)
    assert len([warning for warning in caught if warning.category is ResponseWarning]) == 1


def test_per_sample_gradients_by_torch_func_leave_the_optimizer_alone():
    """Two runs, of which one takes per-sample gradients between its steps, go on alike."""
    model, twin = mlp(), mlp()
    optimizer, other = (
        RNGD(model, metric=MetricOptions(stats_interval=1)),
        RNGD(twin, metric=MetricOptions(stats_interval=1)),
    )

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    for seed in range(3):
        step(twin, other, inputs(seed))
        optimizer.zero_grad()
        squares(model, inputs(seed)).backward()
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), 9 * inputs())
        assert gradients["0.weight"].shape == (16, 5, 6)
        optimizer.step()
        assert torch.equal(optimizer.state[model[0].weight]["metric"], other.state[twin[0].weight]["metric"])
    assert_same_weights(model, twin)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
def test_compiled_models_train_as_eager_ones():
    plain, compiled = mlp(), mlp()
    one, two = RNGD(plain), RNGD(compiled)
    fast = torch.compile(compiled, backend="eager")
    for seed in range(7):
        assert step(plain, one, inputs(seed)) == pytest.approx(step(fast, two, inputs(seed)), rel=1e-12)


def test_hooks_that_return_the_same_values_hide_no_activation():
    model = mlp()
    expected = layer_by_layer(model, inputs(), TanhBernoulli(), TanhBernoulli())
    seen = []
    model[0].register_forward_hook(lambda _module, _args, output: output * 1)
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output.norm()))
    model[2].register_full_backward_hook(lambda *_: None)
    optimizer = exact(model)
    step(model, optimizer, inputs().requires_grad_())
    assert_seen(model, optimizer, expected)
    assert len(seen) == 1
    assert next(row.response for row in plan(model, inputs())) == TanhBernoulli()


def test_hooks_that_return_other_values_are_named():
    model = mlp()
    model[0].register_forward_hook(lambda _module, _args, output: output * 2)
    expected = layer_by_layer(model, inputs(), LinearGaussian(), TanhBernoulli())
    optimizer = exact(model)
    with pytest.warns(ResponseWarning, match="0 feeds a forward hook"):
        step(model, optimizer, inputs())
    assert_seen(model, optimizer, expected)


def test_a_hook_that_works_in_place_is_the_activation_that_it_is():
    model = mlp(nn.Identity)
    expected = layer_by_layer(model, inputs(), ReLUGaussian())
    model[0].register_forward_hook(lambda _module, _args, output: output.relu_())
    optimizer = exact(model)
    step(model, optimizer, inputs())
    assert_seen(model, optimizer, expected)


def modes():
    """How many of torch's modes, which see each function that is called, are active."""
    return len(torch.overrides._get_current_function_mode_stack())


def test_a_forward_pass_that_raises_leaves_no_watch_behind():
    model = mlp(nn.ReLU)
    optimizer = RNGD(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5, dtype=torch.float64))
    assert all(map(math.isfinite, train(model, optimizer, 3)))
    assert modes() == 0


def test_an_interrupted_first_pass_leaves_no_watch_once_closed():
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            self.fc(x)
            raise KeyboardInterrupt

    model = Interrupted().double()
    optimizer = RNGD(model)
    with pytest.raises(KeyboardInterrupt):
        model(inputs())
    optimizer.close()
    assert modes() == 0


def test_the_optimizer_lets_the_model_go_and_the_model_the_optimizer():
    model = mlp(nn.ReLU)
    optimizer = RNGD(model)
    train(model, optimizer, 2)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not is_hooked(model)
    other = RNGD(model)
    assert is_hooked(model)
    other.close()
    assert not is_hooked(model)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_the_optimizer_is_a_context_that_takes_its_hooks_off():
    model = every_kind()
    with RNGD(model) as optimizer:
        predict(model, optimizer, 0)
    assert not is_hooked(model)


def test_what_is_closed_gathers_no_more():
    model = mlp()
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=1))
    step(model, optimizer, inputs())
    optimizer.close()
    kept = optimizer.state[model[0].weight]["metric"].clone()
    step(model, optimizer, inputs(1))
    assert torch.equal(optimizer.state[model[0].weight]["metric"], kept)
