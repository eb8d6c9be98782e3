"""Train a model of which each process holds a part, and go on after an interruption with as many as there are.

    torchrun --nproc-per-node 2 examples/fsdp.py checkpoint.pt

Each process takes its share of every batch; the metric is that of all samples. What is saved is whole, so that any
number of processes can go on from it, or a single one that holds the whole model.
"""

import os
import sys
from pathlib import Path

import torch
from synthetic import gratings
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from relfisher import RNGD

STEPS, BATCH, SAVED_EVERY = 60, 48, 10
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train(checkpoint: Path) -> float:
    """Train until the end of the run, from the checkpoint if there is one, and return the validation accuracy."""
    torch.manual_seed(0)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    (x, y), (held_x, held_y) = gratings(960, size=16), gratings(256, size=16, seed=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 4))
    for layer in (model[1], model[3]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = RNGD(model)
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        set_model_state_dict(model, saved["model"], options=WHOLE)
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["steps"]
    for step in range(done, STEPS):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:BATCH]
        mine = rows[rank::world]
        optimizer.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()
        if (step + 1) % SAVED_EVERY == 0:
            state = get_model_state_dict(model, options=WHOLE)  # by all processes, and whole in the first
            progress = get_optimizer_state_dict(model, optimizer, options=WHOLE)
            if rank == 0:
                state = {"model": state, "optimizer": progress, "steps": step + 1}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)  # an interruption leaves the old one or the new one
                print(f"process {os.getpid()} saved {step + 1} steps", flush=True)
    model.eval()
    with torch.no_grad():
        return (model(held_x).argmax(1) == held_y).double().mean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    accuracy = train(Path(sys.argv[1]))
    if distributed.get_rank() == 0:
        print(f"{accuracy:.1%}")
    distributed.destroy_process_group()
