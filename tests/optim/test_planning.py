"""plan and coverage: what they say before a run is what a run then does."""

import copy
import math
from functools import partial

import pytest
import torch
from builders import FEW, is_hooked, mlp, step, structures, structures_by_weight, taken
from processes import as_first_of, counting, run_together
from scenarios import SCENARIOS, batches, copied, made
from torch import nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.fsdp import fully_shard
from torch.futures import Future
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from relfisher import RNGD, MetricOptions, coverage, plan
from relfisher.optim import HealthWarning
from relfisher.studies.networks import Transformer


class Net(nn.Module):
    """One of many kinds of layers, one of them frozen, one tied, one parametrized, one never reached."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, groups=2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.spare = nn.Linear(3, 3)
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.scale = nn.Parameter(torch.ones(6))
        self.lost = nn.Embedding(11, 6, max_norm=9.0)
        self.head = nn.Linear(6, 11)
        self.twin = nn.Linear(6, 11)
        self.twin.weight = self.head.weight

    def forward(self, tokens):
        h = self.norm(self.conv(self.embed(tokens).mT).mT)
        h = torch.tanh(self.hidden(h + self.attention(h, h, h)[0]))
        h = self.normed(self.frozen(h)) * self.scale + self.lost(tokens[:, :-2])
        return self.head(h) + self.twin(h)


def net():
    torch.manual_seed(0)
    return Net(), torch.randint(11, (4, 9))


BESIDE = ("lead", "exp_avg", "exp_avg_sq")


def train(model, optimizer, x):
    for _ in range(2):
        step(model, optimizer, x)


def test_coverage_says_how_each_parameter_is_trained():
    model, tokens = net()
    found = {row.name: row for row in coverage(model, tokens)}
    assert list(found) == [name for name, _ in model.named_parameters()]
    by = {name: row.by for name, row in found.items()}
    assert {name for name, kind in by.items() if kind == "frozen"} == {"frozen.weight", "frozen.bias"}
    for name in ("embed.weight", "conv.bias", "norm.weight", "attention.in_proj_weight", "attention.out_proj.bias"):
        assert by[name] == "metric"
    assert found["hidden.weight"].response == "TanhBernoulli"
    assert found["hidden.weight"].structure == "kronecker"  # `frozen` takes its units
    assert found["embed.weight"].structure == "diagonal"
    assert "tied" in found["head.weight"].reason
    assert by["normed.parametrizations.weight.original1"] == "metric"
    assert by["scale"] == "metric"
    assert "no metric" in found["lost.weight"].reason
    assert found["spare.weight"].reason == "not reached by these inputs"


@pytest.mark.parametrize("structure", ["auto", {"Linear": "neuron", "attention*": "diagonal", "conv": "fallback"}])
def test_training_does_what_coverage_and_plan_said(structure):
    model, tokens = net()
    said = coverage(model, tokens, MetricOptions(structure=structure))
    planned = plan(model, tokens, MetricOptions(structure=structure))
    optimizer = RNGD(model, metric=MetricOptions(structure=structure))
    with pytest.warns(HealthWarning, match="no part in the first step had spare"):
        train(model, optimizer, tokens)
    of_rows = {row.subsystem: row.structure for row in said if row.by == "metric"}
    kept = structures_by_weight(optimizer)
    of_weights = {row.name: row for row in said if row.name in kept}
    assert {name: row.structure for name, row in of_weights.items()} == kept
    assert {row.subsystem: row.structure for row in of_weights.values()} == of_rows
    assert {layer.name: layer.chosen.structure for layer in planned if layer.samples} == of_rows
    assert [layer.name for layer in planned if not layer.samples] == ["spare"]
    by = {name: group["kind"] for group in optimizer.param_groups for name in group["param_names"]}
    for row in said:
        if row.by != "frozen" and row.name not in ("spare.weight", "spare.bias"):
            assert by[row.name] == row.by


@pytest.mark.parametrize("structure", ["auto", "neuron", "shared", "kronecker", "diagonal"])
def test_the_state_takes_the_bytes_that_were_planned(structure):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.Tanh(),
        nn.Linear(64, 10),
    )  # fmt: skip
    x = torch.randn(8, 3, 8, 8)
    planned = plan(model, x, MetricOptions(structure=structure))
    optimizer = RNGD(model, metric=MetricOptions(structure=structure))
    train(model, optimizer, x)
    measured = taken(optimizer)
    assert measured == pytest.approx(planned.bytes, rel=0.05)
    assert planned.averaging_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    without = RNGD(model, averaging=0, momentum=0, metric=MetricOptions(structure=structure))
    train(model, without, x)
    measured = taken(without)
    assert measured == pytest.approx(planned.bytes - planned.averaging_bytes - planned.momentum_bytes, rel=0.05)


@pytest.mark.parametrize("structure", ["auto", "neuron", "published"])
def test_layers_that_are_not_reached_are_planned_too(structure):
    class Spared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.spare, self.frozen = nn.Linear(10, 8), nn.Linear(60, 40), nn.Linear(30, 30)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return torch.tanh(self.first(x))

    model, x = Spared(), torch.randn(4, 10)
    planned = plan(model, x, MetricOptions(structure=structure))
    assert [(layer.name, layer.samples) for layer in planned] == [("first", 4), ("spare", 0)]
    assert "not reached" in str(planned).splitlines()[2]
    optimizer = RNGD(model, metric=MetricOptions(structure=structure))
    with pytest.warns(HealthWarning, match="no part in the first step had spare"):
        train(model, optimizer, x)
    measured = taken(optimizer)
    assert measured == pytest.approx(planned.bytes, rel=0.05)


AT_ONCE = MetricOptions(stats_interval=2, refresh_interval=2, warmup_refreshes=(), stagger=False)


def shared_out():
    """Return what a process sends in a step without statistics and with all, and what it keeps of which layers."""
    model, (x, targets) = made("attention"), batches("attention", 0, get_rank())[0]
    return sent_and_kept(model, DistributedDataParallel(model), x, lambda z: functional.cross_entropy(z, targets))


def sent_and_kept(model, net, x, loss):
    """Return the same of a model, and of how it is wrapped."""
    optimizer, sent = RNGD(net, metric=AT_ONCE, replicate=False), []
    for _ in range(3):
        optimizer.zero_grad()
        loss(net(x)).backward()
        with counting() as messages:
            optimizer.step()
        sent.append(sum(messages))
    states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    mine = [name for name, state in states.items() if "metric" in state]
    tensors = [(key, getattr(value, "_local_tensor", value)) for each in states.values() for key, value in each.items()]
    beside = sum(value.nbytes for key, value in tensors if key in BESIDE[:-1])
    kept = sum(value.nbytes for key, value in tensors if key not in FEW + BESIDE)
    return sent[1], sent[2], kept, mine, beside


IN_PARTS = ("attention", "blocks", "normed")


def shared_out_in_parts():
    """Return what a process with parts of each of some models sends and keeps, also of AdamW and the average."""
    shards = [(name, SCENARIOS[name].shard) for name in IN_PARTS]
    if get_world_size() == 4:
        shards.append(("blocks", copied))
    found = []
    for name, shard in shards:
        model, (x, targets) = shard(made(name)), batches(name, 0, 0)[0]
        found.append(sent_and_kept(model, model, x, partial(functional.cross_entropy, target=targets)))
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.filterwarnings("ignore")
def test_processes_with_parts_keep_and_send_what_was_planned(world):
    found = run_together(world, shared_out_in_parts)
    meshes = [(name, (world,)) for name in IN_PARTS] + [("blocks", (2, 2))] * (world == 4)
    for place, (name, mesh) in enumerate(meshes):
        model, (x, targets) = made(name), batches(name, 0, 0)[0]
        planned = plan(model, x, AT_ONCE, partial(functional.cross_entropy, target=targets), mesh=mesh).shares
        plain, due, kept, _, beside = zip(*(each[place] for each in found), strict=True)
        assert sum(plain) / world == pytest.approx(planned.steps_sent), (name, mesh)
        assert sum(due) / world == pytest.approx(planned.steps_sent + planned.statistics_sent), (name, mesh)
        assert max(kept) == pytest.approx(planned.metric_bytes, rel=0.05), (name, mesh)
        assert max(beside) == planned.beside_bytes, (name, mesh)
        assert planned.world_size == world
        assert "of what parameters and gradients take" in str(planned)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.filterwarnings("ignore")
def test_processes_keep_and_send_what_was_planned(world):
    model, (x, targets) = made("attention"), batches("attention", 0, 0)[0]
    planned = plan(model, x, AT_ONCE, lambda z: functional.cross_entropy(z, targets), world_size=world).shares
    found = run_together(world, shared_out)
    for rank, (plain, due, _, mine, beside) in enumerate(found):
        assert beside == planned.beside_bytes
        assert plain == pytest.approx(planned.steps_sent)
        assert due == pytest.approx(planned.steps_sent + planned.statistics_sent)
        weights = {
            f"{layer}{end}"
            for layer, owner in planned.owners.items()
            for end in (".weight", "_weight")
            if owner == rank
        }
        assert weights >= set(mine), rank
        assert len(mine) == list(planned.owners.values()).count(rank)
    kept = [each[2] for each in found]
    assert max(kept) == pytest.approx(planned.metric_bytes, rel=0.05)
    assert sum(kept) == pytest.approx(world * planned.mean_bytes, rel=0.05)
    assert planned.gradients_sent == 2 * (world - 1) / world * sum(p.numel() * 8 for p in model.parameters())
    for text in (f"{world} processes that share out the work", "of the mean", "an update of all metrics"):
        assert text in str(planned)


def unsent(_, bucket):
    """Return gradients as they are, in place of their mean, which nobody could send."""
    done = Future()
    done.set_result(bucket.buffer())
    return done


def language():
    """Return a language model whose largest layer is more than an eighth of it, and characters."""
    torch.manual_seed(0)
    return Transformer(400, 16, 32, 2, tied=True), torch.randint(400, (4, 16))


def score(z):
    return functional.cross_entropy(z.flatten(0, 1), torch.arange(64))


def first_in(wrapper):
    """Return what is sent and kept of the language model in the first process, with this wrapper."""
    model, x = language()
    if wrapper is DistributedDataParallel:
        net = DistributedDataParallel(model)
        net.register_comm_hook(None, unsent)
    else:
        for block in model.blocks:
            fully_shard(block)
        net = fully_shard(model)
    return sent_and_kept(model, net, x, score)


@pytest.mark.parametrize("world", [8, 64, 256, 1024])
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, fully_shard])
@pytest.mark.filterwarnings("ignore")
def test_the_first_of_many_processes_keeps_and_sends_what_was_planned(world, wrapper):
    """Left out: what the others keep. Plans say what processes send on average; the first may have larger parts.

    No other process is there, so that weights mean nothing, and their gradients are not summed.
    """
    model, x = language()
    mesh = None if wrapper is DistributedDataParallel else (world,)
    planned = plan(model, x, AT_ONCE, score, world_size=world, mesh=mesh)
    plain, due, kept, mine, beside = as_first_of(world, first_in, wrapper)
    own = [layer for layer in planned if planned.shares.owners[layer.name] == 0]
    assert len(mine) == len(own) == 1
    bytes_ = sum(layer.chosen.bytes + 4 * math.prod(layer.shape) for layer in own)
    assert kept == pytest.approx(bytes_, rel=0.05)
    assert bytes_ == planned.shares.metric_bytes
    assert beside == planned.shares.beside_bytes
    sent = planned.shares.steps_sent
    if mesh is not None:  # of layers, it sends its parts of the gradients, and all of its own steps
        moved = {row.name for row in coverage(model, x, AT_ONCE, score) if row.by == "metric"}
        with_metric = [p for name, p in model.named_parameters() if name in moved]
        first = sum(4 * -(-len(p) // world) * p[0].numel() for p in with_metric)
        steps = sum(4 * math.prod(layer.shape) for layer in own)
        sent += (1 - 1 / world) * (first + steps - 2 * 4 * sum(p.numel() for p in with_metric) / world)
    assert plain == pytest.approx(sent)
    assert due == pytest.approx(sent + planned.shares.statistics_sent)


def test_the_busiest_of_many_processes_has_little_more_than_the_mean():
    block = [nn.Linear(64, 192), nn.Tanh(), nn.Linear(192, 64), nn.ReLU()]
    model = nn.Sequential(*[layer for _ in range(12) for layer in copy.deepcopy(block)])
    for world in (2, 4):
        shares = plan(model, torch.randn(2, 64), world_size=world).shares
        assert shares.metric_bytes <= 1.15 * shares.mean_bytes
        assert shares.refresh <= 1.15 * shares.mean_refresh
    many = plan(model, torch.randn(2, 64), world_size=1024).shares
    assert len(set(many.owners.values())) == 24
    assert many.steps_sent < 0.51 * many.gradients_sent  # those without a layer send nothing of their own
    assert plan(model, torch.randn(2, 64)).shares is None
    with pytest.raises(ValueError, match="world_size must be"):
        plan(model, torch.randn(2, 64), world_size=0)
    for mesh in ((), (2, 2)):
        with pytest.raises(ValueError, match="mesh must be"):
            plan(model, torch.randn(2, 64), world_size=3, mesh=mesh)


def test_auto_keeps_to_its_bytes():
    model = mlp(sizes=(600, 40, 30, 5), dtype=torch.float32)
    x = torch.randn(4, 600)

    def chosen(bytes_):
        metric = MetricOptions(structure_bytes=bytes_)
        return [layer.chosen.structure for layer in plan(model, x, metric=metric, fit="plain")]

    assert chosen(1 << 30) == ["kronecker, rank 64", "kronecker", "shared"]
    assert chosen(1 << 18) == ["diagonal", "kronecker", "shared"]
    assert chosen(1 << 14) == ["diagonal", "shared", "shared"]
    for budget in (1 << 13, 1 << 16, 1 << 20, 1 << 26):
        assert all(
            layer.chosen.bytes <= budget
            for layer in plan(model, x, metric=MetricOptions(structure_bytes=budget), fit="plain")
        )


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_auto_takes_neuron_blocks_where_units_saturate_and_no_linear_layer_takes_them(activation):
    model = nn.Sequential(nn.Linear(60, 4), activation(), nn.LayerNorm(4), nn.Linear(4, 3))
    x = torch.randn(5, 60)

    def chosen(bytes_):
        return next(iter(plan(model, x, metric=MetricOptions(structure_bytes=bytes_), fit="plain"))).chosen.structure

    blocks = 2 * 4 * 61**2 * 4
    assert chosen(64 * blocks) == ("shared" if activation is nn.ReLU else "neuron")
    assert chosen(64 * blocks - 1) == "shared"


@pytest.mark.parametrize(
    ("loss", "head"),
    [
        (None, "shared"),
        (lambda z: functional.cross_entropy(z, torch.arange(4) % 3), "kronecker"),
        (lambda z: functional.mse_loss(z, torch.ones(4, 3)), "shared"),
    ],
)
def test_a_plan_that_is_given_the_loss_knows_a_softmax_head(loss, head):
    model = mlp(sizes=(5, 4, 3), dtype=torch.float32)
    x = torch.randn(4, 5)
    assert [layer.chosen.structure for layer in plan(model, x, loss=loss)] == ["diagonal", head]
    said = {row.subsystem: row.structure for row in coverage(model, x, loss=loss)}
    assert said == {"0": "diagonal", "2": head}
    heads = [row.is_head for row in plan(model, x, loss=loss)]
    assert heads == [row.is_head for row in coverage(model, x, loss=loss)][::2] == [False, head == "kronecker"]
    for told in (plan(model, x, loss=loss), coverage(model, x, loss=loss)):
        assert ("LinearGaussian, softmax head" in str(told)) == any(heads)
    if loss is not None:
        optimizer = RNGD(model)
        loss(model(x)).backward()
        optimizer.step()
        assert list(structures(optimizer).values()) == ["diagonal", head]
        planned = plan(model, x, loss=loss)
        measured = taken(optimizer)
        assert measured == pytest.approx(planned.bytes, rel=0.05)


def test_a_plan_counts_samples_and_positions_and_offers_others():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
    (layer,) = plan(model, torch.randn(2, 3, 8, 8))
    assert layer.samples == 2 * 8 * 8
    assert layer.shape == (16, 28)
    assert layer.chosen.bytes == 2 * 4 * 28**2
    assert layer.chosen.step == 2 * 16 * 28**2
    assert layer.chosen.statistics == 2 * 28**2 * 128
    assert {other.structure for other in layer.others} == {"neuron", "kronecker", "diagonal"}


@pytest.mark.parametrize(("limit", "gathered"), [(None, 512), (100, 100), (1000, 512)])
def test_a_plan_counts_the_samples_that_statistics_are_limited_to(limit, gathered):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
    (layer,) = plan(model, torch.randn(8, 3, 8, 8), metric=MetricOptions(stats_samples=limit))
    assert layer.samples == 8 * 8 * 8
    assert layer.chosen.statistics == 2 * 28**2 * gathered
    other = next(other for other in layer.others if other.structure == "neuron")
    assert other.statistics % gathered == 0
    (layer,) = plan(model, torch.randn(8, 3, 8, 8))
    assert layer.chosen.statistics == 2 * 28**2 * 256, "RNGD's default"
    with pytest.raises(ValueError, match="stats_samples must be"):
        plan(model, torch.randn(8, 3, 8, 8), metric=MetricOptions(stats_samples=0))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_names_are_those_of_the_model_where_it_is_compiled():
    model, tokens = net()
    compiled = torch.compile(model, backend="eager")
    options = MetricOptions(structure={"hidden": "diagonal", "attention*": "shared"})
    assert str(coverage(compiled, tokens, options)) == str(coverage(model, tokens, options))
    assert str(plan(compiled, tokens, options)) == str(plan(model, tokens, options))
    optimizer = RNGD(compiled, metric=options)
    with pytest.warns(HealthWarning, match="no part in the first step had spare"):
        train(compiled, optimizer, tokens)
    kept = structures(optimizer)
    assert (kept["hidden"], kept["embed"], kept["attention.out_proj"]) == ("diagonal", "diagonal", "shared")
    assert "tied: head.weight and twin.weight" in str(coverage(compiled, tokens))


def test_tables_have_a_line_a_row():
    model, tokens = net()
    said, planned = coverage(model, tokens), plan(model, tokens)
    assert len(str(said).splitlines()) == 1 + len(list(model.parameters()))
    assert "attention.in_proj" in str(said)
    assert len(str(planned).splitlines()) == 2 + len(list(planned))
    assert "KiB" in str(planned)
    assert "for the average (none with averaging=0)" in str(planned).splitlines()[-1]


def test_models_are_called_with_keywords_too():
    model, tokens = net()
    assert len(list(plan(model, (tokens,)))) == 9
    assert str(plan(model, {"tokens": tokens})) == str(plan(model, (tokens,)))


@pytest.mark.parametrize("asked", [plan, coverage])
def test_several_inputs_are_one_argument(asked):
    model, tokens = net()
    with pytest.raises(TypeError, match="got a tensor: inputs are one argument, such as a tuple"):
        asked(model, tokens, tokens)


def test_the_model_is_left_as_it_was():
    model, tokens = net()
    plan(model, tokens)
    coverage(model, tokens)
    assert model.training
    assert not is_hooked(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_memory_is_planned_like_one_with():
    def made():
        return nn.Sequential(nn.Conv2d(3, 600, 1), nn.BatchNorm2d(600), nn.ReLU(), nn.Flatten(), nn.Linear(2400, 5))

    with torch.device("meta"):
        model, x = made(), torch.zeros(2, 3, 2, 2)
    planned = plan(model, x)
    assert str(planned) == str(plan(made(), torch.randn(2, 3, 2, 2)))
    assert planned.layers[-1].chosen.structure == "shared, rank 64"
