import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from relfisher.optim.schedule import WARMUP
from relfisher.studies import step, step_report, text
from relfisher.studies.peers import CONFIGURATIONS, PEERS, UNTUNED, Peer, UnavailableError
from relfisher.studies.report import Invocation, write
from relfisher.studies.step import BLOCK, ITERATIONS, WARM_UP, Lane, Timing, measure, take_turns
from relfisher.studies.training import iterate, state_bytes
from relfisher.studies.workloads import WORKLOADS, Samples, batches, growing, samples


def lane(name, seconds, log):
    def run():
        log.append(name)
        return seconds

    return Lane(run)


def test_lanes_take_turns_in_blocks():
    log = []
    lanes = [lane("a", 1e-9, log), lane("b", 1e-9, log)]
    take_turns(lanes, repeats=2, seconds=1.0)
    assert log == (["a"] * BLOCK + ["b"] * BLOCK) * ((WARM_UP + 2 * ITERATIONS) // BLOCK)
    assert [len(one.times) for one in lanes] == [2 * ITERATIONS] * 2


def test_a_metric_is_measured_after_its_early_refreshes(monkeypatch):
    at = []

    def note(optimizer, *rest):
        at.append(optimizer.param_groups[0]["iteration"])
        return iterate(optimizer, *rest)

    monkeypatch.setattr(step, "iterate", note)
    measure(growing(8), {"RNGD": PEERS["RNGD"]}, "mnist5k", repeats=1, seconds=0.0)
    assert at == list(range(ITERATIONS, ITERATIONS + len(at)))
    assert max(WARMUP) < ITERATIONS


def test_a_slow_lane_stops_after_its_seconds_and_the_others_go_on():
    log = []
    slow, fast = lane("slow", 0.5, log), lane("fast", 1e-9, log)
    take_turns([slow, fast], repeats=3, seconds=4.0)
    assert len(slow.times) == 6  # of three quarters of four seconds
    assert log.count("slow") == 2 + 6
    assert len(fast.times) == 3 * ITERATIONS


def test_a_method_that_cannot_decompose_its_matrices_takes_no_more_turns(monkeypatch):
    log = []
    steady, failing = lane("steady", 1e-9, log), lane("failing", 1e-9, log)
    run = failing.run

    def fails():
        if log.count("failing") == WARM_UP + 25:
            raise torch.linalg.LinAlgError("it did not converge")
        return run()

    failing.run = fails
    take_turns([steady, failing], repeats=1, seconds=1.0)
    assert (len(steady.times), len(failing.times)) == (ITERATIONS, 25)
    assert failing.failure == "raised it did not converge"

    def fails_at_once(optimizer, *rest):
        if isinstance(optimizer, torch.optim.SGD):
            raise torch.linalg.LinAlgError("it did not converge")
        return iterate(optimizer, *rest)

    monkeypatch.setattr(step, "iterate", fails_at_once)
    methods = {name: PEERS[name] for name in ("SGD", "Adam")}
    sgd, adam = measure(growing(8), methods, "mnist5k", repeats=1, seconds=0.0)
    assert (sgd.note, sgd.steps, adam.note, len(adam.steps)) == ("raised it did not converge", (), "", 1)


def test_the_peak_of_a_method_that_cannot_decompose_its_matrices_is_that_before(monkeypatch):
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 3:
            raise torch.linalg.LinAlgError("it did not converge")

    monkeypatch.setattr(step, "_trainer", lambda *_: (None, fails))
    assert step._growth("mlp", "SGD", "mnist5k", torch.get_num_threads()) >= 0
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["Adam", "Muon"])
def test_a_step_has_as_many_operations_as_it_dispatches(name):
    """Also one of several optimizers; a wide network has as many as a narrow one."""
    narrow, wide = (
        measure(growing(width), {name: PEERS[name]}, "mnist5k", repeats=1, seconds=0.0) for width in (8, 16)
    )
    assert narrow[0].operations == wide[0].operations > 1
    assert narrow[0].reads == wide[0].reads


def test_each_repeat_has_an_iteration_even_without_time():
    one = lane("one", 9.0, [])
    take_turns([one], repeats=3, seconds=0.0)
    assert len(one.times) == 3


def test_the_table_has_medians_ranges_and_ratios():
    steps = (*(0.001,) * 98, 0.004, 0.004)
    adam = Timing(
        "Adam", repeats=(0.002, 0.004, 0.003), steps=steps, state_bytes=2_000_000, peak_bytes=10_000_000, operations=90
    )
    other = Timing("other", repeats=(0.009, 0.006, 0.006), steps=steps, state_bytes=1_000_000, reads=2)
    first, second, third = step_report.rows([adam, other, Timing("third", note="not installed")])
    assert first == ["Adam", "3.00", "2.00 to 4.00", "1.00", "1.00", "4.0", "2", "1.00", "10", "1.00", "90", "0", "100"]
    assert second == ["other", "6.00", "6.00 to 9.00", "2.00", "1.00", "4.0", "1", "0.50", "-", "-", "0", "2", "100"]
    assert third[:2] == ["third", "not installed"]
    assert len(third) == len(step_report.HEADER)


def test_rare_work_is_in_the_mean_of_a_repeat_and_in_the_tail():
    cell = Timing("method", repeats=(0.0109,), steps=(*(0.01,) * 97, *(0.04,) * 3))
    assert cell.seconds == 0.0109
    assert cell.tail == pytest.approx(4.0)


def stepped(peer, model=None, steps=1, **options):
    model = model or nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = peer.make(model, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(8, 5)), torch.arange(8) % 3).backward()
        optimizer.step()
    return optimizer


