"""Recurrent layers: their metrics against steps that are written out and differentiated, module by module."""

import pytest
import torch
from builders import Following, by_name
from hypothesis import given
from hypothesis import strategies as st
from reference import augment
from torch import nn
from torch.func import jacrev
from torch.nn.utils.rnn import pack_sequence

from relfisher import RNGD, MetricOptions, coverage, module_metric
from relfisher.optim.rules import TrustRegion

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def supports(what):
    return pytest.mark.supports(what, "RNN", "LSTM", "GRU")


def run(kind, size, x, h, c, weights, deltas):
    """Take one step as in the textbooks and return the gates' pre-activations and the new state and cell.

    The deltas are added to the input and recurrent weights of all gates.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    said = (w_ih + deltas[0][:, :-1]) @ x + b_ih + deltas[0][:, -1]
    kept = (w_hh + deltas[1][:, :-1]) @ h + b_hh + deltas[1][:, -1]
    if kind == "gru":
        r, update = torch.sigmoid(said[: 2 * size] + kept[: 2 * size]).split(size)
        new = said[2 * size :] + r.detach() * kept[2 * size :]
        z = torch.cat([said[: 2 * size] + kept[: 2 * size], new])
        return z, (1 - update) * torch.tanh(new) + update * h, c
    z = said + kept
    if kind == "lstm":
        i, f, g, o = z.split(size)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return z, torch.sigmoid(o) * torch.tanh(c), c
    return z, torch.tanh(z) if kind == "tanh" else torch.relu(z), c


def nu(kind, size, z):
    """Return the information of each gate about its own pre-activation, written out."""
    if kind == "relu":
        return (z > 0).to(z.dtype)
    sigmoid = torch.sigmoid(z) * (1 - torch.sigmoid(z))
    tanh = 1 - torch.tanh(z) ** 2
    if kind == "tanh":
        return tanh
    place = torch.arange(len(z)) // size
    return torch.where(place == 2, tanh, sigmoid)


def expected(kind, module, x, side, information=nu):
    """Return the metric of a one-layer module's input (0) or recurrent (1) weights from one sequence batch [T, B, in].

    The states before are reference: they are computed without the deltas.
    """
    size = module.hidden_size
    weights = [weight.detach() for weight in module.all_weights[0]]
    if not module.bias:
        weights += [weights[0].new_zeros(len(weights[0]))] * 2
    widths = (weights[0].shape[1] + 1, weights[1].shape[1] + 1)
    zeros = [weights[0].new_zeros(len(weights[0]), width) for width in widths]
    total, count = 0, 0
    for sequence in x.unbind(1):
        h, c = x.new_zeros(size), x.new_zeros(size)
        for each in sequence:

            def gates(delta, each=each, h=h, c=c):
                deltas = [delta if place == side else zero for place, zero in enumerate(zeros)]
                return run(kind, size, each, h, c, weights, deltas)[0]

            jacobian = jacrev(gates)(zeros[side]).flatten(1)
            z, h, c = run(kind, size, each, h, c, weights, zeros)
            total = total + jacobian.T @ torch.diag(information(kind, size, z)) @ jacobian
            count += 1
    metric = total / count
    if not module.bias:
        keep = torch.ones_like(zeros[side], dtype=torch.bool)
        keep[:, -1] = False
        metric = metric[keep.flatten()][:, keep.flatten()]
    return metric


def metrics(module, *args):
    """Return the metric of each subsystem of a call, by its name."""
    model = Following(module, lambda output: output)
    names = [name.removeprefix("weight_") for name, _ in module.named_parameters() if name.startswith("weight_")]
    return {name: module_metric(model, f"layer.{name}", args).to_dense() for name in names}


@supports("metric of input and recurrent weights is that of each step for given inputs and states, to 1e-8")
@kinds
@given(sizes=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 2)), bias=st.booleans())
def test_metrics_are_those_of_each_step_for_given_states(kind, sizes, bias):
    length, n, inputs, size = sizes
    torch.manual_seed(length + 7 * n)
    module = KINDS[kind](inputs, size, bias=bias).double()
    x = torch.randn(length, n, inputs, dtype=torch.float64)
    found = metrics(module, x)
    for side, name in enumerate(("ih_l0", "hh_l0")):
        torch.testing.assert_close(found[name], expected(kind, module, x, side), rtol=1e-8, atol=1e-10)


def ones(side):
    """Return an information by which each gate's metric is x~ x~' alone, which is what the shared block takes."""

    def information(kind, size, z):
        found = torch.ones_like(z)
        if kind == "gru" and side == 1:
            found[2 * size :] /= torch.sigmoid(z[:size]).square()  # the new state sees these weights times r
        return found

    return information


@supports("a step is the dense solve with the RFIM by automatic differentiation, to 1e-8")
@kinds
@pytest.mark.parametrize("structure", ["neuron", "shared"])
def test_a_step_is_the_dense_solve(kind, structure):
    """Of each side by itself: exact blocks with the gates' own information, the shared block with that of 1."""
    torch.manual_seed(0)
    module = KINDS[kind](3, 2).double()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    dense = [expected(kind, module, x, side, nu if structure == "neuron" else ones(side)) for side in (0, 1)]
    before = [weight.detach().clone() for weight in module.all_weights[0]]
    optimizer = RNGD(
        module, 1.0, momentum=0, damping=0.1, step_rule=TrustRegion(None), metric=MetricOptions(structure=structure)
    )
    module(x)[0].square().sum().backward()
    optimizer.step()
    moves = [start - weight.detach() for start, weight in zip(before, module.all_weights[0], strict=True)]
    gradients = [weight.grad for weight in module.all_weights[0]]
    for side, metric in enumerate(dense):
        gradient, move = (
            torch.cat([each[side], each[side + 2].unsqueeze(1)], 1).flatten() for each in (gradients, moves)
        )
        damping = 0.1 * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)
        torch.testing.assert_close(move, torch.linalg.solve(metric + damping, gradient), rtol=1e-8, atol=1e-10)


