"""Faults of training: extreme options, and values that are not finite, wherever they may come from."""

import copy
import itertools
import math
import warnings
from functools import lru_cache, partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from faults.tally import Tally
from relfisher import RNGD, MetricOptions
from relfisher.studies.data import load
from relfisher.studies.networks import paper_network
from relfisher.studies.training import iterate

__all__ = ["OPTIONS", "RULES", "extreme", "not_finite"]

RULES = ("normalized", "trust-region", "spectral")
UNITS = {"ReLU units": nn.ReLU, "tanh units": nn.Tanh, "sigmoid units": nn.Sigmoid}
NETWORKS = (*UNITS, "convolutions")
RATES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
DAMPINGS = (1e-5, 1e-3, 0.1, 1.0)
BATCHES = (8, 64, 1024)
MOMENTUMS = (0.0, 0.9)
OPTIONS = tuple(itertools.product(RATES, DAMPINGS, BATCHES, MOMENTUMS))
VALUES = (math.nan, math.inf, -math.inf)
STRUCTURES = ("shared", "neuron", "kronecker", "diagonal")
MOMENTS = (0, 1, 5, 12)
AFTER = 12


@lru_cache
def digits():
    """Return the embedded digits."""
    return load("mnist5k")


def convolutional():
    """Return a network of two convolutions and a linear head."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def build(name):
    """Return the network with the given name."""
    if name == "convolutions":
        torch.manual_seed(0)
        return convolutional()
    return paper_network("none", torch.Generator().manual_seed(0), UNITS[name])


def run(rule, name, iterations, options):
    """Return whether all weights are finite after a run, whether its loss fell, and the number of skipped steps."""
    rate, damping, batch, momentum = options
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = digits()
    model = build(name)
    optimizer = RNGD(model, rate, step_rule=rule, damping=damping, momentum=momentum)
    losses = []

    def loss(rows):
        return cross_entropy(model(data.train_images[rows]), data.train_labels[rows])

    for iteration in range(iterations):
        rows = torch.randint(len(data.train_labels), (batch,), generator=torch.Generator().manual_seed(iteration))
        losses.append(iterate(optimizer, loss, rows))
    late = losses[-10:]
    return finite(model), sum(late) / len(late) < losses[0], optimizer.health.skipped_steps


def finite(model):
    """Return whether all weights of a model are finite."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


class Bench:
    """A small network in training with a step rule and a structure.

    Args:
        rule: the step rule.
        structure: the structure of all metrics.
    """

    def __init__(self, rule, structure):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
        metric = MetricOptions(structure=structure, stats_interval=2, refresh_interval=4)
        self.optimizer = RNGD(self.model, 1e-2, step_rule=rule, fit="plain", metric=metric)
        self.x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
        self.y = self.x[:, :3].argmax(1)

    @property
    def counted(self):
        """The number of failures that the optimizer has counted."""
        health = self.optimizer.health
        return health.skipped_steps + health.failed_refreshes + health.dropped_batches

    def step(self, x=None, scale=1.0, spoil=lambda: None):
        """Take a step, and return the loss; `spoil` is called before the optimizer's part of it."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.x if x is None else x), self.y) * scale
        loss.backward()
        spoil()
        self.optimizer.step()
        return float(loss.detach())


def not_finite(structures=STRUCTURES, moments=MOMENTS, values=VALUES, every=1):
    """Put values that are not finite into a batch, a loss, a gradient or a state, before training goes on.

    Args:
        structures: structures of the metrics.
        moments: numbers of steps before the fault.
        values: the values.
        every: n, to try every n-th fault only.

    Returns:
        The tallies.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    passing = Tally("a batch, loss or gradient that is not finite: weights stay, the step is counted, training goes on")
    lasting = Tally("a metric, factor or moment that is not finite: weights stay finite, counted or without effect")
    for rule, structure, moment in itertools.product(RULES, structures, moments):
        bench = Bench(rule, structure)
        for _ in range(moment):
            bench.step()
        names = list(dict(bench.model.named_parameters()))
        for fault, value in list(itertools.product(("batch", "loss", *names), values))[::every]:
            what = f"{rule}, {structure}, {value} in {fault} after {moment} steps"
            passing.count(_passed(copy.deepcopy(bench), fault, value), what)
        for name, key, value in list(itertools.product(names, _keys(bench), values))[::every]:
            twin = copy.deepcopy(bench)
            state = twin.optimizer.state[dict(twin.model.named_parameters())[name]]
            if key in state and _spoiled(state[key], value):
                what = f"{rule}, {structure}, {value} in {key} of {name} after {moment} steps"
                lasting.count(_lasted(twin), what)
    return [passing, lasting]


def _keys(bench):
    """Return the names of the states that a step reads; the average is a part of the weights themselves."""
    states = bench.optimizer.state.values()
    return sorted({key for state in states for key, value in state.items() if _is_read(key, value)})


def _is_read(key, value):
    return key != "lead" and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _spoiled(tensor, value):
    """Put a value into a state, if it has entries."""
    if tensor.numel():
        tensor.view(-1)[tensor.numel() // 2] = value
    return tensor.numel() > 0


def _passed(bench, fault, value):
    """Return whether a step with a fault changes no weights and is counted, and the steps after it reduce the loss."""
    weights = copy.deepcopy(bench.model.state_dict())
    before = bench.counted
    if fault == "batch":
        x = bench.x.clone()
        x[7, 2] = value
        bench.step(x)
    elif fault == "loss":
        bench.step(scale=value)
    else:
        parameter = dict(bench.model.named_parameters())[fault]
        bench.step(spoil=lambda: _spoiled(parameter.grad, value))
    # A skipped step takes the weights to the iterate and back, which rounds.
    same = all(torch.allclose(weights[name], now, 1e-6, 1e-7) for name, now in bench.model.state_dict().items())
    counted = bench.counted > before
    losses = [bench.step() for _ in range(AFTER)]
    return same and counted and finite(bench.model) and losses[-1] < losses[0]


def _lasted(bench):
    """Return whether weights stay finite with a spoiled state, and that is counted or training goes on."""
    before = bench.counted
    losses = [bench.step() for _ in range(AFTER)]
    return finite(bench.model) and (bench.counted > before or losses[-1] < losses[0])


def extreme(pool_map, iterations, options=OPTIONS):
    """Train with extreme options.

    Args:
        pool_map: maps a function over options.
        iterations: the length of each run.
        options: rates, dampings, batch sizes and momentums.

    Returns:
        The tally, and a row of a table for each rule and network.
    """
    tally = Tally("extreme learning rates, dampings and batches: weights stay finite")
    rows = []
    for rule, name in itertools.product(RULES, NETWORKS):
        found = pool_map(partial(run, rule, name, iterations), options)
        for each, (survived, _, _) in zip(options, found, strict=True):
            tally.count(survived, f"{rule}, {name}, {each}")
        whole, learned, skipped = (sum(result[place] for result in found) for place in range(3))
        rows.append(f"| {rule} | {name} | {len(found)} | {len(found) - whole} | {learned} | {skipped} |")
    return tally, rows
