"""What people do around an optimizer: freeze, copy, checkpoint, mix precisions, skip batches, call layers oddly."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from relfisher import RNGD, Preconditioner, coverage, plan
from relfisher.optim import HealthWarning
from relfisher.responses import LinearGaussian, ReLUGaussian, TanhBernoulli
from relfisher.subsystems import ResponseWarning, TiedWarning


def network(activation=nn.Tanh, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    layers = nn.Linear(6, 5, bias=bias), activation(), nn.Linear(5, 4, bias=bias), activation(), nn.Linear(4, 3)
    return nn.Sequential(*layers).to(dtype)


def inputs(seed=0, n=16, dtype=torch.float64):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = (model(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def responses(optimizer):
    return {layer.name: layer.response for layer in optimizer._place}


def metric(optimizer, layer):
    return optimizer.state[layer.weight]["metric"]


def moved(model, optimizer, x=None):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, optimizer, inputs() if x is None else x)
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_what_is_frozen_later_stays_and_what_is_unfrozen_later_moves():
    model = network()
    model[0].requires_grad_(False)
    optimizer = RNGD(model)
    assert moved(model, optimizer) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    model[0].requires_grad_(True)
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    assert moved(model, optimizer) == {"0.weight", "0.bias", "2.weight", "4.bias"}
    assert next(iter(optimizer._place)).structure is not None


def test_a_copy_of_the_model_is_not_watched():
    model = network()
    optimizer = RNGD(model, stats_interval=1)
    step(model, optimizer, inputs())
    twin = copy.deepcopy(model)
    kept = metric(optimizer, model[0]).clone()
    (twin(100 * inputs())).sum().backward()
    assert optimizer._curvature.capture.take() == {}
    assert torch.equal(metric(optimizer, model[0]), kept)
    step(twin, RNGD(twin), inputs())  # and it can be watched by an optimizer of its own


def test_a_watched_model_can_be_saved_whole():
    model = network()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(inputs()), model(inputs()))


def test_pickling_the_optimizer_says_what_to_do_instead():
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        pickle.dumps(RNGD(network()))


def test_a_copy_of_model_and_optimizer_goes_on_as_the_original_does():
    model = network()
    optimizer = RNGD(model, momentum=0.5, refresh_interval=4)
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    twin, other = copy.deepcopy((model, optimizer))
    for seed in range(3, 12):
        assert step(model, optimizer, inputs(seed)) == step(twin, other, inputs(seed))
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    step(twin, other, inputs())
    assert all(torch.equal(one, other) for one, other in zip(kept, model.parameters(), strict=True))


def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own():
    model = network()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["params"][0] is not model[0].weight
    del model
    optimizer = optimizer.state_dict()
    with pytest.raises(TypeError, match="the model is gone"):
        copy.deepcopy(copy.deepcopy(twin))


@pytest.mark.parametrize("frozen_first", [False, True], ids=["freezes", "unfreezes"])
def test_what_is_frozen_right_after_a_copy_or_a_load_is_left_out_at_once(frozen_first):
    model = network()
    model[0].bias.requires_grad_(not frozen_first)
    optimizer = RNGD(model)
    for seed in range(12):
        step(model, optimizer, inputs(seed))
    twin, other = copy.deepcopy((model, optimizer))
    loaded = copy.deepcopy(model)
    last = RNGD(loaded)
    last.load_state_dict(optimizer.state_dict())
    for each in (model, twin, loaded):
        each[0].bias.requires_grad_(frozen_first)
    for seed in range(12, 16):
        expected = step(model, optimizer, inputs(seed))
        assert step(twin, other, inputs(seed)) == expected
        assert step(loaded, last, inputs(seed)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_train_and_resume_bitwise(dtype):
    model = network(dtype=dtype)
    optimizer = RNGD(model, stats_interval=1, refresh_interval=4, momentum=0.5)
    for seed in range(5):
        step(model, optimizer, inputs(seed, dtype=dtype))
    assert metric(optimizer, model[0]).dtype == torch.float32
    twin = copy.deepcopy(model)
    other = RNGD(twin, stats_interval=1, refresh_interval=4, momentum=0.5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(5, 10):
        assert step(model, optimizer, inputs(seed, dtype=dtype)) == step(twin, other, inputs(seed, dtype=dtype))


def test_autocast_leaves_the_metric_in_float32():
    """Inputs of rank 3 and little damping: in bfloat16 the products would not be positive semi-definite."""
    model = network(dtype=torch.float32)
    optimizer = RNGD(model, stats_interval=1, refresh_interval=1, damping=1e-4)
    x = inputs(dtype=torch.float32)[:, :3] @ torch.randn(3, 6)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert optimizer.health.failed_refreshes == 0
    torch.testing.assert_close(metric(optimizer, model[0]), metric(optimizer, model[0]).mT, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_passes_count_once(reentrant):
    plain, saving = network(), network()
    one = RNGD(plain, stats_interval=1)
    two = RNGD(saving, stats_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResponseWarning)  # reentrant: the layers run outside the forward pass
        for seed in range(3):
            x = inputs(seed).requires_grad_()
            for model, optimizer in ((plain, one), (saving, two)):
                optimizer.zero_grad()
                h = model[:4](x) if model is plain else checkpoint(model[:4], x, use_reentrant=reentrant)
                (model[4](h) - 1).square().mean().backward()
                optimizer.step()
    torch.testing.assert_close(metric(two, saving[4]), metric(one, plain[4]))
    assert float(two.state[saving[0].weight]["mass"]) == float(one.state[plain[0].weight]["mass"])


def test_layers_that_run_outside_the_forward_pass_are_linear_and_named():
    model = network()
    optimizer = RNGD(model)
    (model[4](model[:4](inputs())) - 1).square().mean().backward()
    with pytest.warns(ResponseWarning, match="0, 2, 4 ran outside"):
        optimizer.step()
    assert set(responses(optimizer).values()) == {LinearGaussian()}


def test_a_pass_without_a_backward_pass_does_not_count():
    model = network()
    optimizer = RNGD(model, stats_interval=1)
    step(model, optimizer, inputs())
    kept = metric(optimizer, model[0]).clone()
    model(inputs() * float("nan"))  # the user saw the NaN and left the batch out
    assert optimizer._curvature.capture.take() == {}
    assert torch.equal(metric(optimizer, model[0]), kept)


def test_evaluation_mode_with_gradients_is_training():
    model = network()
    model.eval()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    assert responses(optimizer)["0"] == TanhBernoulli()


def test_a_layer_first_reached_later_is_discovered_then():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.expert, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.busy = False

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.last(torch.relu(self.expert(h)) if self.busy else h)

    model = Late().double()
    optimizer = RNGD(model)
    with pytest.warns(HealthWarning, match="no part in the first step had expert"):
        step(model, optimizer, inputs())
    model.busy = True
    with pytest.warns(HealthWarning, match="expert has a gradient but was not seen"):
        step(model, optimizer, inputs())
    step(model, optimizer, inputs())
    assert responses(optimizer)["expert"] == ReLUGaussian()
    for seed in range(10):
        step(model, optimizer, inputs(seed))
    assert float(optimizer.state[model.expert.weight]["mass"]) > 0
    eye = torch.eye(6, dtype=torch.float64)
    assert not torch.equal(optimizer.state[model.expert.weight]["inverse"], eye), "refreshed with its first batch"


def test_an_expert_without_samples_is_no_error():
    model = network()
    optimizer = RNGD(model)
    out = model(inputs(n=0))
    (out.sum() + (model(inputs()) - 1).square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(inputs(n=0)).sum().backward()
    optimizer.step()
    assert optimizer.health.failed_refreshes == 0


@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({"structure": "neuron"}, lambda: 1e4 * inputs()),
        ({"damping": 0.0}, lambda: inputs(n=2)),
        ({"damping": 0.0, "structure": "neuron"}, lambda: 0 * inputs()),
    ],
)
def test_a_singular_metric_is_no_error(options, x):
    """Saturated units, more parameters than samples without damping, an input that is zero."""
    model = network(bias=False)
    optimizer = RNGD(model, stats_interval=1, refresh_interval=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealthWarning)
        for _ in range(5):
            step(model, optimizer, x())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_a_step_that_is_not_finite_lets_the_next_refresh_come():
    model = network()
    optimizer = RNGD(model, step_rule="trust-region", stats_interval=1, refresh_interval=4, early_refreshes=())
    step(model, optimizer, inputs())
    for layer in optimizer._place:
        optimizer.state[layer.weight]["inverse"].neg_()
    with pytest.warns(HealthWarning, match="preconditioned step is not finite"):
        step(model, optimizer, inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealthWarning)
        for seed in range(5):
            step(model, optimizer, inputs(seed))
    skipped = optimizer.health.skipped_steps
    step(model, optimizer, inputs())
    assert optimizer.health.skipped_steps == skipped


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_gradient_that_is_not_finite_changes_nothing_between_statistics(place, momentum):
    model = network()
    optimizer = RNGD(model, momentum=momentum)
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    (model(inputs(3)) - 1).square().mean().backward()
    model[place].weight.grad[1, 2] = torch.nan
    with pytest.warns(HealthWarning, match="step skipped"):
        optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert optimizer.health.skipped_steps == 1
    assert moved(model, optimizer) == {name for name, _ in model.named_parameters()}


def test_large_finite_gradients_are_not_called_infinite():
    model = network(dtype=torch.float32)
    optimizer = RNGD(model)
    step(model, optimizer, inputs(dtype=torch.float32))
    optimizer.zero_grad()
    (1e20 * model(inputs(dtype=torch.float32))).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert not any("gradient is not finite" in str(warning.message) for warning in caught)


def test_keyword_calls_sequences_and_single_vectors():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return torch.tanh(self.fc(input=x))

    model = Odd().double()
    optimizer = RNGD(model)
    for x in (inputs().reshape(4, 4, 6), inputs()[0]):
        step(model, optimizer, x)
    assert responses(optimizer)["fc"] == TanhBernoulli()


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
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    assert responses(optimizer)["cell"] == TanhBernoulli()


def test_states_that_do_not_fit_are_explained():
    model = network()
    with pytest.raises(ValueError, match="must be that of an RNGD optimizer"):
        RNGD(model).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    optimizer = RNGD(model)
    start = copy.deepcopy(optimizer.state_dict())
    first = step(model, optimizer, inputs())
    optimizer.load_state_dict(start)  # as a learning-rate finder does
    assert first > step(model, optimizer, inputs()) > 0


def test_schedulers_reach_the_fallback_too():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    optimizer = RNGD(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    assert moved(model, optimizer) == set()
    scheduler.step()


def test_a_group_added_later_is_trained():
    model, extra = network(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = RNGD(model)
    optimizer.add_param_group({"params": [extra]})
    (model(inputs()) * extra).sum().backward()
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3, dtype=torch.float64))


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


def test_per_sample_gradients_by_torch_func_leave_the_optimizer_alone():
    model = network()
    optimizer = RNGD(model, stats_interval=1)
    step(model, optimizer, inputs())
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs())
    step(model, optimizer, inputs())


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
    assert len(torch.overrides._get_current_function_mode_stack()) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
def test_compiled_models_train_as_eager_ones():
    plain, compiled = network(), network()
    one, two = RNGD(plain), RNGD(compiled)
    fast = torch.compile(compiled, backend="eager")
    for seed in range(7):
        assert step(plain, one, inputs(seed)) == pytest.approx(step(fast, two, inputs(seed)), rel=1e-12)


TIES = {
    "linear": lambda model, h: nn.functional.linear(h, model.embed.weight),
    "transposed": lambda model, h: h @ model.embed.weight.t(),
    "property": lambda model, h: h @ model.embed.weight.T,
    "scaled": lambda model, h: nn.functional.linear(h, model.embed.weight * 0.5),
    "einsum": lambda model, h: torch.einsum("...i,oi->...o", h, model.embed.weight),
}


class Tied(nn.Module):
    """A language model whose head is the weight of its embedding, in a function."""

    def __init__(self, head):
        super().__init__()
        self.embed, self.hidden, self._head = nn.Embedding(9, 4), nn.Linear(4, 4), head

    def forward(self, tokens):
        return self._head(self, torch.tanh(self.hidden(self.embed(tokens))))


def learn(model, optimizer, tokens, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, -2), tokens.flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("tie", TIES)
def test_weights_tied_in_functions_are_left_to_adamw(tie):
    torch.manual_seed(0)
    model = Tied(TIES[tie])
    tokens = torch.randint(9, (4, 5))
    twin = copy.deepcopy(model)
    optimizer, other = RNGD(model), RNGD(twin, structure={"embed": "fallback"})
    with pytest.warns(TiedWarning, match="no metric for some layers: embed, tied: .* outside its own calls") as caught:
        learn(model, optimizer, tokens)
    assert len(caught) == 1
    learn(twin, other, tokens)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert sorted(optimizer.state[model.embed.weight]) == ["exp_avg", "exp_avg_sq", "step"]
    rows = {row.name: row for row in coverage(model, tokens)}
    assert rows["embed.weight"].by == "adamw"
    assert rows["embed.weight"].reason.startswith("tied: ")
    assert rows["hidden.weight"].by == "metric"
    assert [row.name for row in plan(model, tokens)] == ["hidden"]


class Head(nn.Module):
    """A language model whose head is a module that has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.units(tokens))

    def units(self, tokens):
        return torch.tanh(self.hidden(self.embed(tokens)))


