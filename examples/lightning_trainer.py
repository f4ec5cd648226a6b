"""Lightning: one callback, also with accumulation and gradient clipping by the trainer."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch as gw
from gradwatch.integrations.lightning import GradWatch


class Digits(pl.LightningModule):
    """A classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


pl.seed_everything(0, verbose=False)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target))
trainer = pl.Trainer(
    max_epochs=2,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[GradWatch(run_dir="runs/lightning", actions=[gw.SkipStep()])],
)
trainer.fit(Digits(), DataLoader(data, batch_size=32))

run = gw.load("runs/lightning")
print(run.summary())
print(run.metrics()[["loss", "global_norm", "clip_coefficient"]].tail(3))