@supports("batch_first, unbatched, bidirectional, several layers")
@kinds
def test_layouts_directions_and_layers_are_samples_of_the_same_kind(kind):
    """Batch-first, unbatched, reversed and stacked modules against plain ones with the same weights."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    plain = KINDS[kind](2, 3).double()
    first = metrics(plain, x)
    swapped = KINDS[kind](2, 3, batch_first=True).double()
    swapped.load_state_dict(plain.state_dict())
    for name, metric in metrics(swapped, x.transpose(0, 1)).items():
        torch.testing.assert_close(metric, first[name])
    single = metrics(plain, x[:, :1])
    for name, metric in metrics(plain, x[:, 0]).items():
        torch.testing.assert_close(metric, single[name])

    both = KINDS[kind](2, 3, num_layers=2, bidirectional=True).double()
    found = metrics(both, x)
    lower = {reverse: KINDS[kind](2, 3).double() for reverse in ("", "_reverse")}
    outputs = []
    for reverse, module in lower.items():
        flipped = x.flip(0) if reverse else x
        copied = {key: both.state_dict()[f"{key}{reverse}"] for key in module.state_dict()}
        module.load_state_dict(copied)
        for name, metric in metrics(module, flipped).items():
            torch.testing.assert_close(found[f"{name}{reverse}"], metric)
        output = module(flipped)[0]
        outputs.append(output.flip(0) if reverse else output)
    upper = KINDS[kind](6, 3).double()
    upper.load_state_dict({key: both.state_dict()[key.replace("l0", "l1")] for key in upper.state_dict()})
    for name, metric in metrics(upper, torch.cat(outputs, -1)).items():
        torch.testing.assert_close(found[name.replace("l0", "l1")], metric)


@supports("packed sequences")
@kinds
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_their_sequences(kind, reverse):
    """The mean over sequences of different lengths, weighted by length; padding does not count."""
    torch.manual_seed(0)
    module = KINDS[kind](2, 3, num_layers=2, bidirectional=reverse).double()
    sequences = [torch.randn(length, 2, dtype=torch.float64) for length in (2, 4, 3)]
    found = metrics(module, pack_sequence(sequences, enforce_sorted=False))
    each = [metrics(module, sequence[:, None]) for sequence in sequences]
    for name, metric in found.items():
        mean = sum(len(sequence) * one[name] for sequence, one in zip(sequences, each, strict=True)) / 9
        torch.testing.assert_close(metric, mean)


@supports("given initial states")
@kinds
def test_given_initial_states_count(kind):
    torch.manual_seed(0)
    module = KINDS[kind](2, 3).double()
    x = torch.randn(5, 2, 2, dtype=torch.float64)
    _, states = module(x[:2])
    late = metrics(module, x[2:], states)
    rest = metrics(module, x)
    early = metrics(module, x[:2])
    for name, metric in late.items():
        torch.testing.assert_close((2 * early[name] + 3 * metric) / 5, rest[name])


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_dropout_between_layers_is_drawn_once_more(kind):
    """The second layer's inputs in its metric are those that the module itself saw."""
    torch.manual_seed(0)
    module = KINDS[kind](2, 3, num_layers=2, dropout=0.5).double()
    lower, upper = KINDS[kind](2, 3).double(), KINDS[kind](3, 3).double()
    for place, part in enumerate((lower, upper)):
        part.load_state_dict({key: module.state_dict()[key.replace("l0", f"l{place}")] for key in part.state_dict()})
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.manual_seed(1)
    h = nn.functional.dropout(lower(x)[0], 0.5).detach()
    optimizer = RNGD(module, metric=MetricOptions(structure="shared", decay=0.0))
    torch.manual_seed(1)
    output = module(x)[0]
    torch.testing.assert_close(output, upper(h)[0])
    output.square().sum().backward()
    optimizer.step()
    rows = augment(h.flatten(0, 1))
    state = by_name(optimizer)["weight_ih_l1"]
    torch.testing.assert_close(state["metric"] / float(state["ema_weight"]), rows.T @ rows / len(rows))


