"""Every option, given values of every wrong kind; run as a program, since the tests check types on their own.

Prints how many values were tried, and what is wrong with the answers.
"""

import json
import math
import warnings

import torch
from builders import inputs, mlp

import relfisher as rf
from relfisher.metric import DenseMetric
from relfisher.optim.rules import Normalized, Spectral
from relfisher.structures import KroneckerFactors, SharedBlock

JUNK = {
    "text": "x",
    "none": None,
    "nan": math.nan,
    "infinite": math.inf,
    "negative": -1,
    "fraction": 2.5,
    "huge": 1e39,
    "complex": 1j,
    "true": True,
    "list": [0.1],
    "dict": {0: 1},
    "class": int,
    "object": object(),
    "tensor": torch.ones(2),
}

#: All real numbers of a sign, up to infinity or not.
POSITIVE = {"fraction", "huge"}


#: What some options are called where they are explained.
NAMES = {
    "param_group": "parameter group",
    "layers": "a layer kind must be",
    "params": "parameter",
    "responses": "an activation must be",
}


#: Options that are functions, for which any class may stand.
FUNCTIONS = {"subsystem", "sampler", "loss"}


def of_numbers():
    from sklearn.datasets import load_iris

    return load_iris(return_X_y=True)


def fitted(**options):
    return rf.LogisticRegression(**options).fit(*of_numbers())


def dense(**options):
    return DenseMetric(torch.eye(3, dtype=torch.float64)), options


def solved(**options):
    metric, options = dense(**options)
    return metric.solve(torch.ones(3, dtype=torch.float64), **options)


def largest(**options):
    metric, options = dense(**options)
    return metric.eigvalsh(**options)


def ranked(**options):
    metric, options = dense(**options)
    return metric.rank(**options)


def of_layer(**options):
    x = inputs()
    return rf.layer_metric(
        **{"x": x, "weight": x[:3], "bias": None, "response": rf.responses.TanhBernoulli()} | options
    )


def of_module(**options):
    return rf.module_metric(**{"model": mlp(), "name": "0", "inputs": inputs()} | options)


def of_subsystem(**options):
    given = {"subsystem": torch.tanh, "parameters": torch.ones(3), "response": rf.responses.TanhBernoulli()}
    return rf.relative_fisher(**given | options).to_dense()


def drawn(**options):
    def chances(theta, y=None):
        return torch.distributions.Bernoulli(logits=theta).log_prob(theta.new_ones(3) if y is None else y)

    def draw(theta):
        return torch.distributions.Bernoulli(logits=theta).sample()

    given = {"subsystem": chances, "parameters": torch.ones(3), "sampler": draw, "draws": 20}
    return rf.relative_fisher(**given | options)


def trained(**options):
    return rf.RNGD(mlp(), **options)


def preconditioned(**options):
    return rf.Preconditioner(mlp(), **options)


def covered(**options):
    return rf.coverage(**{"model": mlp(), "inputs": inputs()} | options)


def planned(**options):
    return rf.plan(**{"model": mlp(), "inputs": inputs()} | options)


def compared(**options):
    given = {"model": mlp(), "inputs": inputs(), "response": rf.responses.LinearGaussian()}
    return rf.compare(**given | options)


def observed(**options):
    def negative(theta, *_):
        return -theta

    given = {"subsystem": negative, "parameters": torch.ones(2), "y": torch.ones(2)}
    return rf.observed_fisher(**given | {"response": rf.responses.TanhBernoulli()} | options)


def masked(**options):
    with rf.RNGD(mlp()).masked(**options):
        pass


def loaded(**options):
    return rf.RNGD(mlp()).load_state_dict(**options)


def grouped(**options):
    return rf.RNGD(mlp()).add_param_group(**options)


