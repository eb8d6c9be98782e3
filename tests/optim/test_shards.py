"""Processes that hold parts of a model, after `fully_shard`, take the steps of one process that holds all of it."""

import math
import warnings

import pytest
import torch
from processes import run_together
from small import METRIC, Experts, Language, convolutional, distance, images, perceptron, sentences, sloped, vectors
from torch import nn
from torch.distributed import checkpoint, get_rank, get_world_size
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, linear
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as hooked_weight_norm

from relfisher import RNGD, Preconditioner

STEPS = 20


class Routed(nn.Module):
    """Experts for single samples, of which some processes give none to one of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(5, 3)

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


def recomputed(model):
    """Compute the activations of the first two blocks again in the backward pass."""
    for name in ("0", "1"):
        model.set_submodule(name, checkpoint_wrapper(model.get_submodule(name)))
    return by_block(model)


def sparing(model):
    """Shard experts that some processes do not run."""
    fully_shard(model)
    model.set_reduce_scatter_unused_params(True)
    return model


# The model, its data, the number of batches that a step accumulates, how it is sharded, and the optimizer's options.
SCENARIOS = {
    "spectral": (convolutional, images, 1, by_block, {}),
    "normalized": (convolutional, images, 1, at_root, {"step_rule": "normalized", "momentum": 0.0}),
    "trust region": (deep, vectors, 1, by_block, {"step_rule": "trust-region", "weight_decay": 0.1}),
    "blocks": (deep, vectors, 1, by_block, {"total_steps": 30, "weight_decay": 0.1}),
    "kept whole": (deep, vectors, 1, kept_whole, {"averaging": 0.5}),
    "copies": (deep, vectors, 1, copied, {}),
    "recomputed": (deep, vectors, 1, recomputed, {}),
    "accumulation": (perceptron, vectors, 3, by_block, {}),
    "language": (Language, sentences, 1, at_root, {}),
    "experts": (Experts, vectors, 1, sparing, {"fit": "interpolate"}),
    "routed": (Routed, vectors, 1, by_block, {}),
    "narrow": (narrow, vectors, 1, by_block, {}),
    "attention": (attentive, vectors, 1, by_block, {}),
    "adapted": (Adapted, vectors, 1, by_block, {}),
    "normed": (normed, vectors, 1, by_block, {}),
    "standardized": (standardized, vectors, 1, by_block, {}),
}


def made(name):
    """Return the model of a scenario, which is the same in all processes."""
    torch.manual_seed(0)
    return SCENARIOS[name][0]().double()


def batches(name, step, part):
    """Return the batches of one process in one step; their sizes differ between processes."""
    _, data, count, _, _ = SCENARIOS[name]
    generator = torch.Generator().manual_seed(1000 * step + part)
    return [data(generator, 4 + 2 * part) for _ in range(count)]


def evaluate(model, x, due=True):
    """Run the model without gradients, which leaves weights whole."""
    if due:
        with torch.no_grad():
            model(x)


def train(model, optimizer, name, parts, start=0, *, in_parts=False):
    """Train on the batches of some processes; now and then, evaluate before or after a step."""
    for step in range(start, start + STEPS):
        optimizer.zero_grad()
        for part in parts:
            several = batches(name, step, part)
            for place, (x, y) in enumerate(several, start=1):
                if in_parts:
                    model.set_requires_gradient_sync(place == len(several))
                (cross_entropy(model(x), y) / len(several) / len(parts)).backward()
        if SCENARIOS[name][3] is sparing:  # gives zeros where there is no gradient
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        evaluate(model, x, step % 5 == 1)
        optimizer.step()
        evaluate(model, x, step % 5 == 0)


def started(name, *, in_parts=False):
    """Return a new model and its optimizer."""
    model = made(name)
    if in_parts:
        model = SCENARIOS[name][3](model)
        evaluate(model, batches(name, 0, 0)[0][0])
    return model, RNGD(model, metric=METRIC, **SCENARIOS[name][4])


def whole(tensors):
    """Return tensors by name, without the parts that wrappers add to the names."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): each.full_tensor() if hasattr(each, "full_tensor") else each
        for name, each in tensors.items()
    }


def structures(optimizer):
    return [(layer.name, layer.structure and layer.structure.name) for layer in optimizer.layers]


