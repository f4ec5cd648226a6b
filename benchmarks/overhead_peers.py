"""Other tools, each set to record the norm of every parameter (or what it has instead) at every step.

The calls are those of the tools' own documentation. A tool takes part where its package is installed: `PACKAGES` names
it, and `environments/` the sets of packages that go together.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import os
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from benchmarks.overhead_training import Step, Training, Variant


def lightning(training: Training, stack: ExitStack) -> Step:
    """Lightning's `grad_norm` utility, as its documentation calls it in `on_before_optimizer_step`; kept in memory."""
    from lightning.pytorch.utilities import grad_norm

    kept: list[dict[str, float]] = []

    def step() -> None:
        training.backward()
        kept.append(grad_norm(training.model, norm_type=2))
        training.optimizer.step()

    return step


def lightning_csv(training: Training, stack: ExitStack) -> Step:
    """The same, recorded as its Trainer does with `log_every_n_steps=1`: by its CSVLogger."""
    from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import grad_norm

    logger, count = CSVLogger(str(training.folder)), iter(range(10**9))

    def step() -> None:
        training.backward()
        metrics = convert_tensors_to_scalars(grad_norm(training.model, norm_type=2))
        logger.log_metrics(metrics, step=next(count))
        logger.save()
        training.optimizer.step()

    return step


def composer(training: Training, stack: ExitStack) -> Step:
    """The metrics of Composer's OptimizerMonitor, without its Trainer: norms of gradients by parameter, and global."""
    from composer.callbacks import OptimizerMonitor

    kept: list[dict[str, float]] = []
    monitor = OptimizerMonitor(log_optimizer_metrics=False, batch_log_interval=1)
    logger = SimpleNamespace(log_metrics=kept.append)
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=0))
    state = SimpleNamespace(
        model=training.model, optimizers=[training.optimizer], fsdp_enabled=False, timestamp=timestamp
    )

    def step() -> None:
        training.backward()
        monitor.batch_end(state, logger)
        training.optimizer.step()

    return step


def ignite(training: Training, stack: ExitStack) -> Step:
    """Ignite's `GradsScalarHandler` with the TensorBoard logger, on every iteration of its Engine."""
    import torch
    from ignite.engine import Engine, Events
    from ignite.handlers.tensorboard_logger import GradsScalarHandler, TensorboardLogger

    def iteration(engine: Any, batch: Any) -> None:
        training.backward()
        training.optimizer.step()

    engine = Engine(iteration)
    logger = stack.enter_context(TensorboardLogger(log_dir=str(training.folder)))
    handler = GradsScalarHandler(training.model, reduction=torch.norm)
    logger.attach(engine, log_handler=handler, event_name=Events.ITERATION_COMPLETED)

    def step() -> None:
        engine.state.iteration += 1
        iteration(engine, None)
        engine.fire_event(Events.ITERATION_COMPLETED)

    return step