class Names(Head):
    """The same with a bias that the model names once more, as BERT does."""

    def __init__(self):
        super().__init__()
        self.bias = self.head.bias


class LooksUp(Head):
    """The same with a function in the embedding's place."""

    def __init__(self):
        super().__init__()
        del self.embed

    def units(self, tokens):
        return torch.tanh(self.hidden(nn.functional.embedding(tokens, self.head.weight)))


@pytest.mark.parametrize("model_class", [Head, Names, LooksUp])
def test_a_tied_head_moves_its_whole_gradient_along_the_metric_of_its_inputs(model_class):
    model, tokens = model_class().double(), torch.randint(9, (4, 5))
    weight, bias = model.head.weight, model.head.bias
    with torch.no_grad():
        x = torch.nn.functional.pad(model.units(tokens).flatten(0, 1), (0, 1), value=1.0)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    gradient = torch.cat([each.reshape(9, -1) for each in torch.autograd.grad(loss, (weight, bias))], 1)
    metric = x.T @ x / len(x)
    damped = metric + 0.1 * metric.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    expected = torch.cat([weight, bias.unsqueeze(1)], 1).detach() - 0.3 * gradient @ torch.linalg.inv(damped)
    learn(model, RNGD(model, lr=0.3, structure="shared", step_rule="trust-region", trust_region=None), tokens, steps=1)
    torch.testing.assert_close(torch.cat([weight, bias.unsqueeze(1)], 1).detach(), expected)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_a_weight_is_left_to_adamw_where_looking_up_changes_it_or_its_gradient(options):
    class Changes(LooksUp):
        def units(self, tokens):
            return torch.tanh(self.hidden(nn.functional.embedding(tokens, self.head.weight, **options)))

    model, tokens = Changes(), torch.randint(9, (4, 5))
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning, match="head, tied: embedding uses its parameters outside its own calls"):
        learn(model, optimizer, tokens)
    assert sorted(optimizer.state[model.head.weight]) == ["exp_avg", "exp_avg_sq", "step"]


