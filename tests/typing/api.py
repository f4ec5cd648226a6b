"""The public API as a typed user writes it: mypy and pyright in their strict modes check it, `test_api.py` runs it.

What stands behind `assert_type` is what an editor shows; an `Any` that leaks out of a public function fails here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gradwatch as gw
from gradwatch.alerts import Channel, Message, Outcome, Routing
from gradwatch.detectors import CATALOGUE, Detector, Engine, RunContext, replay
from gradwatch.heal import Candidate, Fork, Healing
from gradwatch.integrations.lightning import GradWatch as LightningGradWatch
from gradwatch.preflight import Preflight
from gradwatch.records import ActionRecord, Finding, Ints, RunInfo, Severity, StepBatch
from gradwatch.remedies import Change, initialize, insert_norm, mend_output, replace_activation
from gradwatch.reporters.compared import Comparison
from gradwatch.reporters.live import Live
from gradwatch.reporters.plots import Plots
from gradwatch.reporters.summary import Summary


class Net(nn.Module):
    """A network of the user."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class MyClip(gw.actions.InStepAction):
    """An action of the user, as the page on adding one shows."""

    def config(self) -> dict[str, Any]:
        return {}

    def decide(self, norms: Any, state: tuple[Any, ...], xp: gw.actions.Namespace) -> gw.actions.InStepDecision:
        return gw.actions.InStepDecision(scale=xp.minimum(1.0, 1.0 / xp.maximum(xp.sqrt(xp.sum(norms * norms)), 1e-6)))


class Printer(Channel):
    """A channel of the user."""

    def send(self, message: Message) -> None:
        assert_type(message.title, str)
        self.last = message.title


def loss_above_a_hundred(batch: StepBatch) -> Iterable[Finding]:
    """A rule of the user, as a function."""
    for step in batch.step[batch.metric("loss") > 100]:
        yield Finding(f"high:{step}", "divergence", "warning", int(step), int(step))


def told(message: Message) -> None:
    """An alert of the user, as a function."""
    assert_type(message.severity, Severity)


