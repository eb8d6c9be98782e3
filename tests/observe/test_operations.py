"""Parameters that modules with forward passes of their own give to functions of torch have the metrics of layers."""

import copy
import operator
import threading

import pytest
import torch
from builders import assert_close_weights, assert_same_weights, inputs, mlp
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, linear
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import relfisher
from relfisher import RNGD, MetricOptions, layer_metric
from relfisher.observe import UncoveredWarning
from relfisher.responses import LinearGaussian, TanhBernoulli


class OwnForward(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Keywords(nn.Linear):
    def forward(self, x):
        return linear(input=x, bias=self.bias, weight=self.weight)


class OwnClass(nn.Module):
    """Not torch's at all, with the activation inside."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.tanh(linear(x, self.weight, self.bias))


class Bare(nn.Module):
    """Parameters of the model itself."""

    def __init__(self):
        super().__init__()
        self.weight_in, self.bias_in = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(5))
        self.weight_out, self.bias_out = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return linear(torch.tanh(linear(x, self.weight_in, self.bias_in)), self.weight_out, self.bias_out)


class Kept(nn.Module):
    """Parameters in a dictionary, and in a list."""

    def __init__(self):
        super().__init__()
        self.first = nn.ParameterDict({"weight": torch.zeros(5, 6)})
        self.first["bias"] = torch.zeros(5)
        self.weights, self.biases = nn.ParameterList([torch.zeros(3, 5)]), nn.ParameterList([torch.zeros(3)])

    def forward(self, x):
        h = torch.tanh(linear(x, self.first["weight"], self.first["bias"]))
        return linear(h, self.weights[0], self.biases[0])


def with_weights_of(model, other):
    """Give a model of float64 the weights of another one, in order."""
    model = model.double()
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(its)
    return model


def trained(model, steps=30, call=None, **options):
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=2, refresh_interval=8, stagger=False), **options)
    for seed in range(steps):
        optimizer.zero_grad()
        cross_entropy((call or model)(inputs(seed)), torch.arange(len(inputs())) % 3).backward()
        optimizer.step()
    return optimizer


@pytest.mark.supports("a weight that a module of any class passes to `linear`", "Linear")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(OwnForward(6, 5), nn.Tanh(), Keywords(5, 3)),
        lambda: nn.Sequential(OwnClass(6, 5), nn.Linear(5, 3)),
        Bare,
        Kept,
    ],
    ids=["own forward", "own class", "bare", "kept"],
)
def test_steps_are_those_of_linear_layers(make):
    plain = mlp(sizes=(6, 5, 3))
    model = with_weights_of(make(), plain)
    trained(plain)
    optimizer = trained(model)
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, its)
    first, last = (layer.role for layer in optimizer.layers)
    assert (first.response, first.reads_input) == (TanhBernoulli(), True)
    assert (last.response, last.is_head) == (LinearGaussian(), True)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(functional.pad(x, (self.kernel_size[0] - 1, 0)))


class Same(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight, self.bias, 1, "same", self.dilation, groups=self.groups)


class Strided(nn.Conv3d):
    def forward(self, x):
        return functional.conv3d(x, self.weight, stride=2, padding=(1, 0, 1))


class Cropped(nn.ConvTranspose1d):
    def forward(self, x):
        return super().forward(x)[..., :-1]


class Up(nn.ConvTranspose2d):
    def forward(self, x):
        return functional.conv_transpose2d(x, self.weight, self.bias, (2, 1), 1, dilation=2, groups=2)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return functional.layer_norm(x.mT, self.normalized_shape, self.weight, self.bias, self.eps).mT


class RootNorm(nn.RMSNorm):
    def forward(self, x):
        return functional.rms_norm(x, self.normalized_shape, weight=self.weight, eps=self.eps)


class GroupNormAct(nn.GroupNorm):
    def forward(self, x):
        return torch.tanh(functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class BatchNormAct(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Crop(nn.Module):
    def forward(self, x):
        return x[..., :-1]


class Turn(nn.Module):
    def forward(self, x):
        return x.mT


TWINS = {
    "a causal convolution": (Causal(2, 4, 3), nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(2, 4, 3)), (2, 9)),
    "a convolution of the same size": (
        Same(2, 4, (2, 3), dilation=2, groups=2),
        nn.Conv2d(2, 4, (2, 3), dilation=2, groups=2, padding="same"),
        (2, 4, 5),
    ),
    "a convolution with a stride": (
        Strided(2, 3, 2, bias=False),
        nn.Conv3d(2, 3, 2, stride=2, padding=(1, 0, 1), bias=False),
        (2, 3, 4, 3),
    ),
    "a transposed convolution that is cropped": (
        Cropped(2, 3, 4, stride=2, padding=1),
        nn.Sequential(nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), Crop()),
        (2, 4),
    ),
    "a transposed convolution": (
        Up(4, 2, 2, groups=2),
        nn.ConvTranspose2d(4, 2, 2, (2, 1), 1, dilation=2, groups=2),
        (4, 3, 3),
    ),
    "a norm of channels": (ChannelNorm(3), nn.Sequential(Turn(), nn.LayerNorm(3), Turn()), (3, 5)),
    "a root mean square": (RootNorm(5), nn.RMSNorm(5), (3, 5)),
    "a norm of groups, and tanh": (GroupNormAct(2, 4), nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh()), (4, 3)),
    "a norm of batches, and ReLU": (BatchNormAct(3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (3, 2, 2)),
}


@pytest.mark.supports(
    "parameters that a subclass with a forward pass of its own gives to the function of its base",
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d"),
    *("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm2d"),
)
@pytest.mark.parametrize("name", TWINS)
def test_steps_are_those_of_the_base(name):
    own, plain, shape = copy.deepcopy(TWINS[name])
    torch.manual_seed(0)
    models = []
    for part in (plain, own):
        head = nn.LazyLinear(3)
        models.append(nn.Sequential(part, nn.Flatten(), head).double())
        models[-1](torch.randn(8, *shape, dtype=torch.float64))
    models[1] = with_weights_of(models[1], models[0])
    optimizers = []
    for model in models:
        optimizer = RNGD(model, metric=MetricOptions(stats_interval=2, refresh_interval=4, stagger=False))
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            x = torch.randn(8, *shape, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(x), torch.arange(8) % 3).backward()
            optimizer.step()
        optimizers.append(optimizer)
    assert_same_weights(*models)
    first, second = ([layer.role.response for layer in optimizer.layers] for optimizer in optimizers)
    assert first == second
    assert {each.by for each in relfisher.coverage(models[1], x)} == {"metric"}


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.table = nn.Parameter(torch.randn(3, 6) / 3), nn.Parameter(torch.randn(4, 6))
        self.double()

    def forward(self, x):
        return linear(x + self.table.softmax(0)[0], self.weight)


def test_what_goes_elsewhere_is_said_once_and_trained_by_adamw():
    model = Partly()
    before = model.table.detach().clone()
    with pytest.warns(
        UncoveredWarning, match="table, its module does not look up its rows, multiply inputs by"
    ) as said:
        optimizer = trained(model, 3)
    assert len(said) == 1
    assert [layer.role.refused is None for layer in optimizer.layers] == [True, False]
    assert not torch.equal(model.table[0], before[0])
    assert optimizer.state[model.table].keys() >= {"exp_avg", "exp_avg_sq"}


class Product(nn.Module):
    """A matrix [in, out] or [out, in] and a bias, multiplied by a function."""

    def __init__(self, function, inputs, outputs, *, turned):
        super().__init__()
        self.function, self.turned = function, turned
        self.W = nn.Parameter(torch.zeros((inputs, outputs) if turned else (outputs, inputs)))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return self.function(x, self.W, self.b)

    def take(self, other):
        with torch.no_grad():
            self.W.copy_(other.weight.t() if self.turned else other.weight)
            self.b.copy_(other.bias)


PRODUCTS = {
    "x @ W + b": (lambda x, weight, bias: x @ weight + bias, True),
    "b + x @ W": (lambda x, weight, bias: bias + x @ weight, True),
    "x.matmul(W), and b in place": (lambda x, weight, bias: x.matmul(weight).add_(bias), True),
    "x @ W' + b": (lambda x, weight, bias: x @ weight.t() + bias, False),
    "x @ W.T + b": (lambda x, weight, bias: torch.add(x @ weight.T, bias), False),
    "mm, += b": (lambda x, weight, bias: operator.iadd(torch.mm(x, weight), bias), True),
    "linear with W', b": (lambda x, weight, bias: linear(x, weight.transpose(0, 1), bias), True),
    "linear, + b": (lambda x, weight, bias: linear(x, weight) + bias, False),
    "addmm": (lambda x, weight, bias: torch.addmm(bias, x, weight), True),
    "addmm with W'": (lambda x, weight, bias: torch.addmm(bias, x, weight.mT), False),
    "einsum, turned": (lambda x, weight, bias: torch.einsum("ni,io->no", x, weight) + bias, True),
    "einsum": (lambda x, weight, bias: torch.einsum("oi, ...i -> ...o", weight, x) + bias, False),
}


@pytest.mark.supports("a matrix by which a module of any class multiplies: `@`, `matmul`, `addmm`, `einsum`", "Linear")
@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("square", [False, True])
def test_products_take_the_steps_of_linear_layers(way, square):
    function, turned = PRODUCTS[way]
    width = 6 if square else 5
    plain = mlp(sizes=(6, width, 3))
    first, last = Product(function, 6, width, turned=turned), Product(function, width, 3, turned=turned)
    model = nn.Sequential(first, nn.Tanh(), last).double()
    first.take(plain[0])
    last.take(plain[2])
    trained(plain)
    optimizer = trained(model)
    for mine, its in zip((first, last), (plain[0], plain[2]), strict=True):
        assert_close(mine.W.t() if turned else mine.W, its.weight)
        assert_close(mine.b, its.bias)
    roles = [layer.role for layer in optimizer.layers]
    assert [(role.response, role.reads_input) for role in roles] == [(TanhBernoulli(), True), (LinearGaussian(), False)]
    assert roles[1].is_head
    assert {each.by for each in relfisher.coverage(model, inputs())} == {"metric"}


def test_products_of_positions_are_samples():
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    plain = mlp(sizes=(6, 3))
    model = Product(lambda x, weight, bias: torch.tanh(x @ weight + bias), 6, 3, turned=True).double()
    model.take(plain[0])
    twin = nn.Sequential(plain[0], nn.Tanh())
    optimizers = RNGD(model), RNGD(twin)
    for module, optimizer in zip((model, twin), optimizers, strict=True):
        module(x).square().sum().backward()
        optimizer.step()
    assert_close(model.W.t(), plain[0].weight)
    assert_close(*(optimizer.metric(name).eigvalsh() for optimizer, name in zip(optimizers, ("W", "0"), strict=True)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight, bias: x @ weight @ weight.t() + bias,
        lambda x, weight, bias: x @ weight + bias + x @ weight,
        lambda x, weight, bias: (weight @ x.t()).t() + bias,
        lambda x, weight, bias: torch.einsum("ni,io->ni", x, weight) + bias,
        lambda x, weight, bias: torch.einsum("ni,io->n", x, weight)[:, None] + bias,
        lambda x, weight, bias: torch.addmm(bias, x, weight, beta=2),
    ],
)
def test_other_products_are_left_to_adamw(function):
    model = nn.Sequential(Product(function, 6, 6, turned=True), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.warns(UncoveredWarning, match="multiply inputs by it or add it to them, or not always in the same way"):
        optimizer = trained(model, 2)
    assert optimizer.state[model[0].W].keys() >= {"exp_avg", "exp_avg_sq"}


def test_a_product_goes_on_from_a_state_that_is_loaded_before_it_runs():
    def made():
        torch.manual_seed(0)
        function, _ = PRODUCTS["x @ W + b"]
        model = nn.Sequential(Product(function, 6, 4, turned=True), nn.Tanh(), nn.Linear(4, 3)).double()
        nn.init.normal_(model[0].W)
        return model

    model = made()
    optimizer = trained(model, 5)
    twin = made()
    twin.load_state_dict(model.state_dict())
    resumed = RNGD(twin, metric=MetricOptions(stats_interval=2, refresh_interval=8, stagger=False))
    before = resumed.state_dict()
    resumed.load_state_dict(optimizer.state_dict())
    for module, each in ((model, optimizer), (twin, resumed)):
        for seed in range(5, 12):
            each.zero_grad()
            cross_entropy(module(inputs(seed)), torch.arange(len(inputs())) % 3).backward()
            each.step()
    assert_same_weights(model, twin)
    RNGD(made()).load_state_dict(before)


class Experts(nn.Module):
    """Three matrices and biases, multiplied by a function, before tanh."""

    def __init__(self, function, *, turned, bias):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weight = nn.Parameter(torch.randn((3, 4, 5) if turned else (3, 5, 4)))
        self.bias = nn.Parameter(torch.randn((3, 5) if bias == "rows" else (3, 1, 5))) if bias else None
        self.double()

    def forward(self, x):
        return torch.tanh(self.function(x, self.weight, self.bias))

    def matrices(self, *, turned):
        return self.weight.mT if turned else self.weight


STACKS = {
    "bmm": (lambda x, weight, _: torch.bmm(x, weight), True, None, "eni"),
    "@": (lambda x, weight, bias: x @ weight + bias, True, "one", "eni"),
    "@ with W'": (lambda x, weight, bias: x @ weight.transpose(1, 2) + bias, False, "one", "eni"),
    "baddbmm": (lambda x, weight, bias: torch.baddbmm(bias, x, weight), True, "one", "eni"),
    "baddbmm with rows": (lambda x, weight, bias: torch.baddbmm(bias.unsqueeze(1), x, weight), True, "rows", "eni"),
    "several batches": (lambda x, weight, bias: x @ weight + bias[:, None], True, "rows", "beni"),
    "the same inputs": (lambda x, weight, bias: x[:, None] @ weight + bias, True, "one", "bni"),
    "einsum": (lambda x, weight, bias: torch.einsum("bei,eio->beo", x, weight) + bias, True, "rows", "nei"),
    "einsum, turned": (
        lambda x, weight, bias: torch.einsum("eoi,...ei->...eo", weight, x) + bias,
        False,
        "rows",
        "nei",
    ),
    "einsum, stack first": (lambda x, weight, _: torch.einsum("bei,eio->ebo", x, weight), True, None, "nei"),
    "einsum, the same inputs": (lambda x, weight, _: torch.einsum("bni,eio->bneo", x, weight), True, None, "bni"),
}


def of_experts(way):
    function, turned, bias, letters = STACKS[way]
    model = nn.Sequential(Experts(function, turned=turned, bias=bias))
    sizes = {"e": 3, "n": 7, "i": 4, "b": 2}
    x = torch.randn([sizes[letter] for letter in letters], dtype=torch.float64)
    rows = torch.einsum(f"{letters}->{'e' * ('e' in letters)}{letters.replace('e', '')}", x).reshape(
        3 if "e" in letters else 1, -1, 4
    )
    return model, x, rows.expand(3, -1, -1), turned


@pytest.mark.supports("a stack of matrices by which a module multiplies: `bmm`, `baddbmm`, `@`, `einsum`", "Linear")
@pytest.mark.parametrize("way", STACKS)
def test_a_stack_of_matrices_has_the_metric_of_each(way):
    model, x, rows, turned = of_experts(way)
    optimizer = RNGD(model, metric=MetricOptions(structure="neuron"))
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    weights = model[0].matrices(turned=turned).detach().clone()
    biases = None if model[0].bias is None else model[0].bias.detach().clone().view(3, 5)
    model(x).square().sum().backward()
    optimizer.step()
    (layer,) = optimizer.layers
    assert (layer.role.response, layer.role.reads_input, layer.role.refused) == (TanhBernoulli(), True, None)
    expected = [
        layer_metric(rows[place], weights[place], None if biases is None else biases[place], TanhBernoulli()).to_dense()
        for place in range(3)
    ]
    assert_close(optimizer.metric("0").to_dense(), torch.block_diag(*expected))
    assert all(not torch.equal(each, before[name]) for name, each in model.named_parameters())
    assert not any("exp_avg" in state for state in optimizer.state.values())
    assert {each.by for each in relfisher.coverage(model, x)} == {"metric"}


def test_a_bias_along_another_axis_is_a_shift():
    """With as many samples as experts, [experts, units] could be added to [experts, samples, units]."""
    model = nn.Sequential(Experts(lambda x, weight, bias: x @ weight + bias, turned=True, bias="rows"))
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    optimizer = RNGD(model)
    model(x).square().sum().backward()
    optimizer.step()
    assert optimizer.metric("0").parameter_shape == (3, 5, 4)
    assert optimizer.metric("0.bias").parameter_shape == (15, 1, 1)


class Policy(nn.Module):
    """A program calls a head of it by itself, before it calls all of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.value = nn.Linear(6, 5), OwnForward(5, 3), OwnForward(5, 1)
        self.double()

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h)


