"""Accelerate: prepared optimizers, accumulation, bfloat16, and states that are loaded exactly."""

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from amp import network
from synthetic import gratings
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from relfisher import RNGD


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its state for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    def __init__(self, *, batch=32, **options):
        self.accelerator = Accelerator(cpu=True, **options)
        model = network()
        optimizer = RNGD(model, lr=3e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        loader = DataLoader(TensorDataset(*gratings(128, size=8)), batch)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )

    def epoch(self):
        losses = []
        for images, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = cross_entropy(self.model(images), labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 10.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def weights(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]


# In bfloat16 Accelerate casts the model's output back.
@pytest.mark.filterwarnings("ignore:linear response for some layers.*feeds float:relfisher.observe.ResponseWarning")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_learns_and_the_scheduler_follows(precision):
    run = Run(mixed_precision=precision)
    losses = [run.epoch() for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(3e-2 * 0.99**40)


def test_accumulated_batches_are_as_one():
    whole = Run()
    whole.epoch()
    parts = Run(batch=8, gradient_accumulation_steps=4)  # from here on, all runs of the process accumulate
    parts.epoch()
    for expected, parameter in zip(whole.weights(), parts.weights(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)


def test_a_loaded_state_goes_on_where_it_was_saved(tmp_path):
    run = Run()
    run.epoch()
    run.accelerator.save_state(tmp_path)
    saved = run.weights()
    run.epoch()
    other = Run()
    other.accelerator.load_state(tmp_path)
    for expected, parameter in zip(saved, other.weights(), strict=True):
        assert torch.equal(parameter, expected)
    other.epoch()
    for expected, parameter in zip(run.weights(), other.weights(), strict=True):
        assert torch.equal(parameter, expected)
