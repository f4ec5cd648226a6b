"""Small real trainings that use every part of gradwatch, and what they leave: parameters, optimizers, random state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradwatch as gw
from gradwatch.alerts.message import Message
from gradwatch.records import ActionRecord, Finding, RunInfo, StepBatch
from gradwatch.sinks.base import Sink
from gradwatch.sinks.rows import Row

STEPS = 12
#: At this step the loop meets a batch that it leaves out, at this one our own rule finds something.
BAD_BATCH, OWN_FINDING = 7, 4


@dataclass
class Scene:
    """One training.

    Args:
        model: What is trained.
        optimizers: What `watch` is told of.
        everything: Whatever has state.
        step: Does step k; told the loss.
        settings: Of `watch`.
    """

    model: nn.Module
    optimizers: Any
    everything: tuple[Any, ...]
    step: Callable[[int, Callable[..., None]], None]
    settings: dict[str, Any]

    def digest(self) -> str:
        """Of the bytes of all parameters and buffers, all states and the random state."""
        digest = hashlib.sha256()
        for part in (*(each.state_dict() for each in self.everything), torch.get_rng_state()):
            for piece in _bytes(part):
                digest.update(piece)
        return digest.hexdigest()


def _bytes(part: Any) -> Iterator[bytes]:
    if isinstance(part, Tensor):
        yield (
            part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if part.dim()
            else bytes(part.detach().reshape(1).view(torch.uint8).numpy())
        )
    elif isinstance(part, dict):
        for name in part:
            yield repr(name).encode()
            yield from _bytes(part[name])
    elif isinstance(part, (list, tuple)):
        for each in part:
            yield from _bytes(each)
    else:
        yield repr(part).encode()


class Heard:
    """Takes what an alert or a sink is told."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.steps: list[int] = []

    def message(self, message: Message) -> None:
        """An alert."""
        self.rules += [group.rule for group in message.groups]


class Mirror(Sink):
    """A sink that keeps the steps it is told."""

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.heard = heard

    def begin(self, info: RunInfo, run_dir: Path) -> None:
        """The run begins."""

    def write(self, rows: list[Row]) -> None:
        """Keep steps."""
        self.heard.steps += [row.step for row in rows]

    def tell(self, news: Finding | ActionRecord) -> None:
        """Keep rules."""
        if isinstance(news, Finding):
            self.heard.rules.append(news.rule)

    def end(self, status: str) -> None:
        """The run ends."""


def own_rule(batch: StepBatch) -> Iterable[Finding]:
    """A rule of the user's own."""
    if OWN_FINDING in batch.step:
        yield Finding("own", "own", "warning", OWN_FINDING, OWN_FINDING, message="found by the user's own rule")


def _batches(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 6, generator=draw), torch.randn(8, 3, generator=draw)
    return (x * math.nan if step == BAD_BATCH else x), y


def amp() -> Scene:
    """GradScaler, dropout, batch norm, clipping, a scheduler; all statistics at every other step."""
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)

    def step(k: int, log: Callable[..., None]) -> None:
        x, y = _batches(k)
        if k == BAD_BATCH:  # the scaler leaves this step out
            x = torch.nan_to_num(x, nan=1e30)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        log(loss=loss)

    everything = (model, optimizer, scheduler, scaler)
    return Scene(model, optimizer, everything, step, {"activations": True, "stats_every": 2})


def closure() -> Scene:
    """L-BFGS, which evaluates a closure several times a step."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")

    def step(k: int, log: Callable[..., None]) -> None:
        x, y = _batches(k)
        if k == BAD_BATCH:
            log(loss=math.nan)
            return

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        log(loss=optimizer.step(evaluate))

    return Scene(model, optimizer, (model, optimizer), step, {"stats_every": 3})


def armed() -> Scene:
    """All actions armed, none of which has a reason to act; the loss is heard by a hook."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    loss_fn = nn.MSELoss()

    def step(k: int, log: Callable[..., None]) -> None:
        x, y = _batches(k)
        if k == BAD_BATCH:  # not even its loss is heard: armed actions may answer to one that is NaN
            return
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()

    actions = [gw.SkipStep(), gw.Clip(max_norm=1e9), gw.ZClip(), gw.Rollback(every=2), gw.DecayLR(), gw.Stop()]
    settings = {"actions": actions, "loss_fn": loss_fn, "stats_every": 5}
    return Scene(model, optimizer, (model, optimizer), step, settings)


def dry() -> Scene:
    """Actions that only say what they would do, in a training that explodes for some steps."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(k: int, log: Callable[..., None]) -> None:
        x, y = _batches(k)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.nan_to_num(x)), y)
        (loss * math.inf if k == BAD_BATCH + 1 else loss).backward()
        if k == BAD_BATCH + 1:
            optimizer.zero_grad()
        optimizer.step()
        log(loss=loss * math.inf if k == BAD_BATCH else loss)

    actions = [gw.SkipStep(), gw.Clip(max_norm=1e-3), gw.DecayLR(on="nonfinite"), gw.Rollback(every=2), gw.Stop()]
    return Scene(model, optimizer, (model, optimizer), step, {"actions": actions, "dry_run": True})


def pair() -> Scene:
    """Two optimizers that take turns, and which `watch` is not told of; gradients accumulated; a part added later."""
    model = nn.ModuleDict({"g": nn.Linear(6, 6), "d": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))})
    of_g = torch.optim.RMSprop(model["g"].parameters(), lr=1e-3)
    of_d = torch.optim.AdamW(model["d"].parameters(), lr=1e-3)
    extra = nn.Parameter(torch.ones(3))

    def step(k: int, log: Callable[..., None]) -> None:
        x, y = _batches(k)
        if k == BAD_BATCH:
            log(loss=math.nan)
            return
        if k == 3:
            of_d.add_param_group({"params": [extra]})
        for optimizer, source in ((of_d, model["g"](x).detach()), (of_g, model["g"](x))):
            optimizer.zero_grad()
            for half in range(2):
                part = slice(4 * half, 4 * half + 4)
                loss = nn.functional.mse_loss(model["d"](source[part]) * extra, y[part]) / 2
                loss.backward(retain_graph=True)
            optimizer.step()
            log(loss=loss)

    return Scene(model, None, (model, of_g, of_d), step, {"stats_every": 4})


SCENES: dict[str, Callable[[], Scene]] = {
    "amp": amp, "closure": closure, "armed": armed, "dry": dry, "pair": pair,
}  # fmt: skip