@pytest.mark.filterwarnings("ignore:linear response for some layers:UserWarning")
def test_an_operation_outside_the_forward_pass_is_one_as_well():
    model = Policy()
    optimizer = RNGD(model)
    x = inputs()
    (model.value(x[:, :5]).square().sum() + model(x).square().sum()).backward()
    optimizer.step()
    assert all(layer.role.refused is None and layer.structure is not None for layer in optimizer.layers)


def test_coverage_says_what_training_does():
    by = {each.name: each.by for each in relfisher.coverage(Partly(), inputs())}
    assert by == {"weight": "metric", "table": "adamw"}


def test_a_bias_that_is_added_elsewhere_has_a_metric_of_its_own():
    class Elsewhere(OwnForward):
        def forward(self, x):
            return 2 * linear(x, self.weight) + self.bias

    model = nn.Sequential(Elsewhere(6, 3)).double()
    optimizer = trained(model, 2)
    assert optimizer.layers[0].role.refused is None
    assert optimizer._curvature.metric("0").shape == (18, 18)
    assert not any("exp_avg" in state for state in optimizer.state.values())
    assert {each.by for each in relfisher.coverage(model, inputs())} == {"metric"}


def test_recomputed_passes_and_those_for_evaluation_do_not_count():
    class Pair(nn.Module):
        def __init__(self, again):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = OwnForward(6, 5), OwnForward(5, 3)
            self.again = again
            self.double()

        def forward(self, x):
            h = checkpoint(self.first, x, use_reentrant=False) if self.again else self.first(x)
            return self.second(torch.tanh(h))

    def with_others(x):
        with torch.no_grad():
            twin(100 * x)
        return twin(x)

    model, twin = Pair(again=False), Pair(again=True)
    trained(model, 6)
    trained(twin, 6, call=with_others)
    assert_same_weights(model, twin)


