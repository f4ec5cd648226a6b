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
    from accelerate import Accelerator

from gradwatch.integrations.accelerate import watch

pytestmark = [
    pytest.mark.framework("transformers"),  # whose extra brings accelerate
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def train(
    run_dir: Path,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    rate: float = plain.RATE,
    epochs: int = 1,
    net: torch.nn.Module | None = None,
    **settings: Any,
) -> torch.nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net = net or plain.model()
    x, y = plain.data()
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=rate))
    watcher = watch(accelerator, net, optimizer, run_dir=run_dir, **settings)
    assert watcher is not None
    with watcher:
        for step in range(epochs * plain.STEPS):
            rows = slice(step % plain.STEPS * plain.BATCH, (step % plain.STEPS + 1) * plain.BATCH)
            with accelerator.accumulate(net):
                loss = plain.loss_of(net(x[rows]), y[rows])
                accelerator.backward(loss)
                if accelerator.sync_gradients and max_norm is not None:
                    accelerator.clip_grad_norm_(net.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                watcher.log(loss=loss)
    return net


def test_norms_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    train(tmp_path / "accelerate")
    plain.train(tmp_path / "plain")

    np.testing.assert_array_equal(plain.norms(tmp_path / "accelerate"), plain.norms(tmp_path / "plain"))


def test_accumulated_batches_make_one_row(tmp_path: Path) -> None:
    train(tmp_path / "accelerate", accumulate=3)
    plain.train(tmp_path / "plain", accumulate=3)

    np.testing.assert_allclose(plain.norms(tmp_path / "accelerate"), plain.norms(tmp_path / "plain"), rtol=1e-6)


def test_norms_are_those_before_accelerate_clips(tmp_path: Path) -> None:
    train(tmp_path / "accelerate", max_norm=0.5)
    plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(plain.norms(tmp_path / "accelerate"), plain.norms(tmp_path / "plain"), rtol=1e-6)
    plain.assert_clipped_to(tmp_path / "accelerate", 0.5)


def test_clip_is_that_of_the_plain_loop(tmp_path: Path) -> None:
    net = train(tmp_path / "accelerate", actions=[gw.Clip(max_norm=0.5)])

    assert plain.same_weights(net, plain.train(tmp_path / "plain", actions=[gw.Clip(max_norm=0.5)]))


def test_a_poisoned_batch_is_skipped(tmp_path: Path) -> None:
    net = train(tmp_path / "accelerate", net=plain.Poisoned(), actions=[gw.SkipStep()])

    assert plain.skipped(tmp_path / "accelerate") == [5]
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())


def test_the_learning_rate_is_lowered(tmp_path: Path) -> None:
    train(tmp_path / "accelerate", rate=2.0, epochs=5, actions=[gw.DecayLR()], stats_every=1)

    assert plain.was_decayed(tmp_path / "accelerate", 2.0)


def test_stop_leaves_the_loop(tmp_path: Path) -> None:
    with pytest.raises(gw.StopTraining, match="training stopped"):
        train(tmp_path / "accelerate", rate=100.0, epochs=20, actions=[gw.Stop()])
