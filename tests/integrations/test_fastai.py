import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradwatch as gw
from gradwatch.errors import ConfigurationError
from tests.extras import CHOSEN
from tests.integrations import plain

if "fastai" in CHOSEN["needs"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from fastai import optimizer as fastai_optimizer
        from fastai.callback.training import GradientAccumulation, GradientClip
        from fastai.data.core import DataLoaders
        from fastai.data.load import DataLoader
        from fastai.learner import Learner

    from gradwatch.integrations.fastai import GradWatch

pytestmark = [pytest.mark.needs("fastai"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def learner(run_dir: Path, *callbacks: Any, model: Any = None, opt_func: Any = None, **settings: Any) -> Any:
    batches = DataLoader(TensorDataset(*plain.data()), bs=plain.BATCH, shuffle=False)
    return Learner(
        DataLoaders(batches, batches, device=torch.device("cpu")),
        model or plain.model(),
        loss_func=nn.MSELoss(),
        opt_func=opt_func or fastai_optimizer.SGD,
        lr=plain.RATE,
        train_bn=False,
        cbs=[GradWatch(run_dir=run_dir, **settings), *callbacks],
    )


def fit(learn: Any, epochs: int = 1, **given: Any) -> Any:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, wd=0.0, **given)
    return learn


def wrapped() -> Any:
    return partial(fastai_optimizer.OptimWrapper, opt=torch.optim.SGD)


@pytest.mark.parametrize("opt_func", [lambda: fastai_optimizer.SGD, wrapped], ids=["own", "wrapped"])
def test_norms_losses_and_weights_are_those_of_the_plain_loop(tmp_path: Path, opt_func: Any) -> None:
    learn = fit(learner(tmp_path / "fastai", opt_func=opt_func()))
    model = plain.train(tmp_path / "plain")

    np.testing.assert_array_equal(plain.norms(tmp_path / "fastai"), plain.norms(tmp_path / "plain"))
    np.testing.assert_array_equal(plain.losses(tmp_path / "fastai"), plain.losses(tmp_path / "plain"))
    assert plain.same_weights(learn.model, model)
    assert "step" not in vars(learn.opt)
    assert gw.load(tmp_path / "fastai").info.status == "finished"


def test_norms_are_those_before_fastai_clips(tmp_path: Path) -> None:
    fit(learner(tmp_path / "fastai", GradientClip(0.5)))
    plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(plain.norms(tmp_path / "fastai"), plain.norms(tmp_path / "plain"), rtol=1e-6)
    plain.assert_clipped_to(tmp_path / "fastai", 0.5)


def test_accumulated_batches_make_one_row(tmp_path: Path) -> None:
    fit(learner(tmp_path / "fastai", GradientAccumulation(3 * plain.BATCH)))
    plain.train(tmp_path / "plain", accumulate=3)

    np.testing.assert_allclose(plain.norms(tmp_path / "fastai"), plain.norms(tmp_path / "plain"), rtol=1e-6)


def test_clip_is_that_of_clip_grad_norm(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path / "fastai", actions=[gw.Clip(max_norm=0.5)]))
    model = plain.train(tmp_path / "plain", max_norm=0.5)

    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_poisoned_batch_is_skipped(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path / "fastai", model=plain.Poisoned(), actions=[gw.SkipStep()]))

    assert plain.skipped(tmp_path / "fastai") == [5]
    assert all(torch.isfinite(parameter).all() for parameter in learn.model.parameters())


def test_the_learning_rate_is_lowered_and_the_optimizer_keeps_its_own(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path / "fastai", actions=[gw.DecayLR()], stats_every=1), 5, lr=2.0)

    assert plain.was_decayed(tmp_path / "fastai", 2.0)
    assert learn.opt.hypers[0]["lr"] == 2.0


def test_stop_cancels_the_fit(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path / "fastai", actions=[gw.Stop()]), 20, lr=100.0)

    assert learn.epoch < 19
    assert gw.load(tmp_path / "fastai").info.status == "finished"


def test_a_second_fit_goes_on_with_the_run(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path / "fastai"))
    fit(learn)

    assert list(gw.load(tmp_path / "fastai").steps) == list(range(2 * plain.STEPS))


def test_predictions_are_no_training(tmp_path: Path) -> None:
    learn = learner(tmp_path / "fastai")
    with learn.no_bar(), learn.no_logging():
        learn.get_preds()

    assert not (tmp_path / "fastai").exists()


def test_actions_on_weights_ask_for_an_optimizer_of_torch(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Rollback needs an optimizer of torch, in an OptimWrapper"):
        fit(learner(tmp_path / "fastai", actions=[gw.Rollback()]))
