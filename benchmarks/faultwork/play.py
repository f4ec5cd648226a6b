"""Plays a scene, watched or not, and keeps what the judge wants to know."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradwatch as gw
from benchmarks.faultwork.descriptors import open_files
from benchmarks.faultwork.scenes import BAD_BATCH, SCENES, STEPS, Heard, Mirror, Scene, own_rule
from benchmarks.faultwork.sites import Moment
from gradwatch.backends import torch_taps
from gradwatch.sinks import base as sinks
from gradwatch.storage import recorder, store, trouble

#: What every fault of a campaign says of itself.
MARK = "injected fault"
#: Steps that count as warm-up.
WARM_UP = 2


@dataclass
class Played:
    """What a play left.

    Args:
        digests: State before the first step and after each.
        error: What came out of the loop, or of `watch` or `close`.
        heard: By name, what alerts and sinks were told.
        failures: `overhead()["failures"]`: how often which part failed.
        logged: What gradwatch logged, level and text with traceback.
        leaks: What remained.
        is_blocked: Whether the loop waited for a thread that hung.
        has_begun: Whether `watch` had returned, from when on nothing may be raised.
        steps: In the record, once somebody has looked.
        dropped: Steps that are known not to be there.
    """

    digests: list[str] = field(default_factory=list)
    error: BaseException | None = None
    heard: dict[str, Heard] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    logged: list[tuple[int, str]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    is_blocked: bool = False
    has_begun: bool = True
    steps: int = 0
    dropped: int = 0


class Loop:
    """What a thread that hangs asks of the loop that trains.

    Attributes:
        over: Set when the last step is done.
        was_blocked: Set by a thread that hung until it lost patience, for then the loop must have waited for it.
    """

    def __init__(self) -> None:
        self.over, self.was_blocked = threading.Event(), False


class _Log(logging.Handler):
    def __init__(self, kept: list[tuple[int, str]]) -> None:
        super().__init__(logging.WARNING)
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record.levelno, self.format(record)))


@contextmanager
def listening(kept: list[tuple[int, str]]) -> Iterator[None]:
    """With all that gradwatch logs kept."""
    logger, handler = logging.getLogger("gradwatch"), _Log(kept)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextmanager
def hurried() -> Iterator[None]:
    """With the clocks of the writing threads fast, so that a short run does all that a long one does."""
    changes = {
        (trouble, "FIRST_RETRY"): 0.005, (trouble, "LAST_RETRY"): 0.01, (recorder, "HEARTBEAT"): 0.01,
        (recorder, "SYNC"): 0.01, (recorder, "_GLANCE"): 0.002, (recorder, "_LAST_TRIES"): (0.01, 0.01, 0.01),
        (store, "SEAL_ROWS"): 4, (sinks, "PAUSE"): 0.005, (sinks, "CLOSE_SECONDS"): 60.0,
    }  # fmt: skip
    kept = {(owner, name): getattr(owner, name) for owner, name in changes}
    for (owner, name), value in changes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in kept.items():
            setattr(owner, name, value)


def plain(name: str) -> list[str]:
    """The states of a scene that nobody watches."""
    torch.manual_seed(0)
    scene = SCENES[name]()
    digests = [scene.digest()]
    for k in range(STEPS):
        scene.step(k, lambda **_: None)
        digests.append(scene.digest())
    return digests


def settings(heard: dict[str, Heard]) -> dict[str, Any]:
    """What a user says who uses everything; what alerts and sinks are told is kept by name."""
    for name in ("alert", "other alert", "sink", "other sink"):
        heard[name] = Heard()
    routing: dict[str, Any] = {"group_seconds": 0.0, "cooldown": 0.0, "close_seconds": 60.0, "min_severity": "info"}
    return {
        "detectors": [*gw.detectors.CATALOGUE, own_rule],
        "alerts": [gw.alerts.Call(heard[name].message, **routing) for name in ("alert", "other alert")],
        "sinks": [Mirror(heard["sink"]), Mirror(heard["other sink"])],
        "flush_every": 2,
        "flush_seconds": 0.01,
    }


def watch(scene: Scene, run_dir: Path, heard: dict[str, Heard]) -> gw.Watcher:
    """Watch a scene."""
    return gw.watch(scene.model, scene.optimizers, run_dir=run_dir, **settings(heard), **scene.settings)


def play(name: str, run_dir: Path, moment: Moment, loop: Loop | None = None) -> Played:
    """Play a scene, watched.

    Args:
        name: Of the scene.
        run_dir: Where to record it.
        moment: Told what is going on.
        loop: Told when the loop is over.
    """
    played, before, loop = Played(), Traces(), loop or Loop()
    with hurried(), listening(played.logged):
        reference = _play(name, run_dir, moment, played, loop)
        moment.now = ""
        loop.over.set()
        played.leaks += before.left(run_dir, reference)
    played.is_blocked = loop.was_blocked
    return played


def _play(name: str, run_dir: Path, moment: Moment, played: Played, loop: Loop) -> Any:
    torch.manual_seed(0)
    scene = SCENES[name]()
    watcher, played.has_begun = None, False
    try:
        moment.now = "watch"
        watcher = watch(scene, run_dir, played.heard)
        played.has_begun = True
        played.digests.append(scene.digest())
        for k in range(STEPS):
            moment.now = "first" if k < WARM_UP else "steady"
            scene.step(k, watcher.log)
            if k == BAD_BATCH:
                _let_threads_work(watcher)
            played.digests.append(scene.digest())
        moment.now = "close"
        loop.over.set()
        watcher.close()
    except BaseException as error:  # noqa: BLE001 -- whatever comes out is what we look for
        played.error = error.with_traceback(None)
        played.error.__context__ = None
        if len(played.digests) <= STEPS:
            played.digests.append(scene.digest())
    moment.now = ""
    if watcher is None:
        return None
    watcher.close()
    overhead = watcher.overhead()
    played.failures, played.dropped = dict(overhead["failures"]), int(overhead["dropped_steps"])
    played.leaks += hooks_left(scene)
    return weakref.ref(watcher)


def _let_threads_work(watcher: gw.Watcher) -> None:
    """Give the writing threads time to write, sync, seal and beat."""
    end = time.monotonic() + 0.03
    while time.monotonic() < end:
        time.sleep(0.005)


def hooks_left(scene: Scene) -> list[str]:
    """Hooks on the model or its optimizers."""
    parts = [part for part in scene.everything if isinstance(part, (nn.Module, torch.optim.Optimizer))]
    parts += [scene.settings["loss_fn"]] if "loss_fn" in scene.settings else []
    found = []
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    for part in [*parts, *modules]:
        names = [name for name in vars(part) if name.endswith("_hooks") and vars(part)[name]]
        found += [f"{name} of {type(part).__name__}" for name in names]
    for parameter in scene.model.parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None) or parameter._backward_hooks:  # noqa: SLF001
            found.append("hook on a parameter")
    return found


class Traces:
    """What the process holds now; compared after a play."""

    def __init__(self) -> None:
        self.threads = set(threading.enumerate())
        self.finalizers = len(weakref.finalize._registry)  # type: ignore[attr-defined]  # noqa: SLF001

    def left(self, run_dir: Path, watcher: Any) -> list[str]:
        """What remains of a play."""
        gc.collect()
        deadline = time.monotonic() + 10
        while (threads := set(threading.enumerate()) - self.threads) and time.monotonic() < deadline:
            time.sleep(0.005)
        found = [f"thread {thread.name}" for thread in threads]
        found += [f"open file {Path(name).name}" for name in open_files(run_dir)]
        if torch_taps._listeners or torch_taps._originals:  # noqa: SLF001
            found.append("taps")
            while torch_taps._listeners:  # noqa: SLF001 -- or every later play would find them
                torch_taps.leave(torch_taps._listeners[-1])  # noqa: SLF001
        hooks = vars(sys.modules["torch.optim.optimizer"])
        for name in [name for name in hooks if name.startswith("_global_") and hooks[name]]:
            found.append(name)
            hooks[name].clear()
        if len(weakref.finalize._registry) > self.finalizers:  # type: ignore[attr-defined]  # noqa: SLF001
            found.append("finalizer")
        if not torch.is_grad_enabled():
            found.append("gradients switched off")
            torch.set_grad_enabled(True)
        if watcher is not None and watcher() is not None:
            found.append("the watcher itself")
        gc.freeze()  # what is here now need not be looked through after the next play
        return found
