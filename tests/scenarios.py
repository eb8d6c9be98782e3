"""What several processes train together: small models of many kinds of layers, data, and ways to shard models."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.functional import linear
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as hooked_weight_norm

from relfisher import MetricOptions

STEPS = 20
METRIC = MetricOptions(stats_samples=None, stats_interval=3, refresh_interval=5)


class Language(nn.Module):
    """An LSTM with a head that is tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.lstm = nn.LSTM(5, 5, batch_first=True)
        self.head = nn.Linear(5, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0]).flatten(0, 1)


class Scored(nn.Module):
    """The same with a function that multiplies by the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.lstm = nn.LSTM(5, 5, batch_first=True)

    def forward(self, x):
        return linear(self.lstm(self.embedding(x))[0], self.embedding.weight).flatten(0, 1)


class Experts(nn.Module):
    """Two experts, of which the sign of the first input of a batch chooses one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.experts[int(x[0, 0] > 0)](self.first(x).relu()))


class Matrix(nn.Module):
    """A product with a bare matrix, whose form is not known before it runs."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 5) / 2)

    def forward(self, x):
        return x @ self.matrix


class Bare(nn.Module):
    """Experts that are bare matrices, and a response with a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.slopes = nn.Linear(4, 5), nn.PReLU()
        self.experts = nn.ModuleList(Matrix() for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.experts[int(x[0, 0] > 0)](self.slopes(self.first(x))).tanh())


class Routed(Experts):
    """Experts for single samples, of which some processes give none to one of them."""

    def forward(self, x):
        units, second = self.first(x).relu(), x[:, 0] > 1.0
        parts = torch.zeros_like(units)
        for expert, mine in zip(self.experts, (~second, second), strict=True):
            parts = parts.index_add(0, mine.nonzero().squeeze(1), expert(units[mine]))
        return self.head(units + parts)


class Standardized(nn.Module):
    """A layer whose weight is computed in the forward pass, from a weight and a scale."""

    def __init__(self, inputs, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inputs))
        self.scale = nn.Parameter(torch.ones(out, 1))

    def forward(self, x):
        return linear(x, self.scale * self.weight / self.weight.norm(dim=1, keepdim=True))


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank, a bare matrix, and a shift that has no metric."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.matrix = nn.Parameter(torch.randn(5, 6) / 2)
        self.shift = nn.Parameter(torch.zeros(6))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        units = (self.first(x) + self.up(self.down(x))).tanh()
        return self.last((units @ self.matrix).relu() * self.shift.exp())


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3))


def sloped():
    return nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3))


def attentive():
    """Return a transformer layer over the four inputs, of three numbers each."""
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), block, nn.Flatten(), nn.Linear(8, 3))


def narrow():
    """Return a network with a bias of a single unit, which most processes hold nothing of."""
    return nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 6), nn.Sigmoid(), nn.Linear(6, 3))