def tensorboard_histograms(training: Training, stack: ExitStack) -> Step:
    """`SummaryWriter.add_histogram` for every gradient."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(training.folder))
    stack.callback(writer.close)
    named, count = training.trained(), iter(range(10**9))

    def step() -> None:
        training.backward()
        number = next(count)
        for name, parameter in named:
            writer.add_histogram(name, parameter.grad, number)
        training.optimizer.step()

    return step


def wandb(training: Training, stack: ExitStack) -> Step:
    """`wandb.watch` of gradients, offline, logged at every step."""
    import wandb as package

    os.environ["WANDB_SILENT"] = "true"
    run = package.init(mode="offline", dir=str(training.folder))
    stack.callback(run.finish)
    run.watch(training.model, log="gradients", log_freq=1)

    def step() -> None:
        loss = training.backward()
        training.optimizer.step()
        run.log({"loss": loss.detach()})

    return step


def trainscope(training: Training, stack: ExitStack) -> Step:
    """TrainScope with its defaults, which measure every step."""
    from trainscope import TrainScope, TrainScopeConfig

    config = TrainScopeConfig(run_dir=str(training.folder))
    scope = TrainScope(training.model, training.optimizer, config).attach()
    stack.callback(scope.detach)

    def step() -> None:
        loss = training.backward()
        scope.step(loss)
        training.optimizer.step()

    return step


def pulsegrad(training: Training, stack: ExitStack) -> Step:
    """PulseGrad set to every step (its default is every tenth)."""
    import pulsegrad as package

    os.environ["PULSEGRAD_CONSOLE"] = "off"
    session = package.watch(training.model, training.optimizer, k=1, run_dir=training.folder)
    stack.callback(session.close)

    def step() -> None:
        training.backward()
        training.optimizer.step()

    return step


def torchmortem(training: Training, stack: ExitStack) -> Step:
    """Torchmortem with its defaults, which measure every step (gradients of activations)."""
    from torchmortem import Autopsy

    autopsy = Autopsy(training.model, optimizer=training.optimizer)
    autopsy.attach()
    stack.callback(autopsy.detach)

    def step() -> None:
        loss = training.backward()
        training.optimizer.step()
        autopsy.step(loss=float(loss))

    return step


def stabilityguard(training: Training, stack: ExitStack) -> Step:
    """StabilityGuard around the optimizer."""
    from stabilityguard import GuardedOptimizer

    optimizer = GuardedOptimizer(training.optimizer, training.model, log_dir=str(training.folder), verbose=False)
    stack.callback(optimizer.close)

    def step() -> None:
        loss = training.backward()
        optimizer.step(loss=float(loss))

    return step


def cockpit(training: Training, stack: ExitStack) -> Step:
    """Cockpit's `GradNorm` at every step."""
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.quantities import GradNorm
    from cockpit.utils.schedules import linear

    extend(training.model)
    parameters = [parameter for _, parameter in training.trained()]
    package = Cockpit(parameters, quantities=[GradNorm(track_schedule=linear(1))])
    count = iter(range(10**9))

    def step() -> None:
        training.optimizer.zero_grad()
        loss = training.case.loss(training.model(training.inputs), training.targets)
        info = {"batch_size": len(training.inputs), "optimizer": training.optimizer, "loss": loss}
        with package(next(count), info=info):
            loss.backward(create_graph=False)
        training.optimizer.step()

    return step


PEERS: dict[str, Variant] = {
    "Lightning grad_norm": lightning,
    "Lightning grad_norm, CSVLogger": lightning_csv,
    "Composer OptimizerMonitor": composer,
    "Ignite GradsScalarHandler": ignite,
    "TensorBoard add_histogram": tensorboard_histograms,
    "wandb.watch (offline)": wandb,
    "TrainScope": trainscope,
    "PulseGrad, k=1": pulsegrad,
    "torchmortem": torchmortem,
    "StabilityGuard": stabilityguard,
    "Cockpit GradNorm": cockpit,
}
#: Each peer's distribution.
PACKAGES = {
    "Lightning grad_norm": "lightning",
    "Lightning grad_norm, CSVLogger": "lightning",
    "Composer OptimizerMonitor": "mosaicml",
    "Ignite GradsScalarHandler": "pytorch-ignite",
    "TensorBoard add_histogram": "tensorboard",
    "wandb.watch (offline)": "wandb",
    "TrainScope": "trainscope",
    "PulseGrad, k=1": "pulsegrad",
    "torchmortem": "torchmortem",
    "StabilityGuard": "stabilityguard",
    "Cockpit GradNorm": "cockpit-for-pytorch",
}


def installed() -> dict[str, str]:
    """The peers that can take part here, with their versions."""
    found = {}
    for name, package in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(package)
    return found


def quietly() -> contextlib.AbstractContextManager[Any]:
    """What the peers print and log does not belong into the table."""
    logging.disable(logging.WARNING)
    return contextlib.redirect_stdout(io.StringIO())
