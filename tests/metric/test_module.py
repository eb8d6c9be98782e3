"""Metrics of layers inside models, against the closed form on what the layer saw; the model is left as it was."""

import pytest
import torch
from builders import Code, inputs, is_hooked
from cases import assert_close
from torch import Tensor, nn
from torch.nn import functional

from relfisher import layer_metric, module_metric, relative_fisher
from relfisher.responses import (
    ActivationGaussian,
    Categorical,
    LinearGaussian,
    ReLUGaussian,
    Response,
    TanhBernoulli,
)


def test_layers_of_a_sequential_model_see_their_own_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)).double()
    x = inputs(n=6, width=3)
    for name, response in {"0": TanhBernoulli(), "2": ReLUGaussian(), "4": LinearGaussian()}.items():
        layer = model[int(name)]
        seen = model[: int(name)](x).detach()
        bias = None if layer.bias is None else layer.bias.detach()
        expected = layer_metric(seen, layer.weight.detach(), bias, response)
        assert_close(module_metric(model, name, x).to_dense(), expected.to_dense())


def test_a_stated_response_is_used() -> None:
    model, x = Code(torch.tanh), inputs(n=5, width=3)
    seen = torch.tanh(model.fc(x)).detach()
    expected = layer_metric(seen, model.head.weight.detach(), model.head.bias.detach(), Categorical())
    assert_close(module_metric(model, "head", x, Categorical()).to_dense(), expected.to_dense())


def test_a_model_that_is_one_layer() -> None:
    layer, x = nn.Linear(3, 2, dtype=torch.float64), inputs(n=5, width=3)
    expected = layer_metric(x, layer.weight.detach(), layer.bias.detach(), LinearGaussian())
    assert_close(module_metric(layer, "", x).to_dense(), expected.to_dense())


def test_the_metric_of_an_embedding_is_the_frequency_of_each_token() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 3)).double()
    metric = module_metric(model, "0", torch.tensor([[0, 1, 1], [3, 1, 0]]))
    frequencies = torch.tensor([2, 3, 0, 1], dtype=torch.float64) / 6
    assert_close(metric.to_dense(), torch.diag(frequencies.repeat(2)))


def test_positions_of_sequences_are_samples() -> None:
    model, x = Code(torch.tanh), inputs(n=20, width=3).view(4, 5, 3)
    metric = module_metric(model, "fc", x)
    assert metric.samples == 20
    assert_close(metric.to_dense(), module_metric(model, "fc", x.reshape(20, 3)).to_dense())


class Repeated(nn.Module):
    """One layer called over and over, with the activation of each call."""

    def __init__(self, *activations) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.cell, self.activations = nn.Linear(3, 3, dtype=torch.float64), activations

    def forward(self, x: Tensor) -> Tensor:
        for activation in self.activations:
            x = activation(self.cell(x))
        return x


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ((torch.tanh, torch.tanh), (TanhBernoulli(), TanhBernoulli())),
        ((functional.gelu, functional.gelu), (ActivationGaussian(functional.gelu),) * 2),
        ((functional.gelu, torch.tanh), (ActivationGaussian(functional.gelu), TanhBernoulli())),
        ((torch.tanh, lambda z: z), (TanhBernoulli(), LinearGaussian())),
    ],
    ids=["tanh", "gelu", "two kinds", "tanh and linear"],
)
def test_repeated_calls_are_samples_with_a_response_each(activations, expected: tuple[Response, Response]) -> None:
    model, x = Repeated(*activations), inputs(n=4, width=3)
    second = activations[0](model.cell(x)).detach()
    weight, bias = model.cell.weight.detach(), model.cell.bias.detach()
    calls = zip((x, second), expected, strict=True)
    dense = torch.stack([layer_metric(seen, weight, bias, said).to_dense() for seen, said in calls]).mean(0)
    metric = module_metric(model, "cell", x)
    assert metric.samples == 8
    assert_close(metric.to_dense(), dense)
    assert_close(metric @ torch.eye(12).double(), dense)
    assert_close(metric.diagonal(), dense.diagonal())


def test_a_stated_response_holds_for_all_calls() -> None:
    model, x = Repeated(functional.gelu, torch.tanh), inputs(n=4, width=3)
    seen = torch.cat([x, functional.gelu(model.cell(x)).detach()])
    expected = layer_metric(seen, model.cell.weight.detach(), model.cell.bias.detach(), Categorical())
    assert_close(module_metric(model, "cell", x, Categorical()).to_dense(), expected.to_dense())


def test_repeated_calls_of_groups_have_a_response_each() -> None:
    model = Repeated(torch.tanh, torch.relu)
    model.cell = nn.Conv1d(4, 4, 1, groups=2, dtype=torch.float64)
    x = inputs(n=5, width=4).unsqueeze(2)
    second = torch.tanh(model.cell(x)).detach()
    metric = module_metric(model, "cell", x).to_dense()
    for group in range(2):
        part = slice(2 * group, 2 * group + 2)
        weight, bias = model.cell.weight.detach()[part].squeeze(2), model.cell.bias.detach()[part]
        blocks = [
            layer_metric(seen[:, part].squeeze(2), weight, bias, said).to_dense()
            for seen, said in ((x, TanhBernoulli()), (second, ReLUGaussian()))
        ]
        assert_close(metric[6 * group : 6 * group + 6, 6 * group : 6 * group + 6], (blocks[0] + blocks[1]) / 2)


