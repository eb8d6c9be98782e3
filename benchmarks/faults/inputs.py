"""Junk for public options: each must raise a TypeError or ValueError that names the argument."""

import math
from io import StringIO

import torch
from torch import nn

import relfisher
from faults.site import run
from faults.tally import Tally

NOT_A_NUMBER = ("1", b"1", [], [1.0], {}, (), object(), 1j, True, torch.nn.ReLU, torch.ones(2), math.nan)
NOT_POSITIVE = (*NOT_A_NUMBER, math.inf, -math.inf, 0, 0.0, -1, -1e-30)
NOT_AN_AMOUNT = (*NOT_A_NUMBER, math.inf, -math.inf, -1, -1e-30)
NOT_A_SHARE = (*NOT_A_NUMBER, math.inf, -math.inf, -0.1, 1.1, 2, 10**400)
NOT_A_COUNT = (*NOT_A_NUMBER, math.inf, 0, -1, 1.5, 2.0)
NOT_A_NAME = ("", "junk", "Spectral ", b"auto", 1, 0.5, math.nan, True, [], {"junk": 1}, object(), torch.nn.ReLU)
NOT_OPTIONS = ("", "junk", 1, 0.5, True, [], {}, object(), relfisher.MetricOptions, relfisher.RNGD)
NOT_RESPONSES = ("junk", 1, 0.5, True, object(), {"relu": 1}, {nn.ReLU: "junk"}, {nn.ReLU: nn.ReLU})
NOT_A_FLAG = ("yes", "", 2, 0.5, math.nan, [], {}, object())
NOT_A_MODULE = (None, "", "junk", 1, [], {}, object(), nn.Linear, [nn.Parameter(torch.ones(2))])
NOT_BY_LAYER = ({"absent": 0.5}, {1: 0.5}, {"0": "junk"}, {"0": math.nan}, {"0": -1})

METRIC = {
    "structure": (*(junk for junk in NOT_A_NAME if junk != {"junk": 1}), {"0": "junk"}, {"0": 1}, {1: "auto"}),
    "structure_bytes": NOT_POSITIVE,
    "power": (*NOT_A_SHARE[:4], *NOT_A_SHARE[6:], {"0": "junk"}, {"0": math.nan}, {"0": 2}),
    "decay": (*NOT_A_SHARE, 1.0),
    "stats_interval": NOT_A_COUNT,
    "stats_samples": NOT_A_COUNT,
    "refresh_interval": NOT_A_COUNT,
    "warmup_refreshes": ("12", 3, 0.5, None, [-1], [0.5], ["a"], [math.nan], [True], object()),
    "bias_correction": NOT_A_FLAG,
    "stagger": NOT_A_FLAG,
    "layers": ("junk", 3, None, [1], [nn.Linear], [object()], object()),
}
RNGD = {
    "lr": NOT_POSITIVE,
    "fit": NOT_A_NAME,
    "total_steps": NOT_A_COUNT,
    "momentum": (*NOT_A_SHARE, 1.0),
    "averaging": NOT_A_SHARE,
    "weight_decay": NOT_AN_AMOUNT,
    "damping": (*(junk for junk in NOT_AN_AMOUNT if junk != {}), *NOT_BY_LAYER),
    "step_rule": NOT_A_NAME,
    "metric": NOT_OPTIONS,
    "responses": NOT_RESPONSES,
    "fallback": NOT_OPTIONS,
    "model": NOT_A_MODULE,
    "junk": (1,),
}
TARGETS = {
    relfisher.RNGD: RNGD,
    relfisher.Preconditioner: {
        **{name: RNGD[name] for name in ("damping", "metric", "responses", "model", "junk")},
        "grafted": NOT_A_FLAG,
    },
    relfisher.MetricOptions: METRIC,
    relfisher.AdamWOptions: {
        "lr": NOT_POSITIVE,
        "eps": NOT_POSITIVE,
        "betas": (
            0.9,
            "junk",
            None,
            (),
            (0.9,),
            (0.9, 0.99, 0.999),
            (0.9, 1.0),
            (-0.1, 0.9),
            ("a", "b"),
            (math.nan, 0.9),
        ),
    },
    relfisher.Inversion: {
        "damping": NOT_AN_AMOUNT,
        "power": NOT_A_SHARE,
        "rank": NOT_A_COUNT,
        "relative_to": NOT_A_NAME,
        "pooled": NOT_A_FLAG,
    },
    relfisher.TrustRegion: {"bound": NOT_POSITIVE},
    relfisher.plan: {name: RNGD[name] for name in ("model", "metric", "responses", "junk")}
    | {"loss": (1, "junk", object(), lambda _: None, lambda output: output, lambda _: torch.tensor(1.0))},
}
NEEDED = {
    relfisher.RNGD: ("model",),
    relfisher.Preconditioner: ("model",),
    relfisher.plan: ("model", "inputs"),
}
# How errors call an option that is a collection.
CALLED = {"responses": ("responses", "response", "activation"), "layers": ("layers", "layer kind")}
WRONG_COUNTS = ("0", "-1", "1.5", "many", "nan", "inf", "", "1e3", "9" * 30, "²")
WRONG_NUMBERS = ("0", "-1", "many", "nan", "inf", "-inf", "1e999", "")
WRONG_RATES = tuple(f"PLAIN+SGD={text}" for text in (*WRONG_NUMBERS, "1e20", "1e300"))
WRONG_PLACES = ("/dev/null", "/dev/full", "/dev/null/out", "/proc/out", "x" * 300)
WRONG_SHAPES = ("", "x", "0", "-1", "1x", "2:0", "2:", "a", "9" * 30, "9" * 12, "2x" * 9 + "2")
WRONG_MODELS = ("", ":", "junk", "junk:", ":junk", "torch:junk", "torch.nn:Linear", "math:pi")
WRONG_URLS = ("", "junk", "file:///nonexistent", "http://", "http://[", "http://127.0.0.1:9")
WRONG_NAMES = ("", "junk", ",", "SGD,,", "SGD,junk")
REPRODUCE = ["reproduce", "mlp", "--out", "{out}"]
NEURON = ["reproduce", "neuron", "--out", "{out}"]
STEP = ["bench", "step", "--out", "{out}"]
RACE = ["bench", "race", "mlp", "--out", "{out}"]
COMMANDS = [
    (REPRODUCE, "--epochs", WRONG_COUNTS),
    (REPRODUCE, "--seeds", WRONG_COUNTS),
    (REPRODUCE, "--jobs", WRONG_COUNTS),
    (REPRODUCE, "--methods", WRONG_NAMES),
    (REPRODUCE, "--data", ("", "junk", "/dev/null", "/dev/full")),
    (REPRODUCE, "--lr", ("", "=", "PLAIN+SGD", "PLAIN+SGD=", "PLAIN+SGD=0.1,", "junk=1", *WRONG_RATES)),
    (NEURON, "--runs", WRONG_COUNTS),
    (NEURON, "--epochs", WRONG_COUNTS),
    (NEURON, "--initial-std", WRONG_NUMBERS[1:]),
    (NEURON, "--pair", ("", "3", "3,3", "3,4,5", "a,b", "3,10", "-1,3", "²,3", "9" * 30 + ",3")),
    (NEURON, "--size", ("", "0", "-1", "many", "19", "1e3", "²", "9" * 30)),
    (NEURON, "--methods", ("", "junk", "GD,,")),
    (STEP, "--seconds", WRONG_NUMBERS),
    (STEP, "--repeats", WRONG_COUNTS),
    (STEP, "--threads", WRONG_COUNTS),
    (STEP, "--workloads", WRONG_NAMES),
    (RACE, "--budget", WRONG_NUMBERS),
    (RACE, "--tuning", WRONG_NUMBERS),
    (RACE, "--seeds", WRONG_COUNTS),
    (["bench", "race", "mlp", "--methods", "SGD"], "--out", WRONG_PLACES),
    (["plan", "--model", "torch.nn:ReLU"], "--inputs", WRONG_SHAPES),
    (["plan", "--model", "torch.nn:ReLU"], "--mebibytes", WRONG_COUNTS),
    (["plan", "--model", "torch.nn:ReLU", "--inputs", "2x2"], "--structure", ("", "junk")),
    (["plan", "--inputs", "2x2"], "--model", WRONG_MODELS),
    (["data", "fetch", "mnist"], "--base-url", WRONG_URLS),
]  # fmt: skip


