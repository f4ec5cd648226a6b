import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradwatch as gw
from tests.integrations import plain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library's own imports
    from ignite.engine import Engine

from gradwatch.integrations.ignite import GradWatch

pytestmark = [pytest.mark.framework("ignite"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def train(
    run_dir: Path,
    *,
    rate: float = plain.RATE,
    epochs: int = 1,
    fail_at: int = -1,
    net: torch.nn.Module | None = None,
    max_norm: float | None = None,
    **settings: Any,
) -> Engine:
    net, (x, y) = net or plain.model(), plain.data()
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)

    def step(engine: Engine, rows: slice) -> float:
        if engine.state.iteration == fail_at:
            raise ValueError("bad sample")
        optimizer.zero_grad()
        loss = plain.loss_of(net(x[rows]), y[rows])
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        return loss.item()

    engine = Engine(step)
    GradWatch(net, optimizer, run_dir=run_dir, **settings).attach(engine)
    engine.run([slice(i * plain.BATCH, (i + 1) * plain.BATCH) for i in range(plain.STEPS)], max_epochs=epochs)
    return engine


def test_norms_and_losses_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    train(tmp_path / "ignite")
    plain.train(tmp_path / "plain")

    np.testing.assert_array_equal(plain.norms(tmp_path / "ignite"), plain.norms(tmp_path / "plain"))
    np.testing.assert_array_equal(plain.losses(tmp_path / "ignite"), plain.losses(tmp_path / "plain"))
    assert gw.load(tmp_path / "ignite").info.status == "finished"


def test_stop_terminates_the_engine(tmp_path: Path) -> None:
    engine = train(tmp_path / "ignite", rate=100.0, epochs=20, actions=[gw.Stop()])

    assert engine.state.epoch < 20
    assert gw.load(tmp_path / "ignite").info.status == "finished"


def test_a_failure_is_in_the_record_and_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad sample"):
        train(tmp_path / "ignite", fail_at=3)

    assert gw.load(tmp_path / "ignite").info.status_detail == "ValueError: bad sample"


def test_norms_are_those_before_the_process_function_clips(tmp_path: Path) -> None:
    train(tmp_path / "ignite", max_norm=0.5)
    plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(plain.norms(tmp_path / "ignite"), plain.norms(tmp_path / "plain"), rtol=1e-6)


def test_clip_is_that_of_clip_grad_norm(tmp_path: Path) -> None:
    net, same = plain.model(), plain.train(tmp_path / "plain", max_norm=0.5)
    train(tmp_path / "ignite", net=net, actions=[gw.Clip(max_norm=0.5)])

    for ours, theirs in zip(net.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_poisoned_batch_is_skipped(tmp_path: Path) -> None:
    net = plain.Poisoned()
    train(tmp_path / "ignite", net=net, actions=[gw.SkipStep()])

    assert plain.skipped(tmp_path / "ignite") == [5]
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())


def test_the_learning_rate_is_lowered(tmp_path: Path) -> None:
    train(tmp_path / "ignite", rate=2.0, epochs=5, actions=[gw.DecayLR()], stats_every=1)

    assert plain.was_decayed(tmp_path / "ignite", 2.0)