def normed():
    """Return a network whose weights are computed before each pass: with torch's parametrization, and by a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hook is deprecated
        last = hooked_weight_norm(nn.Linear(6, 3))
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), last)


def standardized():
    return nn.Sequential(Standardized(4, 6), nn.ReLU(), nn.Linear(6, 3))


def deep():
    """Return two blocks and a head, which follow each other by their activations."""
    first = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 7))
    return nn.Sequential(first, nn.Sequential(nn.Tanh(), nn.Linear(7, 6), nn.ReLU()), nn.Linear(6, 3))


def images(generator, count):
    return torch.randn(count, 1, 4, 4, generator=generator).double(), torch.randint(4, (count,), generator=generator)


def vectors(generator, count):
    return torch.randn(count, 4, generator=generator).double(), torch.randint(3, (count,), generator=generator)


def sentences(generator, count):
    words = torch.randint(6, (count, 4), generator=generator)
    return words[:, :-1], words[:, 1:].flatten()


def recomputed():
    """Return the same network; it computes the activations of the two blocks again in the backward pass."""
    model = deep()
    for name in ("0", "1"):
        model.set_submodule(name, checkpoint_wrapper(model.get_submodule(name)))
    return model


def at_root(model):
    return fully_shard(model)


def by_block(model, **options):
    """Shard each child that has parameters by itself, and then the rest."""
    children = [part for child in model.children() for part in (child if isinstance(child, nn.ModuleList) else [child])]
    for child in children:
        if next(child.parameters(), None) is not None:
            fully_shard(child, **options)
    return fully_shard(model, **options)


def kept_whole(model):
    return by_block(model, reshard_after_forward=False)


def copied(model):
    """Let two halves of the processes hold the same parts, if there are four."""
    world = get_world_size()
    shape = (2, world // 2) if world == 4 else (1, world)
    return by_block(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")))


def by_column(model):
    """Give each process columns of a weight, where they are as many."""

    def placed(parameter):
        even = parameter.ndim > 1 and parameter.shape[1] % get_world_size() == 0
        return Shard(1) if even else Shard(0)

    return by_block(model, shard_placement_fn=placed)


def ahead(model):
    """Gather the parameters before a pass begins, as `train` does then."""
    return by_block(model)


def sparing(model):
    """Shard experts that some processes do not run."""
    fully_shard(model)
    model.set_reduce_scatter_unused_params(True)
    return model


class Scenario(NamedTuple):
    """What is trained, and how.

    Args:
        shows: what it shows, as docs/distributed.md says it.
        make: returns the model.
        data: returns samples, given a generator and their number.
        shard: shards the model; None if its parts are not tested.
        options: the options of the optimizer.
        count: the number of batches that a step accumulates.
        is_wrapped: whether it is tested in `DistributedDataParallel`.
        in_four: whether its parts are tested in four processes, too.
        mask: returns which positions of the samples count; None for all.
    """

    shows: str
    make: Callable[[], nn.Module]
    data: Callable[..., Any]
    shard: Callable[[nn.Module], nn.Module] | None = by_block
    options: Mapping[str, Any] = MappingProxyType({})
    count: int = 1
    is_wrapped: bool = True
    in_four: bool = False
    mask: Callable[[torch.Tensor], torch.Tensor] | None = None


SCENARIOS = {
    "spectral": Scenario("convolutions, linear layers", convolutional, images),
    "normalized": Scenario("convolutions, linear layers", convolutional, images, at_root, {"step_rule": "normalized"}),
    "trust region": Scenario(
        "convolutions, linear layers", convolutional, images, options={"step_rule": "trust-region"}
    ),
    "blocks": Scenario(
        "layer norm, weight decay, `total_steps`",
        deep,
        vectors,
        options={"total_steps": 30, "weight_decay": 0.1},
        in_four=True,
    ),
    "averaging": Scenario("`averaging=0.5`, `momentum=0`", deep, vectors, at_root, {"averaging": 0.5, "momentum": 0.0}),
    "accumulation": Scenario("several batches for a step", perceptron, vectors, count=3),
    "language": Scenario("an LSTM, an embedding that is tied to the head", Language, sentences, at_root),
    "scored": Scenario("an embedding whose weight is the head in a function", Scored, sentences, at_root),
    "masked": Scenario(
        "positions that `masked` leaves out", Language, sentences, at_root, mask=lambda words: words > 1
    ),
    "attention": Scenario("a transformer layer", attentive, vectors),
    "narrow": Scenario("a bias of one unit, which most processes hold nothing of", narrow, vectors, in_four=True),
    "adapted": Scenario("frozen layers, adapters, bare matrices, vectors that AdamW trains", Adapted, vectors),
    "normed": Scenario("weight normalization, by parametrization and by hook", normed, vectors),
    "standardized": Scenario("weights that the forward pass computes", standardized, vectors),
    "recomputed": Scenario("activation checkpointing", recomputed, vectors),
    "routed": Scenario("experts that some processes give no sample", Routed, vectors),
    "experts": Scenario("experts that some processes do not run", Experts, vectors, sparing, {"fit": "interpolate"}),
    "slopes": Scenario("PReLU", sloped, vectors, None, {"fit": "interpolate", "step_rule": "trust-region"}),
    "kept whole": Scenario("`reshard_after_forward=False`", deep, vectors, kept_whole, is_wrapped=False),
    "ahead": Scenario("`unshard(async_op=True)` before a pass", deep, vectors, ahead, is_wrapped=False),
    "columns": Scenario("`shard_placement_fn`, by column", deep, vectors, by_column, is_wrapped=False),
    "copies": Scenario("a mesh of two dimensions (HSDP)", deep, vectors, copied, is_wrapped=False, in_four=True),
}


#: How many processes are tested: in `DistributedDataParallel`, and with parts of a model.
WRAPPED, IN_PARTS = (2, 3), (2, 3)


def table():
    """Return the rows of the table in docs/distributed.md: what is tested, with which rule, in how many processes."""
    for each in SCENARIOS.values():
        wrapped = ", ".join(map(str, WRAPPED)) if each.is_wrapped else ""
        parts = ", ".join(map(str, IN_PARTS + (4,) * each.in_four)) if each.shard else ""
        yield f"| {each.shows} | {each.options.get('step_rule', 'spectral')} | {wrapped} | {parts} |".replace(
            "|  |", "| |"
        )


def made(name):
    """Return the model of a scenario, which is the same in all processes."""
    torch.manual_seed(0)
    return SCENARIOS[name].make().double()


def batches(name, step, part):
    """Return the batches of one process in one step; their sizes differ between processes."""
    scenario, generator = SCENARIOS[name], torch.Generator().manual_seed(1000 * step + part)
    return [scenario.data(generator, 4 + 2 * part) for _ in range(scenario.count)]


def masked(name, optimizer, x):
    """Return a context in which the positions that a scenario masks do not count."""
    mask = SCENARIOS[name].mask
    return nullcontext() if mask is None else optimizer.masked(mask(x))


def distance(one, other):
    """Return the largest difference between two states of one model."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)
