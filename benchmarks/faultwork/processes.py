"""Plays that need a process of their own: one ends without `close`, as scripts do, in the other the training forks.

A process that has imported everything waits for orders and forks a player for each; the player ends as any script ends,
so that what is registered for the end of the interpreter runs as it does for users.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gradwatch as gw
from benchmarks.faultwork.campaign import Injection, Stage
from benchmarks.faultwork.foresight import read_ahead
from benchmarks.faultwork.judge import KINDS, Fault, harm, strike, verdict
from benchmarks.faultwork.play import Loop, Played, Traces, hurried, listening, plain, play, watch
from benchmarks.faultwork.scenes import SCENES, STEPS
from benchmarks.faultwork.sites import PACKAGE, Catalogue, Injector, Moment, Site

#: The step at which a training forks.
FORK = 5
#: What happens, by the first word of a scene's name.
ENDS = ("exit", "fork")


@dataclass
class Told:
    """What one process of a play leaves in a file.

    Args:
        played: As of any play; of a forked child its one step.
        fired: How many faults it has met.
        is_foreseen: See `Injector`.
        hits: The sites that it passed, when they are looked for.
    """

    played: Played = field(default_factory=Played)
    fired: int = 0
    is_foreseen: bool = False
    hits: dict[Site, int] = field(default_factory=dict)


@dataclass
class Order:
    """One play.

    Args:
        how: Of `ENDS`.
        scene: Of `SCENES`.
        run_dir: Where it is recorded.
        injection: What fails; None looks for sites.
    """

    how: str
    scene: str
    run_dir: str
    injection: Injection | None = None

    def file(self, who: str) -> Path:
        """Where `player` or `child` leaves what it has to tell."""
        return Path(f"{self.run_dir}.{who}")


class Processes(Stage):
    """Plays injections in processes of their own; stands in for a `Stage`."""

    def __init__(self, scenes: tuple[str, ...] = ("amp", "closure", "armed", "pair")) -> None:
        super().__init__(())
        self._player = subprocess.Popen(  # noqa: S603 -- ourselves
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.plain = {f"{how} {name}": plain(name) for how in ENDS for name in scenes}
        self.clean: dict[str, Played] = {}

    def close(self) -> None:
        """End the process that waits, and remove all files."""
        assert self._player.stdin is not None
        self._player.stdin.close()
        self._player.wait()
        super().close()

    def sites(self, scene: str) -> dict[Site, int]:
        """The sites of a scene, passed at the end of the process or in the forked child."""
        told, child, errors, code = self._order(scene, self.folder / "traced")
        is_sound = told.played.digests == self.plain[scene] and not told.played.leaks and not told.played.logged
        if code or errors or told.played.error or child.played.error or not is_sound:
            raise RuntimeError(f"scene {scene!r} is not sound without a fault: {code}, {errors}, {told}, {child}")
        told.played.steps = len(gw.load(self.folder / "traced").grad_norms())
        self.clean[scene] = told.played
        shutil.rmtree(self.folder / "traced")
        return told.hits | child.hits

    def inject(self, injection: Injection) -> dict[str, Any]:
        """Play it; what came of it."""
        run_dir = self.folder / f"run-{next(self._numbers)}"
        told, child, errors, code = self._order(injection.scene, run_dir, injection)
        fired, is_foreseen = told.fired + child.fired, told.is_foreseen or child.is_foreseen
        fault, wrong = Fault(injection.site, injection.kind, is_foreseen=is_foreseen), []
        if fired:
            wrong = verdict(told.played, self.clean[injection.scene], self.plain[injection.scene], run_dir, fault)
            if not told.fired:  # it is the child that hears of the fault
                wrong = [what for what in wrong if not what.startswith(("unlogged", "uncounted", "swallowed"))]
            if injection.scene.startswith("fork"):
                plain_child = self.plain[injection.scene][FORK:]
                of_child = harm(child.played, plain_child, fault if child.fired else Fault(injection.site, "hang"))
                wrong += [f"{what} (in the child)" for what in of_child]
            wrong += [f"raised: the process ended with {code}"] if code else []
            wrong += [f"raised: {errors}"] if errors and injection.kind != "interrupt" else []
        shutil.rmtree(run_dir, ignore_errors=True)
        failures = told.played.failures | child.played.failures
        logged = [text for _, text in told.played.logged + child.played.logged]
        return {"fired": fired, "foreseen": is_foreseen, "wrong": wrong, "failures": failures, "logged": logged}

    def _order(self, scene: str, run_dir: Path, injection: Injection | None = None) -> tuple[Told, Told, str, int]:
        how, _, name = scene.partition(" ")
        order = Order(how, name, str(run_dir), injection)
        assert self._player.stdin is not None
        assert self._player.stdout is not None
        self._player.stdin.write(pickle.dumps(order).hex().encode() + b"\n")
        self._player.stdin.flush()
        code = int(self._player.stdout.readline())
        files = [order.file(who) for who in ("player", "child")]
        told = [pickle.loads(file.read_bytes()) if file.exists() else Told() for file in files]  # noqa: S301 -- our own
        errors = order.file("errors").read_text()
        for file in (*files, order.file("errors")):
            file.unlink(missing_ok=True)
        return told[0], told[1], errors, code


# -- in the process that waits, and in those that it forks -------------------------------------------------------------


class _Player:
    """Plays one order in this process.

    Args:
        order: What to play.
    """

    def __init__(self, order: Order) -> None:
        self.order, self.told, self.moment, self.loop = order, Told(), Moment(), Loop()
        self.who = "player"
        self._tracing: Catalogue | Injector | None = None

    def play(self) -> None:
        """Play; what there is to tell is written when the process ends."""
        atexit.register(self._end)  # the first to be registered is the last to be called
        played, whole = self.told.played, ExitStack()
        whole.enter_context(hurried())
        whole.enter_context(listening(played.logged))
        self._kept = whole  # in force until the end of the process
        before = Traces()
        self._trace()
        torch.manual_seed(0)
        scene = SCENES[self.order.scene]()
        self.watcher = watcher = watch(scene, Path(self.order.run_dir), played.heard)
        played.digests.append(scene.digest())
        for k in range(STEPS):
            if k == FORK and self.order.how == "fork" and not self._fork():
                self.told.played = played = Played(logged=played.logged, digests=[scene.digest()])
                self._step(scene, k, played)
                self.moment.now = "exit"
                return
            self._step(scene, k, played)
        self.loop.over.set()
        if self.order.how == "exit":
            self.moment.now = "exit"
        else:
            watcher.close()
            played.leaks = before.left(Path(self.order.run_dir), None)

    def _step(self, scene: Any, k: int, played: Played) -> None:
        try:
            scene.step(k, self.watcher.log)
        except BaseException as error:  # noqa: BLE001 -- whatever comes out is what we look for
            played.error = error.with_traceback(None)
            played.error.__context__ = None
        played.digests.append(scene.digest())

    def _fork(self) -> int:
        self.moment.now = "fork"
        child = os.fork()
        if child:
            self.moment.now = ""
            os.waitpid(child, 0)
        else:
            self.who = "child"
        return child

    def _trace(self) -> None:
        injection = self.order.injection
        if injection is None:
            self._tracing = Catalogue(self.moment)
        else:
            error, hit = KINDS[injection.kind], partial(strike, injection.kind, self.loop)
            arguments = {"nth": injection.nth, "then": injection.then, "error": error and type(error)}
            self._tracing = Injector(injection.site, self.moment, hit, **arguments)
        self._tracing.__enter__()

    def _end(self) -> None:
        self.moment.now = ""
        tracing, told = self._tracing, self.told
        if tracing is not None:
            tracing.__exit__(None, None, None)
        if isinstance(tracing, Injector):
            told.fired, told.is_foreseen = tracing.fired, tracing.is_foreseen
        elif tracing is not None:
            told.hits = tracing.hits
        overhead = self.watcher.overhead()
        told.played.failures, told.played.dropped = dict(overhead["failures"]), int(overhead["dropped_steps"])
        self.order.file(self.who).write_bytes(pickle.dumps(told))


def main() -> None:
    """Fork a player for each order that comes; one that was forked returns from here, and its interpreter ends."""
    with tempfile.TemporaryDirectory() as folder:  # everything is imported then, once for all
        play("amp", Path(folder) / "warm-up", Moment())
    read_ahead(PACKAGE)
    for line in sys.stdin.buffer:
        order: Order = pickle.loads(bytes.fromhex(line.decode()))  # noqa: S301 -- from our parent
        child = os.fork()
        if not child:
            with order.file("errors").open("wb") as errors:
                os.dup2(errors.fileno(), sys.stderr.fileno())
            _Player(order).play()
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