def all_trained(names):
    """Return, for each scenario, the weights of a process after its steps, and what has a metric."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            model, optimizer = started(name, in_parts=True)
            train(model, optimizer, name, [get_rank()], in_parts=True)
            found[name] = whole(model.state_dict()), structures(optimizer)
    return found


@pytest.mark.parametrize(
    ("world", "names"), [(2, list(SCENARIOS)), (3, list(SCENARIOS)), (4, ["blocks", "narrow", "copies"])]
)
@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_model_step_as_the_whole_of_it_with_all_samples(world, names):
    found = run_together(world, all_trained, names)
    for name in names:
        model, optimizer = started(name)
        train(model, optimizer, name, range(world))
        for rank, each in enumerate(found):
            weights, kinds = each[name]
            assert kinds == structures(optimizer), f"{name}: rank {rank} has other structures than one process"
            assert distance(weights, found[0][name][0]) == 0, f"{name}: ranks 0 and {rank} differ"
            assert distance(weights, model.state_dict()) < 1e-9, f"{name}: rank {rank} differs from one process"


def before_a_step(model, optimizer, seed):
    """Compute the gradients of random samples, and return a copy of the weights."""
    x, y = vectors(torch.Generator().manual_seed(seed), 6)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    return before


def difficult():
    """Return what happens to a process in some difficult situations."""
    found, rank = {}, get_rank()
    torch.manual_seed(0)
    model = by_block(perceptron().double())
    optimizer = RNGD(model, metric=METRIC)
    for step in range(6):
        before = before_a_step(model, optimizer, 10 * step + rank)
        if step == 3 and rank == 1:
            next(model.parameters()).grad.to_local()[0, 0] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        moved = any(not torch.equal(before[name].to_local(), p.to_local()) for name, p in model.named_parameters())
        assert moved == (step != 3)
    found["nan"] = whole(model.state_dict()), optimizer.health.skipped_steps

    torch.manual_seed(0)
    model = by_block(sloped().double())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = RNGD(model, metric=METRIC)
        for step in range(6):
            before_a_step(model, optimizer, 10 * step + rank)
            optimizer.step()
    found["slopes"] = whole(model.state_dict()), [str(each.message) for each in told], structures(optimizer)

    torch.manual_seed(0)
    model = by_block(perceptron().double(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = RNGD(model, metric=METRIC)
    for step in range(6):
        before_a_step(model, optimizer, 10 * step + rank)
        optimizer.step()
    found["mixed"] = whole(model.state_dict()), structures(optimizer)

    torch.manual_seed(0)
    model = by_block(deep().double())
    preconditioner = Preconditioner(model, metric=METRIC)
    for step in range(6):
        before_a_step(model, preconditioner, 10 * step + rank)
        preconditioner.step()
    found["gradients"] = whole({name: each.grad for name, each in model.named_parameters()})
    found["metric"] = preconditioner.metric("1.1").to_dense()
    return found


@pytest.mark.filterwarnings("ignore")
def test_processes_with_parts_skip_together_and_agree():
    found = run_together(2, difficult)
    assert all(each["nan"][1] == 1 for each in found)
    for name in ("nan", "slopes", "mixed"):
        assert distance(*(each[name][0] for each in found)) == 0, name
    assert distance(*(each["gradients"] for each in found)) == 0
    for each in found:
        assert any("0, its response, ActivationGaussian(function=prelu" in told for told in each["slopes"][1])
        assert dict(each["slopes"][2])["0"] is None
        assert all(kind is not None for _, kind in each["mixed"][1])
    torch.manual_seed(0)
    model = deep().double()
    preconditioner = Preconditioner(model, metric=METRIC)
    for step in range(6):
        preconditioner.zero_grad()
        for rank in range(2):
            x, y = vectors(torch.Generator().manual_seed(10 * step + rank), 6)
            (cross_entropy(model(x), y) / 2).backward()
        preconditioner.step()
    assert distance(found[0]["gradients"], {name: each.grad for name, each in model.named_parameters()}) < 1e-9
    assert torch.allclose(found[0]["metric"], preconditioner.metric("1.1").to_dense(), atol=1e-12)


def why_refused():
    """Return the errors for models in parts of other kinds, or that are sharded too late or not as a whole."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    found, rank = {}, get_rank()

    def fails(name, act):
        try:
            act()
        except ValueError as error:
            found[name] = str(error)

    late = perceptron()
    optimizer = RNGD(late)
    by_block(late)
    late(torch.ones(2, 4)).sum().backward()
    fails("late", optimizer.step)
    flat = FullyShardedDataParallel(perceptron(), device_id=torch.device("cpu"))
    fails("flat", lambda: RNGD(flat))
    original = FullyShardedDataParallel(perceptron(), device_id=torch.device("cpu"), use_orig_params=True)
    fails("original", lambda: RNGD(original))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    split = parallelize_module(perceptron(), mesh["model"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
    fails("tensor parallel", lambda: RNGD(split))
    fails("both", lambda: RNGD(fully_shard(split, mesh=mesh["data"])))
    some = perceptron()
    fully_shard(some[0])
    fails("some", lambda: RNGD(some))
    ignored = perceptron()
    fails("ignored", lambda: RNGD(fully_shard(ignored, ignored_params=set(ignored[0].parameters()))))
    apart = perceptron()
    fully_shard(apart[0], mesh=mesh["data"])
    fails("apart", lambda: RNGD(fully_shard(apart, mesh=mesh["model"])))
    fails("preconditioner", lambda: Preconditioner(some))
    net = DistributedDataParallel(perceptron())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), RNGD)
    net(torch.ones(2, 4) * rank).sum().backward()
    fails("zero", optimizer.step)
    return found


