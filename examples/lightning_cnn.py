"""A small convolutional network under Lightning's Trainer, on noisy gratings: `python examples/lightning_cnn.py`."""

import lightning
import torch
from synthetic import gratings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from relfisher import RNGD


class Classifier(lightning.LightningModule):
    """Two convolutions and two linear layers, for images of 3x16x16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 4),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return a batch's loss; calling the model as a whole lets RNGD see which activation follows each layer."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> tuple[list[RNGD], list[torch.optim.lr_scheduler.LRScheduler]]:
        """Return the optimizer and a scheduler that lowers its learning rates after each epoch."""
        optimizer = RNGD(self, lr=5e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def loader(samples: int = 512, batch: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of noisy gratings."""
    return DataLoader(TensorDataset(*gratings(samples, size=16)), batch)


if __name__ == "__main__":
    lightning.seed_everything(0)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=5, logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), loader())
    print(f"loss {trainer.callback_metrics['loss']:.4f}")
