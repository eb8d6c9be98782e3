"""Processes that run a task together, joined by gloo on this machine."""

import os
import socket
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

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


def _joined(rank, places, task, arguments):
    torch.set_num_threads(1)
    meeting = places[0].with_name("meeting").as_uri()
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=len(places), timeout=timedelta(seconds=60)
    )
    _work(places[rank], task, arguments)


def _launched(port, rank, places, task, arguments):
    torch.set_num_threads(1)
    world = str(len(places))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": world}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0"}
    _work(places[rank], task, arguments)


def _work(place, task, arguments):
    torch.save(task(*arguments), place)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
