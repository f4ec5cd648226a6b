import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch as gw
from tests.integrations import plain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Lightning's own imports
    import lightning.pytorch as pl

from gradwatch.integrations.lightning import GradWatch

pytestmark = [
    pytest.mark.framework("lightning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain.model()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return plain.loss_of(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=plain.RATE)


class TwoOptimizers(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:  # type: ignore[override]
        x, y = batch
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(plain.loss_of(self.net(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[2]
        return [torch.optim.SGD(part.parameters(), lr=plain.RATE) for part in (first, last)]


def fit(module: pl.LightningModule, callback: GradWatch, tmp_path: Path, **trainer: Any) -> pl.Trainer:
    loader = DataLoader(TensorDataset(*plain.data()), batch_size=plain.BATCH)
    fitter = pl.Trainer(
        max_epochs=trainer.pop("max_epochs", 1),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=trainer.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
        **trainer,
    )
    fitter.fit(module, loader)
    return fitter


def test_norms_and_losses_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    module = Regression()
    fit(module, GradWatch(run_dir=tmp_path / "lit"), tmp_path)
    net = plain.train(tmp_path / "plain")

    np.testing.assert_array_equal(plain.norms(tmp_path / "lit"), plain.norms(tmp_path / "plain"))
    np.testing.assert_allclose(plain.losses(tmp_path / "lit"), plain.losses(tmp_path / "plain"), rtol=1e-6)
    assert plain.same_weights(module.net, net)


def test_accumulated_batches_make_one_row(tmp_path: Path) -> None:
    fit(Regression(), GradWatch(run_dir=tmp_path / "lit"), tmp_path, accumulate_grad_batches=3)
    plain.train(tmp_path / "plain", accumulate=3)

    np.testing.assert_allclose(plain.norms(tmp_path / "lit"), plain.norms(tmp_path / "plain"), rtol=1e-6)


def test_norms_are_those_before_lightning_clips(tmp_path: Path) -> None:
    fit(Regression(), GradWatch(run_dir=tmp_path / "lit"), tmp_path, gradient_clip_val=0.5)
    plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(plain.norms(tmp_path / "lit"), plain.norms(tmp_path / "plain"), rtol=1e-6)
    plain.assert_clipped_to(tmp_path / "lit", 0.5)


def test_clip_is_that_of_clip_grad_norm(tmp_path: Path) -> None:
    module = Regression()
    fit(module, GradWatch(run_dir=tmp_path / "lit", actions=[gw.Clip(max_norm=0.5)]), tmp_path)
    net = plain.train(tmp_path / "plain", max_norm=0.5)

    for ours, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_poisoned_batch_is_skipped(tmp_path: Path) -> None:
    class Poisoned(Regression):
        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            loss = super().training_step(batch, number)
            return loss * float("nan") if number == 5 else loss

    module = Poisoned()
    fit(module, GradWatch(run_dir=tmp_path / "lit", actions=[gw.SkipStep()]), tmp_path)

    metrics = gw.load(tmp_path / "lit").metrics()
    assert list(metrics.index[metrics["skipped"] > 0]) == [5]
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_the_learning_rate_is_lowered(tmp_path: Path) -> None:
    class Fast(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=2.0)

    fit(Fast(), GradWatch(run_dir=tmp_path / "lit", actions=[gw.DecayLR()], stats_every=1), tmp_path, max_epochs=5)

    assert plain.was_decayed(tmp_path / "lit", 2.0)


def test_several_optimizers_share_a_row(tmp_path: Path) -> None:
    fit(TwoOptimizers(), GradWatch(run_dir=tmp_path / "lit"), tmp_path)

    recorded = plain.norms(tmp_path / "lit")
    assert recorded.shape == (plain.STEPS, 4)
    assert np.isfinite(recorded).all()


def test_stop_ends_the_fit_through_the_trainer(tmp_path: Path) -> None:
    class Diverging(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=100.0)

    callback = GradWatch(run_dir=tmp_path / "lit", actions=[gw.Stop()])
    trainer = fit(Diverging(), callback, tmp_path, max_epochs=20)

    assert trainer.should_stop
    assert trainer.current_epoch < 20
    assert gw.load(tmp_path / "lit").info.status == "finished"


def test_a_failed_fit_is_in_the_record_with_its_reason(tmp_path: Path) -> None:
    class Failing(Regression):
        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            if number == 3:
                raise ValueError("bad sample")
            return super().training_step(batch, number)

    with pytest.raises(ValueError, match="bad sample"):
        fit(Failing(), GradWatch(run_dir=tmp_path / "lit"), tmp_path)

    info = gw.load(tmp_path / "lit").info
    assert (info.status, info.status_detail) == ("crashed", "ValueError: bad sample")


def test_state_travels_in_lightnings_checkpoint(tmp_path: Path) -> None:
    callback = GradWatch(run_dir=tmp_path / "lit")
    trainer = fit(Regression(), callback, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]["GradWatch"]

    assert saved["next_step"] == plain.STEPS
    fresh = GradWatch(run_dir=tmp_path / "again")
    loader = DataLoader(TensorDataset(*plain.data()), batch_size=plain.BATCH)
    again = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[fresh],
    )
    again.fit(Regression(), loader, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert list(gw.load(tmp_path / "again").steps) == list(range(plain.STEPS, 2 * plain.STEPS))


def test_the_run_goes_to_the_trainers_root_by_default(tmp_path: Path) -> None:
    fit(Regression(), GradWatch(), tmp_path)

    assert len(gw.load(tmp_path / "gradwatch").steps) == plain.STEPS


def test_nothing_is_left_on_the_model(tmp_path: Path) -> None:
    module = Regression()
    fit(module, GradWatch(run_dir=tmp_path / "lit"), tmp_path)

    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())
    assert not any(isinstance(child, nn.Module) and child._forward_hooks for child in module.modules())
