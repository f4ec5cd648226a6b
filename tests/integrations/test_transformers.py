import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch as gw
from tests.integrations import plain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library's own imports
    from transformers import Trainer, TrainingArguments

from gradwatch.integrations.transformers import GradWatch

pytestmark = [
    pytest.mark.framework("transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


class Regression(nn.Module):
    """What the Trainer expects of a model: a dictionary with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain.model()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        output = self.net(x)
        return {"loss": plain.loss_of(output, y), "logits": output}


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(range(plain.STEPS * plain.BATCH))


def train(
    run_dir: Path, tmp_path: Path, *, model: nn.Module | None = None, **arguments: Any
) -> tuple[Trainer, nn.Module]:
    settings = arguments.pop("settings", {})
    model = model or Regression()
    x, y = plain.data()
    given = {"learning_rate": plain.RATE, "max_grad_norm": 0.0, "num_train_epochs": 1, **arguments}
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=plain.BATCH,
            lr_scheduler_type="constant",
            optim="sgd",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=4,
            disable_tqdm=True,
            **given,
        ),
        train_dataset=[{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
        callbacks=[GradWatch(run_dir=run_dir, **settings)],
    )
    trainer.train()
    return trainer, model


def test_norms_and_losses_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    train(tmp_path / "hf", tmp_path)
    plain.train(tmp_path / "plain")

    np.testing.assert_allclose(plain.norms(tmp_path / "hf"), plain.norms(tmp_path / "plain"), rtol=1e-6)
    np.testing.assert_allclose(plain.losses(tmp_path / "hf"), plain.losses(tmp_path / "plain"), rtol=1e-6)


def test_norms_are_those_before_the_trainer_clips(tmp_path: Path) -> None:
    train(tmp_path / "hf", tmp_path, max_grad_norm=0.5)
    plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(plain.norms(tmp_path / "hf"), plain.norms(tmp_path / "plain"), rtol=1e-6)
    plain.assert_clipped_to(tmp_path / "hf", 0.5)


def test_accumulated_batches_make_one_row_with_their_mean_loss(tmp_path: Path) -> None:
    train(tmp_path / "hf", tmp_path, gradient_accumulation_steps=3)

    run = gw.load(tmp_path / "hf")
    assert len(run.steps) == plain.STEPS // 3
    assert np.isfinite(run.metrics()["loss"]).all()


def test_the_global_norm_is_in_the_trainers_log(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path / "hf", tmp_path)

    logged = [entry for entry in trainer.state.log_history if "gradwatch/global_norm" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]


def test_a_poisoned_batch_is_skipped_and_its_loss_is_not_hidden(tmp_path: Path) -> None:
    class Poisoned(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            output = super().forward(x, y)
            output["loss"] = output["loss"] * (float("nan") if self.seen == 5 else 1.0)
            self.seen += 1
            return output

    _, model = train(tmp_path / "hf", tmp_path, model=Poisoned(), settings={"actions": [gw.SkipStep()]})

    metrics = gw.load(tmp_path / "hf").metrics()
    assert list(metrics.index[metrics["skipped"] > 0]) == [5]
    assert np.isnan(metrics["loss"][5])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_clip_is_that_of_clip_grad_norm(tmp_path: Path) -> None:
    _, model = train(tmp_path / "hf", tmp_path, settings={"actions": [gw.Clip(max_norm=0.5)]})
    same = plain.train(tmp_path / "plain", max_norm=0.5)

    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_learning_rate_is_lowered_under_the_trainers_schedule(tmp_path: Path) -> None:
    settings = {"actions": [gw.DecayLR()], "stats_every": 1}
    train(tmp_path / "hf", tmp_path, settings=settings, learning_rate=2.0, num_train_epochs=5)

    assert plain.was_decayed(tmp_path / "hf", 2.0)


def test_stop_ends_the_training_through_the_control(tmp_path: Path) -> None:
    trainer, _ = train(
        tmp_path / "hf", tmp_path, settings={"actions": [gw.Stop()]}, learning_rate=100.0, num_train_epochs=20
    )

    assert trainer.state.global_step < 20 * plain.STEPS
    assert gw.load(tmp_path / "hf").info.status == "finished"


def test_nothing_is_left_on_the_model(tmp_path: Path) -> None:
    _, model = train(tmp_path / "hf", tmp_path)

    assert not model._forward_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