def test_errors_inside_a_module_end_the_watch():
    class Failing(OwnForward):
        fails = True

        def forward(self, x):
            if self.fails:
                raise RuntimeError("not yet")
            return super().forward(x)

    model = nn.Sequential(Failing(6, 3)).double()
    optimizer = RNGD(model)
    with pytest.raises(RuntimeError, match="not yet"):
        model(inputs())
    assert not torch.overrides._get_current_function_mode_stack()
    model[0].fails = False
    model(inputs()).sum().backward()
    optimizer.step()
    assert optimizer.layers[0].structure is not None


def test_threads_watch_their_own_operations():
    model = nn.Sequential(OwnForward(6, 5), nn.Tanh(), OwnForward(5, 3)).double()
    twin = copy.deepcopy(model)
    trained(model, 4)
    errors = []

    def train():
        try:
            trained(twin, 4)
        except Exception as error:  # what the test looks for
            errors.append(error)

    worker = threading.Thread(target=train)
    worker.start()
    worker.join()
    assert not errors
    assert_same_weights(model, twin)


class Positions(nn.Embedding):
    """A table of positions as model libraries write it: with two rows in front."""

    def forward(self, x):
        return super().forward(torch.arange(2, 2 + x.shape[1]).expand(x.shape))


class Tokens(nn.Module):
    def __init__(self, positions):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.position, self.head = nn.Embedding(7, 4), positions, nn.Linear(4, 7)
        nn.init.ones_(self.position.weight)

    def forward(self, x):
        at = x if isinstance(self.position, Positions) else torch.arange(2, 2 + x.shape[1]).expand(x.shape)
        return self.head(torch.tanh(self.token(x) + self.position(at)))