def test_a_bias_that_is_named_once_more_and_used_is_left_to_adamw():
    class Adds(Names):
        def forward(self, tokens):
            return super().forward(tokens) + self.bias

    model, tokens = Adds(), torch.randint(9, (4, 5))
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning, match="head, tied: add uses its parameters outside its own calls"):
        learn(model, optimizer, tokens)
    assert sorted(optimizer.state[model.bias]) == ["exp_avg", "exp_avg_sq", "step"]


def test_a_tied_head_is_covered_under_the_name_of_its_parameter():
    model, tokens = Head(), torch.randint(9, (4, 5))
    (row,) = (row for row in coverage(model, tokens) if row.name == "embed.weight")
    assert (row.by, row.subsystem) == ("metric", "head")
    assert all(each.by == "metric" for each in coverage(model, tokens))
    assert [each.name for each in plan(model, tokens)] == ["hidden", "head"]


@pytest.mark.parametrize("freeze", ["embed", "hidden"])
def test_a_run_with_a_tied_head_resumes(freeze):
    model, tokens = Head(), torch.randint(9, (4, 5))
    getattr(model, freeze).weight.requires_grad_(False)
    optimizer = RNGD(model)
    learn(model, optimizer, tokens)
    twin, copied = copy.deepcopy((model, optimizer))
    again = copy.deepcopy(model)
    resumed = RNGD(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, copied), (again, resumed)):
        learn(each, its, tokens)
    for mine, theirs, loaded in zip(model.parameters(), twin.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, loaded)


