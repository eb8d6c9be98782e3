"""Lightning's "ddp" strategy, Accelerate and Trainer with two processes: as one process with batches twice as large."""

import pytest

pytest.importorskip("lightning")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import os
import warnings

import lightning
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hf_gpt2 import arguments, gpt2, sequences
from lightning_cnn import Classifier
from processes import run_together
from synthetic import gratings
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import Trainer

from relfisher import RNGD, AdamWOptions, MetricOptions

METRIC = MetricOptions(stats_samples=None, stats_interval=3, refresh_interval=5)


class Followed(Classifier):
    """The classifier, with the statistics of all samples, in double precision."""

    def configure_optimizers(self):
        return RNGD(self, metric=METRIC)


def loader(batch, **options):
    images, labels = gratings(256, size=16)
    return DataLoader(TensorDataset(images.double(), labels), batch, **options)


def by_lightning(devices):
    torch.manual_seed(0)
    model = Followed().double()
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp" if devices > 1 else "auto",
        devices=devices,
        precision="64-true",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = loader(32 // devices)
    if devices > 1:  # in order, as for one process
        sampler = DistributedSampler(data.dataset, devices, int(os.environ["RANK"]), shuffle=False)
        data = loader(32 // devices, sampler=sampler)
    trainer.fit(model, data)
    return trainer.global_step, trainer.optimizers[0].health.skipped_steps, model.state_dict()


def by_accelerate(devices):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
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
    return optimizer.param_groups[0]["iteration"], optimizer.health.skipped_steps, model.state_dict()


def by_trainer(devices, folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = gpt2().double()
    optimizer = RNGD(model, metric=METRIC, fallback=AdamWOptions(lr=1e-2))
    options = arguments(str(folder), max_steps=12, per_device_train_batch_size=8 // devices)
    Trainer(model, options, train_dataset=sequences(96), optimizers=(optimizer, None)).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return optimizer.param_groups[0]["iteration"], optimizer.health.skipped_steps, model.state_dict()


CLIENTS = {"lightning": (by_lightning, 16), "accelerate": (by_accelerate, 8), "trainer": (by_trainer, 12)}


def quietly(client, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return client(*arguments)


@pytest.mark.parametrize("name", CLIENTS)
def test_two_processes_are_as_one(name, tmp_path):
    client, steps = CLIENTS[name]
    folder = (tmp_path,) if name == "trainer" else ()
    count, skipped, weights = quietly(client, 1, *folder)
    assert (count, skipped) == (steps, 0)
    for each in run_together(2, quietly, client, 2, *folder, launched=True):
        assert each[:2] == (steps, 0)
        assert max(float((weights[key] - value).abs().max()) for key, value in each[2].items()) < 1e-9