def test_tables_of_embeddings_with_a_forward_of_their_own_are_those_of_embeddings():
    x = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(0))
    models = [Tokens(kind(9, 4)) for kind in (Positions, nn.Embedding)]
    for model in models:
        optimizer = RNGD(model)
        for _ in range(20):
            optimizer.zero_grad()
            cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()
        assert {layer.name for layer in optimizer.layers} == {"token", "position", "head"}
    assert_same_weights(*models)


def compiled_later(model):
    optimizer = RNGD(model)
    return torch.compile(model, backend="eager"), optimizer


def compiled_before(model):
    compiled = torch.compile(model, backend="eager")
    return compiled, RNGD(compiled)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model, RNGD(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
@pytest.mark.parametrize("compiling", [compiled_later, compiled_before, compiled_in_place])
def test_compiled_models_take_the_same_steps(compiling):
    torch.manual_seed(0)
    model = nn.Sequential(OwnForward(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(model)
    for call, optimizer in ((model, RNGD(model)), compiling(twin)):
        for seed in range(25):
            optimizer.zero_grad()
            cross_entropy(call(inputs(seed)), torch.arange(len(inputs())) % 3).backward()
            optimizer.step()
        assert [layer.name for layer in optimizer.layers] == ["0", "2"]
    assert_close_weights(model, twin)


class Codebook(nn.Module):
    """Vectors that are looked up, and scored in the same pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.codes = nn.Parameter(torch.randn(7, 6))
        self.double()

    def forward(self, x):
        scores = x @ self.codes.t()
        return scores + functional.embedding(scores.argmax(1), self.codes).sum(1, keepdim=True)


def test_a_matrix_with_other_uses_is_left_to_adamw():
    with pytest.warns(UncoveredWarning, match="codes, its module does not only look up its rows: use nn.Embedding"):
        optimizer = trained(nn.Sequential(Codebook(), nn.Linear(7, 3).double()), 2)
    assert any("exp_avg" in state for state in optimizer.state.values())


def test_transforms_of_torch_func_pass_by():
    model = Product(lambda x, weight, bias: torch.tanh(x @ weight.t() + bias), 6, 3, turned=False).double()
    RNGD(model)
    x = inputs()
    jacobians = torch.func.vmap(torch.func.jacrev(model))(x)
    assert jacobians.shape == (len(x), 3, 6)


def test_either_operand_of_an_einsum_may_be_the_matrix():
    model = Product(lambda x, weight, bias: torch.einsum("oi,bi->bo", weight, x) + bias, 6, 3, turned=False)
    optimizer = trained(nn.Sequential(model).double(), 2)
    assert optimizer.layers[0].role.refused is None


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6, dtype=torch.float64))

    def forward(self, x, depth=3):
        h = torch.tanh(x @ self.weight)
        return h if depth == 0 else self(h, depth - 1)


def test_calls_of_a_module_by_itself_count_once():
    model, x = Recursive(), inputs()
    rows, h = [], x
    for _ in range(4):
        rows.append(h)
        h = torch.tanh(h).detach()
    optimizer = RNGD(model, metric=MetricOptions(structure="neuron"))
    model(x).square().sum().backward()
    optimizer.step()
    expected = layer_metric(torch.cat(rows), torch.eye(6, dtype=torch.float64), None, TanhBernoulli())
    assert_close(optimizer.metric("").to_dense(), expected.to_dense())


def test_errors_of_users_are_told_as_they_are():
    model = Product(lambda x, weight, bias: x @ weight + bias, 6, 3, turned=True).double()
    optimizer = RNGD(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(9, 7, dtype=torch.float64))
    (model(inputs()) - 1).square().sum().backward()
    optimizer.step()
    assert optimizer.layers[0].structure is not None
    assert len(model._forward_hooks) + len(model._forward_pre_hooks) < 12


def test_frozen_matrices_are_not_watched():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.frozen = nn.Parameter(torch.randn(6, 6), requires_grad=False)
            self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(2, 6))
            self.double()
            self.modes = []

        def forward(self, x):
            self.modes.append(len(torch.overrides._get_current_function_mode_stack()))
            return x @ self.frozen + x @ self.left @ self.right

    model = Adapted()
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=100))
    for _ in range(140):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    assert sum(bool(each) for each in model.modes[-5:]) == 0


@pytest.mark.parametrize("first", [True, False], ids=["a traced pass", "a later pass"])
def test_an_interrupted_pass_leaves_nothing_behind(first):
    class Interrupted(OwnForward):
        at = None

        def forward(self, x):
            if self.at == 0:
                raise KeyboardInterrupt
            self.at = None if self.at is None else self.at - 1
            return super().forward(x)

    model = nn.Sequential(OwnForward(6, 5), nn.Tanh(), Interrupted(5, 3)).double()
    twin = copy.deepcopy(model)
    options = MetricOptions(stats_interval=1)
    optimizers = RNGD(model, metric=options), RNGD(twin, metric=options)
    for step in range(4):
        if step == (0 if first else 2):
            model[2].at = 0
            with pytest.raises(KeyboardInterrupt):
                model(inputs())
            model[2].at = None
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(each(inputs(step)), torch.arange(len(inputs())) % 3).backward()
            optimizer.step()
        assert not torch.overrides._get_current_function_mode_stack()
    assert_same_weights(model, twin)
