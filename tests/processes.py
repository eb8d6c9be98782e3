"""Processes that run a task together, joined by gloo on this machine."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def run_together(world, task, *arguments):
    """Run task(*arguments) in as many processes, and return their results by rank; None if one exits."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(rank)) for rank in range(world)]
        multiprocessing.start_processes(_work, (places, task, arguments), nprocs=world, start_method="fork")
        return [torch.load(place, weights_only=False) if place.exists() else None for place in places]


def _work(rank, places, task, arguments):
    torch.set_num_threads(1)
    meeting = places[0].with_name("meeting").as_uri()
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=len(places), timeout=timedelta(seconds=60)
    )
    torch.save(task(*arguments), places[rank])
    if distributed.is_initialized():
        distributed.destroy_process_group()
