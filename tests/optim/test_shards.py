"""Processes that hold parts of a model, after `fully_shard`, take the steps of one process that holds all of it."""

import math
import warnings

import pytest
import torch
from processes import run_together, unchecked
from scenarios import (
    IN_PARTS,
    METRIC,
    SCENARIOS,
    STEPS,
    ahead,
    batches,
    by_block,
    deep,
    distance,
    made,
    masked,
    perceptron,
    sloped,
    sparing,
    vectors,
)
from torch.distributed import checkpoint, get_rank
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from relfisher import RNGD, Preconditioner

NAMES = [name for name, each in SCENARIOS.items() if each.shard]
REPLICATED = ("blocks", "normed", "columns")
LATE = ("averaging", "columns")  # sharded after the optimizer was made


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
                if in_parts and SCENARIOS[name].shard is ahead:
                    for block in model.children():
                        block.unshard(async_op=True)
                with masked(name, optimizer, x):
                    outputs = model(x)
                (cross_entropy(outputs, y) / len(several) / len(parts)).backward()
        if SCENARIOS[name].shard is sparing:  # gives zeros where there is no gradient
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        evaluate(model, x, step % 5 == 1)
        optimizer.step()
        evaluate(model, x, step % 5 == 0)


def started(name, *, in_parts=False, replicate=None):
    """Return a new model and its optimizer."""
    model, options = made(name), {"metric": METRIC, "replicate": replicate, **SCENARIOS[name].options}
    if in_parts and name in LATE:
        optimizer = RNGD(model, **options)
        return SCENARIOS[name].shard(model), optimizer
    if in_parts:
        model = SCENARIOS[name].shard(model)
        evaluate(model, batches(name, 0, 0)[0][0])
    return model, RNGD(model, **options)


def whole(tensors):
    """Return tensors by name, without the parts that wrappers add to the names."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): each.full_tensor() if hasattr(each, "full_tensor") else each
        for name, each in tensors.items()
    }


def structures(optimizer):
    return [(layer.name, layer.structure and layer.structure.name) for layer in optimizer.layers]


def all_trained(names):
    """Return, for each scenario, the weights of a process after its steps, and what has a metric.

    Some are trained by processes that do not share out the work, too.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            for replicate in (None, True) if name in REPLICATED else (None,):
                model, optimizer = started(name, in_parts=True, replicate=replicate)
                train(model, optimizer, name, [get_rank()], in_parts=True)
                found[name, replicate] = whole(model.state_dict()), structures(optimizer)
    return found


@pytest.mark.parametrize(
    ("world", "names"), [*((world, NAMES) for world in IN_PARTS), (4, [n for n in NAMES if SCENARIOS[n].in_four])]
)
@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_model_step_as_the_whole_of_it_with_all_samples(world, names):
    found = run_together(world, all_trained, names)
    for name in names:
        model, optimizer = started(name)
        with unchecked():
            train(model, optimizer, name, range(world))
        for key in (key for key in found[0] if key[0] == name):
            for rank, each in enumerate(found):
                weights, kinds = each[key]
                assert kinds == structures(optimizer), f"{key}: rank {rank} has other structures than one process"
                assert distance(weights, found[0][key][0]) == 0, f"{key}: ranks 0 and {rank} differ"
                assert distance(weights, model.state_dict()) < 1e-9, f"{key}: rank {rank} differs from one process"


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
    progress = optimizer.state_dict()
    for group in progress["param_groups"]:
        group["iteration"] = 1
    for state in progress["state"].values():
        state["updates"] = torch.ones(())
    optimizer.load_state_dict(progress)
    by_block(late)
    late(torch.ones(2, 4)).sum().backward()
    fails("late", optimizer.step)
    early = perceptron()
    preconditioner = Preconditioner(early)
    by_block(early)
    early(torch.ones(2, 4)).sum().backward()
    fails("late preconditioner", preconditioner.step)
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
        assert "sharded after its optimizer took steps or loaded a state" in errors["late"]
        assert "sharded after the optimizer was made" in errors["late preconditioner"]
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
    source = get_rank() if way == "own" else way
    state = torch.load(folder / f"{source}.pt", weights_only=False)
    set_model_state_dict(model, state["model"], options=StateDictOptions(full_state_dict=way != "own"))
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, name, parts, STEPS, in_parts=in_parts)
    return whole(model.state_dict())


@pytest.mark.parametrize("name", ["adapted", "trust region"])
@pytest.mark.filterwarnings("ignore")
def test_what_parts_save_goes_on_in_as_many_in_others_and_in_one(tmp_path, name):
    assert run_together(2, saved, tmp_path, name) == [(0, STEPS)] * 2
    format_utils.dcp_to_torch_save(tmp_path / "parts", tmp_path / "converted.pt")
    two = resumed(tmp_path, name, "whole", range(2))
    for way in ("own", "whole", "converted"):
        for weights in run_together(2, resumed, tmp_path, name, way):
            assert distance(weights, two) < 1e-9, way
    assert distance(resumed(tmp_path, name, "converted", range(2)), two) < 1e-9
    three = resumed(tmp_path, name, "whole", range(3))
    assert distance(two, three) > 1e-3
    for weights in run_together(3, resumed, tmp_path, name, "whole"):
        assert distance(weights, three) < 1e-9