@supports("RNGD learns, nothing is left to AdamW")
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_learns_and_leaves_nothing_to_adamw(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = KINDS[kind](4, 8, num_layers=2, dropout=0.1), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.body(x)[0])

    torch.manual_seed(0)
    model = Model()
    optimizer = RNGD(model, lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = []
    for seed in range(60):
        tokens = torch.randint(4, (6, 16), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        logits = model(nn.functional.one_hot(tokens, 4).float())
        loss = nn.functional.cross_entropy(logits[1:].flatten(0, 1), tokens[:-1].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert [group["kind"] for group in optimizer.param_groups] == ["metric"]
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # that torch takes a slower way
def test_projections_fall_back():
    rows = coverage(nn.LSTM(2, 4, proj_size=3), torch.randn(5, 2))
    assert {row.by for row in rows} == {"adamw"}
    assert len(list(rows)) == 5


def test_arguments_of_a_call_are_known_by_name():
    torch.manual_seed(0)
    x, states = torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    found = []
    for call in (lambda module: module(x, states), lambda module: module(hx=states, input=x)):
        torch.manual_seed(1)
        module = nn.LSTM(3, 4)
        optimizer = RNGD(module)
        call(module)[0].sum().backward()
        optimizer.step()
        found.append([state["metric"] for state in by_name(optimizer).values() if "metric" in state])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Unrolled(nn.Module):
    """A cell that a program calls once per time step, with a state or, at first, without."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, outputs = None, []
        for each in x.unbind(-2):
            state = self.cell(each) if state is None else self.cell(each, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, -2)


class Sequence(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


@pytest.mark.supports("a cell takes the steps of the layer that it is a step of", "RNNCell", "LSTMCell", "GRUCell")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@kinds
def test_a_cell_takes_the_steps_of_a_layer(kind, bias, batched):
    torch.manual_seed(0)
    models = [
        nn.Sequential(Sequence(KINDS[kind](3, 4, bias=bias, batch_first=True)), nn.Linear(4, 2)).double(),
        nn.Sequential(Unrolled(CELLS[kind](3, 4, bias=bias)), nn.Linear(4, 2)).double(),
    ]
    with torch.no_grad():
        for mine, its in zip(models[1].parameters(), models[0].parameters(), strict=True):
            mine.copy_(its)
    metrics = []
    for model in models:
        metric = MetricOptions(stats_interval=1, refresh_interval=3, stats_samples=None)
        optimizer = RNGD(model, lr=0.1, metric=metric)
        for seed in range(7):
            x = torch.randn(*[5] * batched, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).reshape(-1, 2), torch.arange(6 * 5**batched) % 2).backward()
            optimizer.step()
        assert len(optimizer.layers) == 3
        metrics.append([optimizer.metric(layer.name).to_dense() for layer in optimizer.layers])
    for one, other in zip(*metrics, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