@pytest.mark.filterwarnings("ignore")
def test_parts_of_other_kinds_are_refused_by_name():
    for errors in run_together(2, why_refused):
        assert "sharded after the optimizer was made" in errors["late"]
        assert "FullyShardedDataParallel flattens them: use fully_shard" in errors["flat"]
        assert "FullyShardedDataParallel flattens them: use fully_shard" in errors["original"]
        assert "0.weight is in parts of the kind (Shard(dim=0),), as of tensor parallelism" in errors["tensor parallel"]
        assert "as of tensor parallelism" in errors["both"]
        for name in ("some", "preconditioner"):
            assert "as a whole, but 2.weight is not, so that its gradients are not averaged" in errors[name]
        assert "as a whole, but 0.weight is not" in errors["ignored"]
        assert "2.weight is held by other processes than 0.weight" in errors["apart"]
        assert "instead of ZeroRedundancyOptimizer" in errors["zero"]


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def saved(folder, name):
    """Train, and save in all ways; return the number of steps before and after the state was asked for."""
    model, optimizer = started(name, in_parts=True)
    first = get_optimizer_state_dict(model, optimizer)["param_groups"][0]["iteration"]
    train(model, optimizer, name, [get_rank()], in_parts=True)
    own = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(own, folder / f"{get_rank()}.pt")
    state, progress = get_state_dict(model, optimizer)
    checkpoint.save({"model": state, "optimizer": progress}, checkpoint_id=folder / "parts")
    state, progress = get_state_dict(model, optimizer, options=WHOLE)
    if get_rank() == 0:
        torch.save({"model": state, "optimizer": progress}, folder / "whole.pt")
    return first, optimizer.param_groups[0]["iteration"]


def resumed(folder, name, way, parts=None):
    """Load what was saved in one of the ways, and return the weights after further steps."""
    in_parts, parts = parts is None, parts or [get_rank()]
    model, optimizer = started(name, in_parts=in_parts)
    if way in ("parts", "set"):  # a first step, with anything, shows what the layers are
        cross_entropy(model(batches(name, 0, 0)[0][0]), batches(name, 0, 0)[0][1]).backward()
        optimizer.step()
    if way == "parts":
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(state, checkpoint_id=folder / way)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        source = {"own": get_rank, "set": lambda: "whole"}.get(way, lambda: way)()
        state = torch.load(folder / f"{source}.pt", weights_only=False)
        set_model_state_dict(model, state["model"], options=StateDictOptions(full_state_dict=way != "own"))
        if way == "set":
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        else:
            optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, name, parts, STEPS, in_parts=in_parts)
    return whole(model.state_dict())


@pytest.mark.parametrize("name", ["adapted", "trust region"])
@pytest.mark.filterwarnings("ignore")
def test_what_parts_save_goes_on_in_as_many_in_others_and_in_one(tmp_path, name):
    assert run_together(2, saved, tmp_path, name) == [(0, STEPS)] * 2
    format_utils.dcp_to_torch_save(tmp_path / "parts", tmp_path / "converted.pt")
    two = resumed(tmp_path, name, "whole", range(2))
    for way in ("own", "parts", "whole", "set", "converted"):
        for weights in run_together(2, resumed, tmp_path, name, way):
            assert distance(weights, two) < 1e-9, way
    for way in ("parts", "set", "converted"):
        assert distance(resumed(tmp_path, name, way, range(2)), two) < 1e-9, way
    three = resumed(tmp_path, name, "whole", range(3))
    assert distance(two, three) > 1e-3
    for way in ("parts", "whole"):
        for weights in run_together(3, resumed, tmp_path, name, way):
            assert distance(weights, three) < 1e-9, way