def watching(folder: Path) -> Path:
    """Train a network under a watcher with everything switched on."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    check = gw.preflight(model, x, y, nn.functional.mse_loss)
    assert_type(check, Preflight)
    assert_type(check.is_healthy, bool)
    assert_type(check.to_frame(), pd.DataFrame)
    with gw.watch(
        model,
        optimizer,
        run_dir=folder / "run",
        detectors=["exploding", CATALOGUE["vanishing"], loss_above_a_hundred],
        actions=[gw.Clip(max_norm=1.0), gw.SkipStep(), gw.DecayLR(factor=0.5, on="exploding"), MyClip()],
        alerts=[gw.alerts.Log(min_severity="critical", quiet_hours=("22:00", "07:00")), Printer(rules=["spike"]), told],
        sinks=[gw.sinks.TensorBoard(folder / "tb")],
        stats_every=5,
        preflight=check,
    ) as watcher:
        assert_type(watcher, gw.Watcher)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            watcher.log(loss=loss, accuracy=0.5, seen=np.float32(1))
        watcher.mark("done")
        assert_type(watcher.findings, list[Finding])
        assert_type(watcher.last_global_norm, float | None)
        assert_type(watcher.is_closed, bool)
        state = watcher.state_dict()
        assert_type(state, dict[str, Any])
        watcher.load_state_dict(state)
    assert_type(watcher.run_dir, Path)
    return watcher.run_dir


def observing(folder: Path) -> None:
    """Feed a watcher with arrays."""
    parameters = [gw.Parameter("conv1.weight", shape=(64, 3, 7, 7), layer="conv1", depth=0), gw.Parameter("fc.weight")]
    watcher = gw.Watcher(parameters, run_dir=str(folder / "fed"), actions="protect", check_every=1)
    norms: npt.NDArray[np.float32] = np.array([0.5, 2.0], np.float32)
    due = watcher.observe(grad_norm=norms, loss=0.7, lr=0.1)
    due += watcher.observe(step=1, grad_norm=[0.5, 2.0], statistics={"weight_norm": norms})
    for each in due:
        assert_type(each.lr_factor, float | None)
        watcher.applied(each)
    watcher.close("finished")


def reading(path: Path) -> None:
    """Read a run."""
    run = gw.load(path)
    assert_type(run, gw.Run)
    assert_type(run.info, RunInfo)
    assert_type(len(run), int)
    assert_type(run.span, tuple[int, int] | None)
    assert_type(run.steps, Ints)
    assert_type(run.grad_norms(by="layer", layers=["body.*"], steps=slice(0, 10)), pd.DataFrame)
    assert_type(run.statistic("weight_norm"), pd.DataFrame)
    assert_type(run.metrics(), pd.DataFrame)
    assert_type(run.findings(), pd.DataFrame)
    assert_type(run.actions(), pd.DataFrame)
    assert_type(run.parameters(), pd.DataFrame)
    assert_type(run.finding_list(), list[Finding])
    assert_type(run.action_list(), list[ActionRecord])
    steps, values, names = run.values("weight_norm")
    assert_type(steps, Ints)
    assert_type(values, npt.NDArray[np.float32])
    assert_type(names, tuple[str, ...])
    for batch in run.batches(10):
        assert_type(batch, StepBatch)
    assert_type(replay(run.batches(), Engine(["nonfinite"], RunContext(run.info.parameters))), list[Finding])


def reporting(path: Path) -> None:
    """Everything that is made from a run."""
    run = gw.load(path)
    summary = run.summary()
    assert_type(summary, Summary)
    assert_type(summary.verdict.headline, str)
    assert_type(str(summary), str)
    assert_type(run.plot, Plots)
    assert_type(run.plot.heatmap(layers="body.*"), Figure)
    assert_type(run.plot.timeline(theme="dark"), Figure)
    assert_type(run.report(path / "report.html"), Path)
    assert_type(run.live(every=1.0), Live)
    comparison = gw.compare([run, path, str(path)])
    assert_type(comparison, Comparison)
    assert_type(comparison.plot(), Figure)
    assert_type(comparison.report(path / "compare.md"), Path)


def alerting() -> None:
    """Channels by hand."""
    channel = gw.alerts.channel_named("log", cooldown=60.0)
    assert_type(channel, Channel)
    assert_type(channel.routing, Routing)
    assert_type(gw.alerts.alert_test([channel]), list[Outcome])
    assert_type(gw.alerts.verify_signature("secret", {}, b""), bool)


class Training:
    """A training that can be forked."""

    def __init__(self) -> None:
        self.model: nn.Module = Net()
        self.optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] = torch.optim.SGD(
            self.model.parameters(), lr=30.0
        )

    def step(self, k: int) -> Tensor:
        loss: Tensor = self.model(torch.ones(4, 4)).square().mean()
        self.model.zero_grad()
        loss.backward()
        for optimizer in self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]:
            optimizer.step()
        return loss.detach()


def healing() -> None:
    """Remedies by hand and by search."""
    tried = [Candidate("none"), Candidate("less", lr_factor=0.01)]
    found = gw.heal(Training, budget_steps=12, candidates=tried, progress=False)
    assert_type(found, Healing)
    assert_type(found.best, Fork)
    assert_type(found.best.loss, float)
    model = Net()
    changes: list[Sequence[Change]] = [
        initialize(model, "xavier"),
        replace_activation(model, nn.Tanh, "ReLU"),
        insert_norm(model),
        mend_output(model),
    ]
    assert_type(changes[0][0], Change)


def extending() -> None:
    """What a detector is told."""
    context = RunContext((gw.Parameter("fc.weight"),), framework="torch")
    detector = CATALOGUE["nonfinite"]()
    detector.start(context)
    assert_type(detector.config(), dict[str, Any])
    every: Sequence[type[Detector]] = list(CATALOGUE.values())
    assert every


def in_a_trainer(folder: Path) -> None:
    """Settings are known to the callbacks of trainers too."""
    LightningGradWatch(run_dir=folder, actions=[gw.Clip(max_norm=1.0)], resume=False)


def failing(folder: Path) -> None:
    """Errors by their types."""
    try:
        gw.load(folder / "nothing")
    except gw.GradwatchError as error:
        assert_type(error, gw.GradwatchError)
