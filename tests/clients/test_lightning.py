"""Lightning's Trainer: schedulers, accumulation, clipping, and checkpoints that resume exactly."""

import pytest

from relfisher import MetricOptions

pytest.importorskip("lightning")

import copy

import lightning
import torch
from builders import assert_close_weights, assert_same_weights
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_cnn import Classifier, loader
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from relfisher import RNGD

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


def classifier():
    torch.manual_seed(0)
    return Classifier()


def fit(model, epochs, *, checkpoint=None, batch=32, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, loader(128, batch), ckpt_path=checkpoint)
    return trainer


@torch.no_grad()
def loss(model):
    images, labels = next(iter(loader(128, 128)))
    return cross_entropy(model(images), labels).item()


def test_it_learns_and_the_scheduler_reaches_every_group():
    model = classifier()
    start = loss(model)
    trainer = fit(model, 10)
    assert loss(model) < start / 2
    (optimizer,) = trainer.optimizers
    (scheduler,) = [config.scheduler for config in trainer.lr_scheduler_configs]
    expected = [lr * 0.9**10 for lr in scheduler.base_lrs]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
    assert optimizer.health.skipped_steps == 0


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    straight, interrupted, resumed = classifier(), classifier(), classifier()
    fit(straight, 4)
    fit(interrupted, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 4, checkpoint=tmp_path / "half.ckpt")
    assert not torch.equal(interrupted.network[-1].weight, resumed.network[-1].weight)
    assert_same_weights(straight, resumed)


class CountingAll(Classifier):
    """With the statistics of all positions, not of some of each call."""

    def configure_optimizers(self):
        return RNGD(self, metric=MetricOptions(stats_samples=None))


def test_accumulated_batches_are_as_one():
    torch.manual_seed(0)
    whole = CountingAll()
    parts = copy.deepcopy(whole)
    fit(whole, 2, precision="64-true")
    fit(parts, 2, precision="64-true", batch=8, accumulate_grad_batches=4)
    assert_close_weights(whole, parts, rtol=1e-8, atol=1e-8)


class Bounded(Classifier):
    """With steps that shrink with the gradient."""

    def configure_optimizers(self):
        return RNGD(self, step_rule="trust-region")


def test_gradients_are_clipped_before_the_metric_takes_them():
    torch.manual_seed(0)
    start = Bounded()
    free, clipped = copy.deepcopy(start), copy.deepcopy(start)
    fit(free, 1)
    fit(clipped, 1, gradient_clip_val=1e-3)

    def gradient(model):
        return get_total_norm([parameter.grad for parameter in model.parameters()])

    def distance(model):
        return (model.network[-1].weight - start.network[-1].weight).norm()

    assert gradient(clipped) < 1.01e-3 < gradient(free)
    assert 0 < distance(clipped) < distance(free) / 2


class Validated(Classifier):
    """With its validation loss, which is that of the average."""

    def configure_optimizers(self):
        return RNGD(self)

    def validation_step(self, batch, _):
        images, labels = batch
        self.log("validation", cross_entropy(self(images), labels))


def test_the_best_checkpoint_has_the_validation_that_was_seen(tmp_path):
    torch.manual_seed(0)
    model = Validated()
    best = ModelCheckpoint(tmp_path, monitor="validation", save_weights_only=True)
    stopping = EarlyStopping("validation", patience=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=12,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[best, stopping],
    )
    trainer.fit(model, loader(128, 32), loader(64, 64))
    restored = Validated()
    restored.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    images, labels = next(iter(loader(64, 64)))
    with torch.no_grad():
        seen = cross_entropy(restored(images), labels).item()
    assert seen == pytest.approx(best.best_model_score.item(), rel=1e-5)
    assert seen == pytest.approx(stopping.best_score.item(), rel=1e-5)