def test_state_bytes_are_exact():
    numbers = 5 * 4 + 4 + 4 * 3 + 3
    adam = stepped(PEERS["Adam"])
    assert state_bytes(adam) == 4 * (2 * numbers + 4)  # two moments, and a count for each of four parameters
    sgd = stepped(PEERS["SGD"])
    assert state_bytes(sgd) == 4 * numbers
    muon = stepped(PEERS["Muon"])
    assert state_bytes(muon) == 4 * (20 + 2 * (numbers - 20) + 3)
    shared = stepped(PEERS["FOOF"])
    assert state_bytes(shared) >= 2 * 4 * (6 * 6 + 5 * 5)  # metric and inverse


def test_muon_in_single_precision_takes_the_step_of_a_more_exact_polar_factor():
    def moved(name, dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
        before = model[0].weight.detach().double().clone()
        model(torch.ones(8, 5, dtype=dtype)).square().sum().backward()
        PEERS[name].make(model).step()
        return model[0].weight.detach().double() - before

    exact = moved("Muon-float32", torch.float64)
    assert (moved("Muon-float32", torch.float32) - exact).norm() < 1e-4 * exact.norm()
    assert (moved("Muon", torch.float32) - exact).norm() > 1e-3 * exact.norm()


def test_every_method_has_as_many_configurations():
    for name, peer in PEERS.items():
        found = peer.configurations
        assert len(found) == (1 if name == UNTUNED else CONFIGURATIONS)
        assert len({tuple(options.items()) for options in found}) == len(found)
        assert all("lr" in options for options in found)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.filterwarnings("ignore")
def test_every_configuration_moves_every_parameter(name):
    torch.manual_seed(0)  # with some weights no hidden unit is ever active
    for options in PEERS[name].configurations[::7]:
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 3))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        try:
            # SOAP and Shampoo only look at first.
            stepped(PEERS[name], model, steps=int(options.get("interval", 1)) + 1, **options)
        except UnavailableError as error:
            pytest.skip(str(error))
        moved = zip(before, model.parameters(), strict=True)
        assert all(not torch.equal(old, new) for old, new in moved)


@pytest.mark.parametrize(("name", "package"), [("SOAP", "pytorch_optimizer"), ("K-FAC", "singd.optim.optimizer")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=r"relfisher\[bench\]") as caught:
        stepped(PEERS[name])
    assert "\n" not in str(caught.value)


def test_muon_without_a_torch_that_has_it_is_not_available(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UnavailableError, match=r"Muon comes with torch 2\.9"):
        stepped(PEERS["Muon"])


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.usefixtures("noise")
def test_a_workload_starts_the_same_way_each_time_and_learns(name):
    workload = WORKLOADS[name]
    state = torch.random.get_rng_state()
    model, again = workload.build(3), workload.build(3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))
    data = samples(workload.kind, "noise")
    batch = next(batches(data, 4, torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = iterate(optimizer, workload.loss, model, *batch)
    with torch.no_grad():
        assert workload.loss(model, *batch) < before
        assert np.isfinite(workload.validate(model, *batch))


def test_a_character_never_sees_the_next_one():
    model = WORKLOADS["transformer"].build(0)
    first = torch.arange(8)[None]
    second = first.clone()
    second[0, 5] = 99
    with torch.no_grad():
        difference = (model(first) - model(second)).abs().amax(dim=(0, 2))
    assert difference[:5].max() < 1e-5 < difference[5]


def test_the_text_is_the_same_each_time_and_plain():
    characters = text.characters()
    assert len(characters) == len(text.source()) <= text.BYTES
    assert 0 <= int(characters.min()) <= int(characters.max()) < text.ALPHABET
    windows = samples("text", "any")
    assert len(windows.fingerprint) == 64
    assert torch.equal(windows.inputs[0, 1:], windows.targets[0, :-1])


def test_an_epoch_has_every_sample_once_and_whole_batches_only():
    numbers = torch.arange(10)
    drawn = batches(Samples("", "", numbers, numbers, numbers, numbers), 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(drawn)[0] for _ in range(3)]) for _ in range(2)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.usefixtures("noise")
def test_measurement_leaves_tables_numbers_and_a_picture(tmp_path):
    def gone(_):
        raise UnavailableError("not available: it is a test")

    methods = {"Adam": PEERS["Adam"], "gone": Peer(gone, {}), "RNGD": PEERS["RNGD"]}
    cells = measure(WORKLOADS["mlp"], methods, "noise", repeats=2, seconds=0.0)
    assert [cell.method for cell in cells] == list(methods)
    assert [len(cell.steps) for cell in cells] == [2, 0, 2]
    both = {name: methods[name] for name in step_report.GROWTH_METHODS}
    widths = {width: measure(growing(width), both, "noise", repeats=1, seconds=0.0) for width in (8, 16)}
    sizes = {batch: measure(growing(8, batch), both, "noise", repeats=1, seconds=0.0) for batch in (2, 4)}
    report = step_report.report({"mlp": cells}, widths, sizes)
    paths = write(report, Invocation("relfisher bench step", 1), tmp_path)
    assert paths == [tmp_path / "table.md", tmp_path / "growth.png"]
    assert "| gone | not available: it is a test |" in paths[0].read_text()
    about = json.loads((tmp_path / "steps.json").read_text())
    assert about["command"] == "relfisher bench step"
    assert {"versions", "machine", "peers"} <= set(about)
    assert [len(cell["repeats"]) for cell in about["workloads"]["mlp"]] == [2, 0, 2]
    assert list(about["growth with the width"]) == ["8", "16"]
    assert list(about["growth with the batch"]) == ["2", "4"]


@pytest.mark.usefixtures("noise")
def test_the_peak_of_a_process_grows(monkeypatch):
    monkeypatch.setattr(step, "PEAK_ITERATIONS", 1)
    assert step._growth("mlp", "Adam", "noise", 1) >= 0
