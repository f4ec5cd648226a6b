from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skorch
import torch
from sklearn.base import clone
from skorch.callbacks import GradientNormClipping
from torch import Tensor, nn

import gradwatch as gw
from gradwatch.integrations.skorch import GradWatch
from tests.integrations import plain

pytestmark = pytest.mark.framework("skorch")


def net_of(*callbacks: Any, module: Any = plain.model, **given: Any) -> skorch.NeuralNet:
    settings = {"lr": plain.RATE, "max_epochs": 1, "train_split": None, **given}
    return skorch.NeuralNet(
        module, criterion=nn.MSELoss, batch_size=plain.BATCH, callbacks=list(callbacks), verbose=0, **settings
    )


def train(run_dir: Path, *callbacks: Any, net: dict[str, Any] | None = None, **settings: Any) -> skorch.NeuralNet:
    fitted = net_of(GradWatch(run_dir=run_dir, **settings), *callbacks, **(net or {}))
    return fitted.fit(*plain.data())


def test_norms_losses_and_weights_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    net = train(tmp_path / "skorch")
    model = plain.train(tmp_path / "plain")

    np.testing.assert_array_equal(plain.norms(tmp_path / "skorch"), plain.norms(tmp_path / "plain"))
    np.testing.assert_array_equal(plain.losses(tmp_path / "skorch"), plain.losses(tmp_path / "plain"))
    assert plain.same_weights(net.module_, model)
    assert gw.load(tmp_path / "skorch").info.status == "finished"


def test_norms_are_those_before_skorch_clips(tmp_path: Path) -> None:
    train(tmp_path / "skorch", GradientNormClipping(0.5))
    plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(plain.norms(tmp_path / "skorch"), plain.norms(tmp_path / "plain"), rtol=1e-6)
    plain.assert_clipped_to(tmp_path / "skorch", 0.5)


def test_clip_is_that_of_clip_grad_norm(tmp_path: Path) -> None:
    net = train(tmp_path / "skorch", actions=[gw.Clip(max_norm=0.5)])
    model = plain.train(tmp_path / "plain", max_norm=0.5)

    for ours, theirs in zip(net.module_.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_poisoned_batch_is_skipped(tmp_path: Path) -> None:
    net = train(tmp_path / "skorch", net={"module": plain.Poisoned}, actions=[gw.SkipStep()])

    assert plain.skipped(tmp_path / "skorch") == [5]
    assert all(torch.isfinite(parameter).all() for parameter in net.module_.parameters())


def test_the_learning_rate_is_lowered_and_the_optimizer_keeps_its_own(tmp_path: Path) -> None:
    net = train(tmp_path / "skorch", net={"lr": 2.0, "max_epochs": 5}, actions=[gw.DecayLR()], stats_every=1)

    assert plain.was_decayed(tmp_path / "skorch", 2.0)
    assert net.optimizer_.param_groups[0]["lr"] == 2.0


def test_stop_ends_the_fit_as_early_stopping_does(tmp_path: Path) -> None:
    net = train(tmp_path / "skorch", net={"lr": 100.0, "max_epochs": 20}, actions=[gw.Stop()])

    assert len(net.history) < 20
    assert gw.load(tmp_path / "skorch").info.status == "finished"


def test_partial_fit_goes_on_with_the_run_and_fit_begins_another(tmp_path: Path) -> None:
    net = train(tmp_path / "skorch")
    net.partial_fit(*plain.data())

    assert list(gw.load(tmp_path / "skorch").steps) == list(range(2 * plain.STEPS))
    with pytest.raises(gw.errors.RunExistsError, match="overwrite=True"):
        net.fit(*plain.data())


def test_the_validation_loss_stands_at_the_last_step_of_its_epoch(tmp_path: Path) -> None:
    train(tmp_path / "skorch", net={"train_split": skorch.dataset.ValidSplit(4), "max_epochs": 2})

    noted = gw.load(tmp_path / "skorch").metrics()["valid_loss"]
    per_epoch = plain.STEPS * 3 // 4
    assert list(noted.index[noted.notna()]) == [per_epoch - 1, 2 * per_epoch - 1]


def test_a_failed_fit_is_closed_as_crashed_by_the_next(tmp_path: Path) -> None:
    net = net_of(GradWatch(run_dir=tmp_path / "skorch"))
    x, y = plain.data()
    with pytest.raises(RuntimeError):
        net.fit(x[:, :3], y)
    net.set_params(callbacks__GradWatch__run_dir=tmp_path / "again")
    net.fit(x, y)

    assert gw.load(tmp_path / "skorch").info.status_detail == "fit() ended early"
    assert len(gw.load(tmp_path / "again").steps) == plain.STEPS


def test_a_clone_has_the_same_settings(tmp_path: Path) -> None:
    net = clone(net_of(GradWatch(run_dir=tmp_path / "skorch", stats_every=3)))
    net.fit(*plain.data())

    assert gw.load(tmp_path / "skorch").info.config["stats_every"] == 3


def test_several_modules_are_told_apart_by_their_names(tmp_path: Path) -> None:
    class Two(skorch.NeuralNet):  # type: ignore[misc]  # skorch has no types
        def initialize_module(self) -> "Two":
            super().initialize_module()
            self.head_ = nn.Linear(1, 1)
            return self

        def infer(self, x: Tensor, **_: Any) -> Tensor:
            output: Tensor = self.head_(self.module_(x))
            return output

    watching = GradWatch(run_dir=tmp_path / "skorch")
    net = Two(plain.model, criterion=nn.MSELoss, callbacks=[watching], train_split=None, max_epochs=1, verbose=0)
    net.fit(*plain.data())

    names = list(gw.load(tmp_path / "skorch").grad_norms().columns)
    assert {"module.0.weight", "head.weight"} <= set(names)
