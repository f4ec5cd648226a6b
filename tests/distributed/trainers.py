"""Trainings by other libraries on several processes. Each function runs on every rank."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import gradwatch as gw
from gradwatch.errors import ConfigurationError
from gradwatch.integrations.torch_distributed import RankWatcher
from tests.integrations import plain


def _told_by_environment() -> tuple[int, int]:
    """Rank and number, also told as torchrun tells them."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", ACCELERATE_USE_CPU="true", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test")
    warnings.simplefilter("ignore")  # of the libraries' own imports
    return rank, count


def _found(watcher: Any, net: nn.Module, run_dir: str) -> dict[str, Any]:
    assert isinstance(watcher, RankWatcher)
    assert not watcher.faults.messages, watcher.faults.messages
    found: dict[str, Any] = {"weights": [parameter.detach().numpy() for parameter in net.parameters()]}
    found["talks"] = watcher._ranks is not None
    if distributed.get_rank() == 0:
        run = gw.load(run_dir)
        found |= {"norms": run.grad_norms().to_numpy(), "names": list(run.grad_norms().columns)}
        found |= {"world_size": run.info.world_size, "marks": run.events("mark")}
        found |= {"clip_coefficient": run.metrics()["clip_coefficient"].to_numpy()}
    distributed.barrier()
    return found


def accelerate(run_dir: str, **settings: Any) -> dict[str, Any]:
    """The plain loop, prepared."""
    rank, count = _told_by_environment()
    from accelerate import Accelerator

    from gradwatch.integrations.accelerate import watch

    accelerator = Accelerator(cpu=True)
    net, (x, y) = plain.model(), plain.data()
    wrapped, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=plain.RATE))
    size = plain.BATCH // count
    with watch(accelerator, wrapped, optimizer, run_dir=run_dir, **settings) as watcher:
        for step in range(plain.STEPS):
            start = step * plain.BATCH + rank * size
            loss = plain.loss_of(wrapped(x[start : start + size]), y[start : start + size])
            accelerator.backward(loss)
            optimizer.step()
            watcher.log(loss=loss)
            optimizer.zero_grad()
    return _found(watcher, net, run_dir)


class _Regression(nn.Module):
    """What the Trainer expects of a model: a dictionary with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain.model()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": plain.loss_of(self.net(x), y)}


def transformers(run_dir: str, **settings: Any) -> dict[str, Any]:
    """A `Trainer`, which hands the model inside its DistributedDataParallel to callbacks."""
    watcher, model = _trained_by_transformers(run_dir, settings)
    return _found(watcher, model, run_dir)


def transformers_with_deepspeed(run_dir: str, stage: int) -> Any:
    """A `Trainer` that trains by an engine of DeepSpeed, which it does not hand over either."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto",
    }
    more = {"deepspeed": config, "use_cpu": False, "max_grad_norm": 0.5}
    watcher, _ = _trained_by_transformers(run_dir, {"flush_every": 5}, **more)
    assert not watcher.faults.messages, watcher.faults.messages
    distributed.barrier()
    return gw.load(run_dir).grad_norms().to_numpy() if distributed.get_rank() == 0 else None


def _trained_by_transformers(run_dir: str, settings: dict[str, Any], **more: Any) -> tuple[Any, nn.Module]:
    _, count = _told_by_environment()
    if not more.get("use_cpu", True):
        del os.environ["ACCELERATE_USE_CPU"]
    from transformers import Trainer, TrainingArguments

    from gradwatch.integrations.transformers import GradWatch

    class InOrder(Trainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(range(plain.STEPS * plain.BATCH))

    callback = GradWatch(run_dir=run_dir, **settings)
    model, (x, y) = _Regression(), plain.data()
    InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(run_dir).parent / "out"),
            per_device_train_batch_size=plain.BATCH // count,
            learning_rate=plain.RATE, num_train_epochs=1, lr_scheduler_type="constant",
            optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True,
            **{"use_cpu": True, "max_grad_norm": 0.0, **more},
        ),
        train_dataset=[{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
        callbacks=[callback],
    ).train()  # fmt: skip
    return callback.watcher, model


def lightning(run_dir: str, **settings: Any) -> dict[str, Any]:
    """A `LightningModule` under the strategy `ddp`."""
    rank, count = _told_by_environment()
    import pytorch_lightning as pl

    from gradwatch.integrations.lightning import GradWatch

    size = plain.BATCH // count

    class Module(pl.LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.net = plain.model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            return plain.loss_of(self.net(x[0, rank * size :][:size]), y[0, rank * size :][:size])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=plain.RATE)

    x, y = plain.data()
    batches = torch.utils.data.TensorDataset(x.view(plain.STEPS, plain.BATCH, -1), y.view(plain.STEPS, plain.BATCH, -1))
    callback, module = GradWatch(run_dir=run_dir, **settings), Module()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", strategy="ddp", devices=count, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=str(Path(run_dir).parent),
        callbacks=[callback],  # type: ignore[list-item, unused-ignore]  # of the older name of the package
    ).fit(module, torch.utils.data.DataLoader(batches, batch_size=1))  # fmt: skip
    return _found(callback.watcher, module, run_dir)


def _engine(net: nn.Module, size: int, *, stage: int, **config: Any) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD(net.parameters(), lr=plain.RATE)
    settings = {"train_micro_batch_size_per_gpu": size, "zero_allow_untested_optimizer": True, **config}
    settings["zero_optimization"] = {"stage": stage}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    return engine


def deepspeed_with_actions(run_dir: str) -> str:
    """What is said to somebody who wants to act."""
    _told_by_environment()
    with pytest.raises(ConfigurationError) as told:
        gw.watch(_engine(plain.model(), 4, stage=1), run_dir=run_dir, actions=[gw.Clip(max_norm=1.0)])
    return str(told.value)


def deepspeed(run_dir: str, *, stage: int, clip: float, accumulate: int) -> dict[str, Any]:
    """An engine with ZeRO; its loop is the plain one, in parts."""
    rank, count = _told_by_environment()
    net, (x, y) = plain.model(), plain.data()
    size = plain.BATCH // count // accumulate
    engine = _engine(net, size, gradient_accumulation_steps=accumulate, gradient_clipping=clip, stage=stage)
    with gw.watch(engine, run_dir=run_dir, flush_every=5) as watcher:
        for step in range(plain.STEPS):
            for micro in range(accumulate):
                start = step * plain.BATCH + (rank * accumulate + micro) * size
                loss = plain.loss_of(engine(x[start : start + size]), y[start : start + size])
                engine.backward(loss)
                engine.step()
            watcher.log(loss=loss)
    assert not watcher.faults.messages, watcher.faults.messages
    assert "step" not in engine.__dict__
    found: dict[str, Any] = {}
    if rank == 0:
        run = gw.load(run_dir)
        found = {"norms": run.grad_norms().to_numpy(), "metrics": run.metrics().to_dict("list")}
        found |= {"shapes": [parameter.shape for parameter in run.info.parameters], "marks": run.events("mark")}
    distributed.barrier()
    return found