def test_a_run_with_a_tied_weight_resumes():
    tokens = torch.randint(9, (4, 5))
    torch.manual_seed(0)
    model = Tied(TIES["linear"])
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning):
        learn(model, optimizer, tokens)
    twin = copy.deepcopy(model)
    other = RNGD(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(model, optimizer, tokens)
    with pytest.warns(TiedWarning):
        learn(twin, other, tokens)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_copy_of_a_model_with_a_tied_weight_learns_alike():
    torch.manual_seed(0)
    model, tokens = Tied(TIES["linear"]), torch.randint(9, (4, 5))
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning):
        learn(model, optimizer, tokens)
    twin, other = copy.deepcopy((model, optimizer))
    learn(model, optimizer, tokens)
    learn(twin, other, tokens)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_preconditioner_leaves_the_gradient_of_a_tied_weight():
    model = Tied(TIES["linear"])
    preconditioner = Preconditioner(model)
    with pytest.warns(TiedWarning):
        model(torch.randint(9, (4, 5))).square().mean().backward()
    before = [model.embed.weight.grad.clone(), model.hidden.weight.grad.clone()]
    preconditioner.step()
    assert torch.equal(model.embed.weight.grad, before[0])
    assert not torch.equal(model.hidden.weight.grad, before[1])


