"""Lightning, Accelerate and Trainer with two processes: as one process with batches twice as large.

Each holds the whole model, or parts of it. Accelerate, and Trainer by it, shards models on accelerators alone, so that
it is told here that it has some.
"""

import pytest

pytest.importorskip("lightning")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import os
import warnings
from functools import partial

import lightning
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hf_gpt2 import arguments, gpt2, sequences
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_cnn import Classifier
from processes import run_together
from synthetic import gratings
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import Trainer

from relfisher import RNGD, AdamWOptions, MetricOptions, expect

METRIC = MetricOptions(stats_samples=None, stats_interval=3, refresh_interval=5)


class Followed(Classifier):
    """The classifier, with the statistics of all samples, in double precision."""

    def configure_optimizers(self):
        return RNGD(self, metric=METRIC)


class Sharded(Followed):
    """The same, in parts, and maybe with what was saved of it."""

    def __init__(self, saved=None):
        super().__init__()
        self.saved = saved

    def configure_model(self):
        if not isinstance(self.network, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.network:
                if next(layer.parameters(), None) is not None:
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.saved is not None:
            expect(self, optimizer, FileSystemReader(self.saved).read_metadata())
        return optimizer


def loader(batch, **options):
    images, labels = gratings(256, size=16)
    return DataLoader(TensorDataset(images.double(), labels), batch, **options)


def whole(weights):
    """Return weights of which this process may hold parts."""
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in weights.items()}


def by_lightning(devices, strategy="ddp", epochs=2, **saved):
    torch.manual_seed(0)
    model = (Followed if strategy == "ddp" else Sharded)(**saved).double()
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy=strategy if devices > 1 else "auto",
        devices=devices,
        precision="64-true" if strategy == "ddp" else "32-true",  # which leaves all in double precision
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = loader(32 // devices)
    if devices > 1:  # in order, as for one process
        sampler = DistributedSampler(data.dataset, devices, int(os.environ["RANK"]), shuffle=False)
        data = loader(32 // devices, sampler=sampler)
    trainer.fit(model, data, ckpt_path=saved.get("saved"))
    if epochs == 1:
        trainer.save_checkpoint(strategy.folder)
    return trainer.global_step, trainer.optimizers[0].health.skipped_steps, whole(model.state_dict())


def in_parts_by_lightning(devices, folder):
    """Train with a break after half of the epochs, from which a new optimizer goes on."""
    if devices == 1:
        return by_lightning(1)
    strategy = ModelParallelStrategy(devices, 1)
    strategy.folder = folder / "half"
    by_lightning(devices, strategy, 1)
    return by_lightning(devices, ModelParallelStrategy(devices, 1), saved=strategy.folder)


def let_shard(accelerator):
    """Let Accelerate shard models, as it does where it finds accelerators."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)


def by_accelerate(devices, *, in_parts=False):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if in_parts and devices > 1:
        let_shard(accelerator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    optimizer = RNGD(model, metric=METRIC)
    network, prepared, data = accelerator.prepare(model, optimizer, loader(16 // devices))
    for images, labels in data:
        with accelerator.accumulate(network):
            accelerator.backward(cross_entropy(network(images), labels))
            prepared.step()
            prepared.zero_grad()
    AcceleratorState._reset_state(reset_partial_state=True)
    return optimizer.param_groups[0]["iteration"], optimizer.health.skipped_steps, whole(model.state_dict())


class Making(Trainer):
    """A trainer that makes its optimizer, as it must where models are in parts."""

    def create_optimizer(self, model=None):
        self.optimizer = self.own = RNGD(self.model, metric=METRIC, fallback=AdamWOptions(lr=1e-2))
        return self.optimizer


def by_trainer(devices, folder, *, in_parts=False):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = gpt2().double()
    options = arguments(str(folder), max_steps=12, per_device_train_batch_size=8 // devices)
    if in_parts:
        trainer = Making(model, options, train_dataset=sequences(96))
        if devices > 1:
            let_shard(trainer.accelerator)
            trainer.is_fsdp_enabled = True
    else:
        optimizer = RNGD(model, metric=METRIC, fallback=AdamWOptions(lr=1e-2))
        trainer = Trainer(model, options, train_dataset=sequences(96), optimizers=(optimizer, None))
    trainer.train()
    optimizer = trainer.own if in_parts else optimizer
    AcceleratorState._reset_state(reset_partial_state=True)
    return optimizer.param_groups[0]["iteration"], optimizer.health.skipped_steps, whole(model.state_dict())


# How many steps they take, and whether they need a folder.
CLIENTS = {
    "lightning": (by_lightning, 16, False),
    "lightning, in parts": (in_parts_by_lightning, 16, True),
    "accelerate": (by_accelerate, 8, False),
    "accelerate, in parts": (partial(by_accelerate, in_parts=True), 8, False),
    "trainer": (by_trainer, 12, True),
    "trainer, in parts": (partial(by_trainer, in_parts=True), 12, True),
}


def quietly(client, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return client(*arguments)


@pytest.mark.parametrize("name", CLIENTS)
def test_two_processes_are_as_one(name, tmp_path):
    client, steps, needs_folder = CLIENTS[name]
    folder = (tmp_path,) if needs_folder else ()
    count, skipped, weights = quietly(client, 1, *folder)
    assert (count, skipped) == (steps, 0)
    for each in run_together(2, quietly, client, 2, *folder, launched=True):
        assert each[:2] == (steps, 0)
        assert max(float((weights[key] - value).abs().max()) for key, value in each[2].items()) < 1e-9