def network():
    """Return a small network."""
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def library(every=1):
    """Give each option of the library its junk, or every n-th piece of it.

    Args:
        every: n.

    Returns:
        The tally.
    """
    tally = Tally("junk for an option of the library: a TypeError or ValueError that names it")
    trials = [
        (target, name, junk)
        for target, options in TARGETS.items()
        for name, pieces in options.items()
        for junk in pieces
    ]
    for target, name, junk in trials[::every]:
        needed = {"model": network(), "inputs": torch.ones(2, 3)}
        arguments = {each: needed[each] for each in NEEDED.get(target, ())} | {name: junk}
        what = f"{target.__name__}({name}={junk!r})"
        try:
            made = target(**arguments)
            if target is relfisher.MetricOptions:
                relfisher.RNGD(network(), metric=made)  # what depends on the layers is checked with them
        except (TypeError, ValueError) as error:
            tally.count(any(word in str(error) for word in CALLED.get(name, (name,))), f"{what}: {error}")
        except Exception as error:  # the fault that is looked for
            tally.count(False, f"{what}: {type(error).__name__}: {error}")
        else:
            tally.count(False, f"{what} is accepted")
    return tally


def command_line(out, every=1):
    """Give each option of the command line its junk, or every n-th piece of it.

    Args:
        out: a directory that no command gets to write to.
        every: n.

    Returns:
        The tally.
    """
    tally = Tally("junk for an option of the command line: status 2 and one line that names it")
    trials = [(command, option, junk) for command, option, pieces in COMMANDS for junk in pieces]
    for command, option, junk in trials[::every]:
        arguments = [part.format(out=out) for part in command] + [f"{option}={junk}"]
        printed = StringIO()
        status, said = run(arguments, printed)
        survived = status == 2 and said.count("\n") == 1 and option in said and not printed.getvalue()
        tally.count(survived, f"{' '.join(arguments)[:200]}: {status}, {said[:300]!r}")
    return tally
