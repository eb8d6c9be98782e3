"""Processes that run a task together, joined by gloo on this machine."""

import os
import socket
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jaxtyping
import torch
from torch import distributed, multiprocessing


def run_together(world, task, *arguments, launched=False):
    """Run task(*arguments) in as many processes, and return their results by rank; None if one exits.

    They are joined, or, if they are launched, find what they need to join in the environment, as by torchrun.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(rank)) for rank in range(world)]
        entry = partial(_launched, _free_port()) if launched else _joined
        multiprocessing.start_processes(entry, (places, task, arguments), nprocs=world, start_method="fork")
        return [torch.load(place, weights_only=False) if place.exists() else None for place in places]


def as_first_of(world, task, *arguments):
    """Return what the first of as many processes would, of which there are no others: nothing that it sends arrives.

    Unless it gathers parts of equal length, of which it gets its own for all, it receives zeros.
    """

    def alone():
        from torch.testing._internal.distributed.fake_pg import FakeStore  # tells torch of this backend

        distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        empty = torch.empty
        with (
            patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
            patch.object(torch, "empty", lambda *shape, **options: empty(*shape, **options).zero_()),
        ):
            return task(*arguments)

    return run_together(1, alone, launched=True)[0]


@contextmanager
def counting():
    """Yield a list that fills with the bytes of each message that this process sends, on average over a ring."""
    sent, share = [], 1 - 1 / distributed.get_world_size()
    gathering = (
        "broadcast",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    )
    shares = dict.fromkeys(["reduce", "all_to_all_single", *gathering], share) | {"all_reduce": 2 * share}

    def counted(name):
        send, share = getattr(distributed, name), shares[name]

        def act(*tensors, **options):
            given = [each.nbytes for each in (*tensors, *options.values()) if isinstance(each, torch.Tensor)]
            sent.append(share * (given[1] if name == "all_to_all_single" else max(given)))
            return send(*tensors, **options)

        return act

    gather = torch.ops._c10d_functional.all_gather_into_tensor  # which tensors in parts are made whole by

    def gathered(tensor, count, *others):
        sent.append((1 - 1 / count) * count * tensor.nbytes)
        return gather(tensor, count, *others)

    with ExitStack() as stack:
        for name in shares.keys() & vars(distributed).keys():  # some are newer than others
            stack.enter_context(patch.object(distributed, name, counted(name)))
        stack.enter_context(patch.object(torch.ops._c10d_functional, "all_gather_into_tensor", gathered))
        yield sent


@contextmanager
def unchecked():
    """Leave out the checks of shapes and types, which take longer than what they check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def _joined(rank, places, task, arguments):
    torch.set_num_threads(1)
    meeting = places[0].with_name("meeting").as_uri()
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=len(places), timeout=timedelta(seconds=60)
    )
    _work(rank, places, task, arguments)


def _launched(port, rank, places, task, arguments):
    torch.set_num_threads(1)
    world = str(len(places))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": world}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0"}
    _work(rank, places, task, arguments)


def _work(rank, places, task, arguments):
    with unchecked() if rank else nullcontext():  # the first process does what the others do
        torch.save(task(*arguments), places[rank])
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