def test_inputs_of_later_calls_are_given() -> None:
    """The metric through both calls is another one: its Jacobian has the dependence of the second input."""
    model, x = Repeated(torch.tanh, torch.tanh), inputs(n=4, width=3)
    names = {key: value.detach() for key, value in model.named_parameters()}

    def unrolled(parameters: dict[str, Tensor]) -> Tensor:
        weight, bias = parameters["cell.weight"], parameters["cell.bias"]
        first = x @ weight.T + bias
        return torch.cat([first, torch.tanh(first) @ weight.T + bias])

    through = relative_fisher(unrolled, names, TanhBernoulli()).to_dense()
    order = torch.cat([torch.arange(9).reshape(3, 3), torch.arange(9, 12).reshape(3, 1)], dim=1).reshape(-1)
    given_inputs = module_metric(model, "cell", x).to_dense()
    assert (through[order][:, order] - given_inputs).norm() > 0.05 * given_inputs.norm()


def test_inputs_that_are_overwritten_later_are_kept() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1
            out = self.fc(h)
            h.zero_()
            return out + h

    model, x = Overwriting(), inputs(n=4, width=3)
    expected = layer_metric(x, model.fc.weight.detach(), model.fc.bias.detach(), LinearGaussian())
    assert_close(module_metric(model, "fc", x).to_dense(), expected.to_dense())


def test_several_arguments_and_keyword_calls() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return torch.tanh(self.fc(input=scale * x))

    model, x = Two(), inputs(n=4, width=3)
    expected = layer_metric(2 * x, model.fc.weight.detach(), model.fc.bias.detach(), TanhBernoulli())
    assert_close(module_metric(model, "fc", (x, 2.0)).to_dense(), expected.to_dense())


def training_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    model.train()
    model[1].eval()
    return model


def test_the_model_is_left_as_it_was() -> None:
    model, x = training_model(), inputs(n=6, width=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first, second = (module_metric(model, "4", x).to_dense() for _ in range(2))
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not is_hooked(model)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = training_model()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        module_metric(model, "4", inputs(n=6, width=5))
    assert [module.training for module in model.modules()] == modes
    assert not is_hooked(model)


def test_metric_works_where_gradients_are_off() -> None:
    model, x = Code(torch.tanh), inputs(n=5, width=3)
    with torch.no_grad():
        found = module_metric(model, "fc", x)
    assert not found.to_dense().requires_grad
    assert_close(found.to_dense(), module_metric(model, "fc", x).to_dense())


def test_an_unknown_name_is_met_with_near_misses() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer2": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"such as 'encoder.layer[12]', 'encoder.layer[12]'.*got 'encoder.layer'"):
        module_metric(model, "encoder.layer", inputs(n=2, width=2))
    with pytest.raises(ValueError, match=r"such as 'fc', 'head'.*got 'zzzzzz'"):
        module_metric(Code(torch.tanh), "zzzzzz", inputs(n=2, width=3))


def test_a_layer_that_the_forward_pass_misses() -> None:
    model = Code(torch.tanh)
    model.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="the forward pass did not reach 'spare'"):
        module_metric(model, "spare", inputs(n=2, width=3))


def test_only_layers_with_parameters_have_a_metric() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with pytest.raises(TypeError, match=r"must be that of a layer with a metric, but '1' is a Tanh"):
        module_metric(model, "1", inputs(n=2, width=3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_must_be_finite(bad: float) -> None:
    x = inputs(n=4, width=3)
    x[1, 1] = bad
    with pytest.raises(ValueError, match=r"the input of 'fc' must be finite, got 1 NaN or infinite values of 16"):
        module_metric(Code(torch.tanh), "fc", x)


def test_inputs_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match=r"the input of 'fc' must not be empty, got shape \(0, 4\)"):
        module_metric(Code(torch.tanh), "fc", inputs(n=0, width=3))


def test_single_precision_models() -> None:
    model, x = Code(torch.tanh), inputs(n=5, width=3)
    exact = module_metric(model, "fc", x).to_dense()
    single = module_metric(model.float(), "fc", x.float())
    assert single.dtype == torch.float32
    assert_close(single.to_dense().double(), exact, 1e-5)


def test_layers_of_wrapped_models_go_by_both_names():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    inner = nn.ModuleDict({"body": torch.compile(model, backend="eager")})
    inner.forward = lambda x: inner["body"](x)
    expected = module_metric(model, "2", x).to_dense()
    for wrapped, name in ((compiled, "2"), (compiled, "_orig_mod.2"), (inner, "body.2"), (inner, "body._orig_mod.2")):
        assert_close(module_metric(wrapped, name, x).to_dense(), expected)