#: For each option, the kinds of junk that are allowed.
TABLE = {
    trained: {
        "lr": {"none", "fraction"},
        "params": {"none"},
        "fit": {"none"},
        "total_steps": {"none"},
        "momentum": {"none"},
        "averaging": {"none"},
        "weight_decay": {"none", "fraction"},
        "damping": {"none", *POSITIVE},
        "step_rule": set(),
        "metric": set(),
        "responses": {"none"},
        "fallback": set(),
        "state_bytes": {"none", "huge"},
        "state_dtype": {"none"},
    },
    rf.RNGD: {"model": set()},
    preconditioned: {
        "damping": POSITIVE,
        "metric": set(),
        "responses": {"none"},
        "grafted": {"true"},
    },
    rf.Preconditioner: {"model": set()},
    rf.MetricOptions: {
        "structure": set(),
        "structure_bytes": POSITIVE,
        "power": {"none"},
        "decay": set(),
        "stats_interval": set(),
        "stats_samples": {"none"},
        "refresh_interval": set(),
        "warmup_refreshes": set(),
        "bias_correction": {"true"},
        "stagger": {"true"},
        "layers": set(),
    },
    rf.AdamWOptions: {"lr": {"fraction"}, "betas": set(), "eps": POSITIVE},
    rf.Inversion: {
        "damping": POSITIVE,
        "power": set(),
        "rank": {"none"},
        "relative_to": set(),
        "pooled": {"true"},
    },
    rf.TrustRegion: {"bound": {"none", *POSITIVE}},
    Spectral: {"iterations": set(), "noise_floor": POSITIVE},
    Normalized: {"relative_rms": {"fraction"}, "noise_floor": POSITIVE},
    SharedBlock: {"rank": {"none"}},
    KroneckerFactors: {"rank": {"none"}, "response": {"none"}, "through": {"none"}},
    fitted: {"C": {"infinite", *POSITIVE}, "tol": POSITIVE, "max_iter": set(), "fit_intercept": {"true"}},
    rf.responses.LinearGaussian: {"sigma": POSITIVE},
    rf.responses.ReLUGaussian: {"sigma": POSITIVE, "iota": set()},
    rf.responses.SmoothReLUGaussian: {"omega": POSITIVE, "iota": set(), "sigma": POSITIVE},
    rf.responses.ELUGaussian: {"alpha": POSITIVE, "sigma": POSITIVE},
    solved: {"damping": POSITIVE},
    largest: {"k": {"none"}},
    ranked: {"rtol": {"none"}},
    of_layer: {"x": set(), "weight": set(), "bias": {"none"}, "response": set()},
    of_module: {"model": set(), "name": set(), "response": {"none"}},
    of_subsystem: {"subsystem": set(), "parameters": {"tensor"}, "response": set(), "samples": {"none"}},
    drawn: {"sampler": set(), "draws": set(), "seed": {"negative"}, "samples": {"none"}},
    covered: {"model": set(), "metric": set(), "responses": {"none"}, "loss": {"none"}},
    planned: {"model": set(), "metric": set(), "responses": {"none"}, "loss": {"none"}},
    observed: {"subsystem": set(), "parameters": {"tensor"}, "response": {"none"}, "samples": {"none"}},
    compared: {"model": set(), "response": set(), "top": set()},
    masked: {"mask": set()},
    loaded: {"state_dict": set()},
    grouped: {"param_group": set()},
}


def complaint(make, option, kind):
    """Return what is wrong with the answer to a value, or None."""
    value, allowed = JUNK[kind], kind in TABLE[make][option]
    try:
        make(**{option: value})
    except (TypeError, ValueError) as error:
        named = any(word in str(error) for word in (option, NAMES.get(option, option)))
        return f"refused, {error!r}" if allowed else None if named else f"not named: {error!r}"
    except Exception as error:
        return f"a raw error: {error!r}"
    return None if allowed else "accepted"


def main():
    warnings.simplefilter("ignore")
    options = [(make, option) for make, options in TABLE.items() for option in options]
    tried = [(*each, kind) for each in options for kind in JUNK if kind != "class" or each[1] not in FUNCTIONS]
    found = {f"{make.__name__}({option}={kind})": complaint(make, option, kind) for make, option, kind in tried}
    print(json.dumps({"tried": len(found), "wrong": {key: value for key, value in found.items() if value}}))


if __name__ == "__main__":
    main()
