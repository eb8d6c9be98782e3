"""What the hooks on a model see of its passes, whoever runs them and however, and that they leave nothing behind."""

import gc
import math
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

import relfisher
from relfisher import RNGD, MetricOptions, module_metric, plan
from relfisher.observe import ResponseWarning
from relfisher.optim import HealthWarning
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
            return self.second(torch.special.i0(self.first(x)))

    model = Odd().double()
    optimizer = RNGD(model)
    with pytest.warns(ResponseWarning, match="first feeds special_i0") as caught:
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
    model[0].register_forward_hook(lambda _module, _args, output: output.flip(-1))
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


class Interrupted(nn.Module):
    """Two linear layers, and anything that happens once between the first one and its activation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
        self.happens = None

    def forward(self, x):
        z = self.first(x)
        happens, self.happens = self.happens, None
        if happens is not None:
            happens()
        return self.second(torch.tanh(z))


def in_a_thread(work):
    """Run this in another thread, to its end."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def fail(model):
    with pytest.raises(RuntimeError):
        model(inputs(1, width=5))


OTHERS = {
    "evaluates": lambda model: torch.no_grad()(model)(inputs(1)),
    "runs with gradients": lambda model: model(inputs(1)),
    "uses the weights": lambda model: nn.functional.linear(inputs(1), model.first.weight),
    "takes a metric": lambda model: module_metric(model, "first", inputs(1)),
    "fails": fail,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_a_thread_observes_does_not_depend_on_another(other):
    model, twin = Interrupted(), Interrupted()
    optimizer, alone = exact(model), exact(twin)
    model.happens = lambda: in_a_thread(lambda: other(model))
    step(model, optimizer, inputs())
    step(twin, alone, inputs())
    assert torch._C._len_torch_function_stack() == 0
    assert [view.role.response for view in optimizer.layers] == [view.role.response for view in alone.layers]
    assert isinstance(optimizer.layers[0].role.response, TanhBernoulli)
    assert_same_weights(model, twin)


def test_a_metric_does_not_depend_on_what_another_thread_runs():
    model, alone = Interrupted(), Interrupted()
    model.happens = lambda: in_a_thread(lambda: model(inputs(1)))
    one, two = module_metric(model, "first", inputs()), module_metric(alone, "first", inputs())
    torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=0, atol=0)


def test_a_mask_is_of_the_thread_that_set_it():
    model, twin = mlp(), mlp()
    optimizer, alone = exact(model), exact(twin)
    with ThreadPoolExecutor(1) as pool, optimizer.masked(torch.arange(16) < 5):
        pool.submit(lambda: squares(model, inputs()).backward()).result()
    optimizer.step()
    step(twin, alone, inputs())
    assert_same_weights(model, twin)


class Late(nn.Module):
    """A layer in the middle that joins the passes when it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 6, dtype=torch.float64)
        self.last = nn.Linear(6, 3, dtype=torch.float64)
        self.joined = False

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(torch.relu(self.middle(h)) if self.joined else h)


def test_a_layer_that_first_runs_later_has_its_metric_from_that_pass_on():
    model = Late()
    optimizer = exact(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            step(model, optimizer, inputs(seed))
        assert optimizer.layers[1].role is None
        model.joined = True
        with torch.no_grad():
            model(inputs())  # a pass without gradients tells nothing
            h = torch.tanh(model.first(inputs(3)))
            expected = expected_blocks(model.middle, h, ReLUGaussian())
        step(model, optimizer, inputs(3))
        assert isinstance(optimizer.layers[1].role.response, ReLUGaussian)
        assert optimizer.layers[1].role.following.name == "last"
        torch.testing.assert_close(average(optimizer, model.middle), expected)
        step(model, optimizer, inputs(4))
    said = "no part in the first step had middle: without a gradient, in no forward pass"
    assert [str(warning.message) for warning in caught] == [said]
    assert not is_awaited(model)


def is_awaited(model):
    """Whether a module other than the model itself has a hook before its calls, besides that of the average."""
    return any(len(module._forward_pre_hooks) > 1 for module in model.children())


def test_an_output_that_first_runs_later_is_known_as_a_head_at_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 3)
            self.second = False

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return self.two(h) if self.second else self.one(h)

    model = Branches().double()
    optimizer = RNGD(model)
    with pytest.warns(HealthWarning, match="no part in the first step had two"):
        train(model, optimizer, 2)
    model.second = True
    train(model, optimizer, 1, first=2)
    assert structures(optimizer)["two"] == "kronecker"


@pytest.mark.parametrize("end", ["step", "close"])
def test_layers_that_never_run_are_awaited_until_the_end(end):
    model = Late()
    optimizer = RNGD(model)
    with pytest.warns(HealthWarning, match="no part"):
        step(model, optimizer, inputs())
    assert is_awaited(model)
    if end == "close":
        optimizer.close()
        assert not is_hooked(model)
    else:
        model.joined = True
        step(model, optimizer, inputs())
        assert not is_awaited(model)


def library_calls(run):
    """How many functions of the library a call runs."""
    found, library = [], str(Path(relfisher.__file__).parent)

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(library):
            found.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(found)


def test_a_pass_that_collects_nothing_runs_few_functions_for_each_layer():
    """A linear layer and its activation, both of which are parts of the model: with gradients, and without."""
    trains, evaluates = [], []
    for sizes in ((6, 5, 4, 3), (6, 5, 5, 5, 5, 4, 3)):
        model = mlp(sizes=sizes)
        optimizer = RNGD(model, metric=MetricOptions(stats_interval=50, warmup_refreshes=(0,)))
        train(model, optimizer, 3)
        model(inputs()).sum().backward()  # the weights move to the iterate once
        trains.append(library_calls(lambda model=model: model(inputs())))
        with torch.inference_mode():
            evaluates.append(library_calls(lambda model=model: model(inputs())))
    assert (evaluates[1] - evaluates[0]) / 3 == 2
    assert (trains[1] - trains[0]) / 3 <= 21
    assert evaluates[0] <= 30
    assert trains[0] <= 80


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_full_backward_hooks_of_a_program_change_nothing(kind):
    model, plain = mlp(nn.ReLU), mlp(nn.ReLU)
    optimizer, other = RNGD(model), RNGD(plain)
    for module in model[1:]:  # torch warns of inputs without gradients
        getattr(module, kind)(lambda *_: None)
    train(model, optimizer, 4)
    train(plain, other, 4)
    roles = {each.name: each.role for each in optimizer.layers}
    assert {name: role.following and role.following.name for name, role in roles.items()} == {
        "0": "2",
        "2": "4",
        "4": None,
    }
    assert structures(optimizer) == structures(other)
    assert_same_weights(model, plain)
