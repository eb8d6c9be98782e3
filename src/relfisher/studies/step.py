"""The cost of a training iteration: memory, and time in alternation, so that other load slows all methods equally."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch does not list it

from relfisher import RNGD
from relfisher.studies.operations import fewest
from relfisher.studies.peers import PEERS, Peer, UnavailableError
from relfisher.studies.training import iterate, state_bytes
from relfisher.studies.workloads import WORKLOADS, Workload, batches, samples

__all__ = ["Lane", "Timing", "measure", "peaks", "take_turns"]

BLOCK = 10
ITERATIONS = 200
WARM_UP = 60
WARM_UP_SHARE = 0.25
PEAK_ITERATIONS = 25
COUNTED = 10


@dataclass(frozen=True)
class Timing:
    """The cost of an iteration of a method on a workload.

    `repeats` has the mean seconds per iteration of each repeat, which include the share of infrequent work. `steps` has
    the seconds of every single iteration. `operations` are those that a step without infrequent work dispatches, and
    `reads` those among them with which the host waits for the device. If the method is not available, or failed too
    early, `note` says why and there are no numbers.
    """

    method: str
    note: str = ""
    repeats: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    state_bytes: int = 0
    peak_bytes: int | None = None
    operations: int = 0
    reads: int = 0

    @property
    def seconds(self) -> float:
        """The median over the repeats."""
        return float(np.median(self.repeats))

    @property
    def tail(self) -> float:
        """The ratio of the 99th percentile of single iterations to their median."""
        return float(np.percentile(self.steps, 99) / np.median(self.steps))


@dataclass
class Lane:
    """A method in progress.

    `run` performs an iteration and returns its seconds, which are added to `times`. If the matrices of a method can no
    longer be decomposed, it takes no further turns, and `failure` holds the error message.
    """

    run: Callable[[], float]
    times: list[float] = field(default_factory=list)
    failure: str = ""


def take_turns(lanes: Sequence[Lane], *, repeats: int, seconds: float) -> None:
    """Run blocks of iterations of each lane in turn, until all lanes are finished.

    A lane is finished after `ITERATIONS` iterations per repeat, or once it has used its time, but not before each
    repeat has an iteration. The warm-up, which is not measured, takes at most a quarter of its time.

    Args:
        lanes: the lanes, whose times are filled in.
        repeats: the number of parts into which the times will be split.
        seconds: the time limit of a lane.
    """
    _rotate(lanes, fewest=1, most=WARM_UP, seconds=WARM_UP_SHARE * seconds)
    for lane in lanes:
        lane.times.clear()
    _rotate(lanes, fewest=repeats, most=repeats * ITERATIONS, seconds=(1 - WARM_UP_SHARE) * seconds)


def measure(
    workload: Workload, methods: Mapping[str, Peer], source: str, *, repeats: int, seconds: float
) -> list[Timing]:
    """Measure the cost of an iteration of each method, all with the same initial weights and batches.

    Args:
        workload: the workload.
        methods: the methods by name.
        source: the data set of images.
        repeats: the number of means per method.
        seconds: the time limit of a method, including its warm-up.

    Returns:
        One timing per method, in order, without the peak memory.
    """
    optimizers: dict[str, torch.optim.Optimizer] = {}
    lanes: dict[str, Lane] = {}
    notes: dict[str, str] = {}
    for name, peer in methods.items():
        try:
            optimizers[name], run = _trainer(workload, peer, source)
        except UnavailableError as error:
            notes[name] = str(error)
        else:
            lanes[name] = Lane(run)
    take_turns(list(lanes.values()), repeats=repeats, seconds=seconds)
    notes |= {name: lane.failure for name, lane in lanes.items() if len(lane.times) < repeats}
    counts = {name: fewest(optimizers[name], lanes[name].run, COUNTED) for name in methods if name not in notes}
    return [
        Timing(name, notes[name])
        if name in notes
        else Timing(
            name,
            repeats=tuple(float(part.mean()) for part in np.array_split(lanes[name].times, repeats)),
            steps=tuple(lanes[name].times),
            state_bytes=state_bytes(optimizers[name]),
            operations=counts[name][0],
            reads=counts[name][1],
        )
        for name in methods
    ]


def peaks(workload: str, timings: Sequence[Timing], source: str) -> list[Timing]:
    """Measure the peak memory growth of training, in a separate process for each method.

    Args:
        workload: a key of `WORKLOADS`.
        timings: the timings of methods in `PEERS`.
        source: the data set of images.

    Returns:
        The timings with their peak memory: the growth of the resident set from before the model was built.
    """
    return [
        timing if timing.note else replace(timing, peak_bytes=_peak(workload, timing.method, source))
        for timing in timings
    ]


def _peak(workload: str, method: str, source: str) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_growth, workload, method, source, torch.get_num_threads()).result()


def _growth(workload: str, method: str, source: str, threads: int) -> int:
    torch.set_num_threads(threads)
    samples(WORKLOADS[workload].kind, source)
    # Reading the samples took more memory than they need: if the system allows it, reset the peak to the present size.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _largest_resident_bytes()
    _, run = _trainer(WORKLOADS[workload], PEERS[method], source)
    with suppress(LinAlgError):
        for _ in range(PEAK_ITERATIONS):
            run()
    return _largest_resident_bytes() - before


def _largest_resident_bytes() -> int:
    # The value from getrusage includes the time before the process ran its own program, and hence the parent's size.
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _trainer(workload: Workload, peer: Peer, source: str) -> tuple[torch.optim.Optimizer, Callable[[], float]]:
    """Return an optimizer, and a function that performs an iteration with it and returns its seconds."""
    model = workload.build(0, peer.normalization)
    optimizer = peer.make(model)
    if isinstance(optimizer, RNGD):  # measure the middle of a run, after its early refreshes
        for group in optimizer.param_groups:
            group["iteration"] = ITERATIONS
    drawn: Iterator[tuple[Tensor, Tensor]] = batches(
        samples(workload.kind, source), workload.batch_size, torch.Generator().manual_seed(0)
    )

    def run() -> float:
        batch = next(drawn)
        start = time.perf_counter()
        iterate(optimizer, workload.loss, model, *batch)
        return time.perf_counter() - start

    return optimizer, run


def _rotate(lanes: Sequence[Lane], *, fewest: int, most: int, seconds: float) -> None:
    def wants(lane: Lane) -> bool:
        count = len(lane.times)
        return not lane.failure and (count < fewest or (count < most and sum(lane.times) < seconds))

    while waiting := [lane for lane in lanes if wants(lane)]:
        for lane in waiting:
            for _ in range(BLOCK):
                if wants(lane):
                    try:
                        lane.times.append(lane.run())
                    except LinAlgError as error:
                        lane.failure = f"raised {error}"