def test_looking_at_a_weight_ties_nothing():
    """Penalties, copies, casts and detached uses in the model's own code are no samples of the weight."""

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            weight = self.first.weight
            h = torch.tanh(self.first(x.to(weight.dtype)))
            frozen = nn.functional.linear(x, weight.detach()).mean()
            flat = torch.cat([weight.flatten(), self.second.weight.t().reshape(-1)])
            with torch.no_grad():
                weight.clamp_(-10, 10)
            return self.second(h) + 1e-3 * (weight.pow(2).sum() + flat.abs().sum() + frozen + weight.norm(dim=0).max())

    model = Penalised().double()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    assert all(layer.structure is not None for layer in optimizer._place)
    assert not any(layer.refused for layer in optimizer._place)


def test_a_gradient_of_zeros_does_not_say_what_scores_the_outputs():
    model, twin = network(), network()
    optimizer, other = RNGD(model), RNGD(twin)
    (0 * nn.functional.cross_entropy(model(inputs()), torch.arange(16) % 3)).backward()
    optimizer.step()
    head = list(optimizer._place)[-1]
    assert head.is_head is None
    for each, watcher in ((model, optimizer), (twin, other)):
        watcher.zero_grad()
        nn.functional.cross_entropy(each(inputs()), torch.arange(16) % 3).backward()
        watcher.step()
    assert head.is_head is True
    assert vars(head.structure) == vars(list(other._place)[-1].structure)


def test_a_layer_without_statistics_gets_them_at_once():
    """One that is unfrozen, and one that is added, between two updates of the metric."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = RNGD(model, stats_interval=10, early_refreshes=(0,))
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    model[0].requires_grad_(True)
    model.append(nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": model[5].parameters()})
    masses = []
    for seed in range(3, 23):
        step(model, optimizer, inputs(seed))
        masses.append([float(optimizer.state[model[place].weight]["mass"]) for place in (0, 2, 5)])
    assert masses[0][0] > 0
    assert masses[0][2] > 0
    updates = [len(set(of_layer)) for of_layer in zip(*masses, strict=True)]
    assert updates == [3, 3, 3]  # at once, or in turn before it was counted, and then no more often than others
    weight = model[0].weight
    state = optimizer.state[weight]
    assert not torch.equal(state["inverse"], torch.eye(7, dtype=torch.float64).expand_as(state["inverse"]))


def test_statistics_that_were_saved_are_not_due_at_once():
    model = network()
    optimizer = RNGD(model, early_refreshes=(0,))
    step(model, optimizer, inputs())
    twin = copy.deepcopy(model)
    other = RNGD(twin, early_refreshes=(0,))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first, second = copy.deepcopy((model, optimizer))
    for each, watcher in ((model, optimizer), (twin, other), (first, second)):
        step(each, watcher, inputs(1))
    for mine, loaded, copied in zip(model.parameters(), twin.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, loaded)
        assert torch.equal(mine, copied)


def test_hooks_that_return_the_same_values_hide_no_activation():
    model = network()
    seen = []
    model[0].register_forward_hook(lambda _module, _args, output: output * 1)
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output.norm()))
    model[2].register_full_backward_hook(lambda *_: None)
    optimizer = RNGD(model)
    step(model, optimizer, inputs().requires_grad_())
    assert [layer.response for layer in optimizer._place][:2] == [TanhBernoulli(), TanhBernoulli()]
    assert next(row.response for row in plan(model, inputs())) == TanhBernoulli()


def test_hooks_that_return_other_values_are_named():
    model = network()
    model[0].register_forward_hook(lambda _module, _args, output: output * 2)
    optimizer = RNGD(model)
    with pytest.warns(ResponseWarning, match="0 feeds a forward hook"):
        step(model, optimizer, inputs())
    assert [layer.response for layer in optimizer._place][:2] == [LinearGaussian(), TanhBernoulli()]


def test_a_hook_that_works_in_place_is_the_activation_that_it_is():
    model = network(nn.Identity)
    model[0].register_forward_hook(lambda _module, _args, output: output.relu_())
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    assert next(iter(responses(optimizer).values())) == ReLUGaussian()
