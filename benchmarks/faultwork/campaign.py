"""Chooses what fails, plays it, and keeps the verdicts."""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradwatch as gw
from benchmarks.faultwork.judge import KINDS, Fault, kinds_for, strike, verdict
from benchmarks.faultwork.play import Loop, Played, plain, play
from benchmarks.faultwork.scenes import SCENES
from benchmarks.faultwork.sites import Catalogue, Injector, Moment, Site

#: A run is on a file system in memory where there is one: a sync there costs nothing.
_MEMORY = Path("/dev/shm")  # noqa: S108 -- a folder of our own is made below it


@dataclass(frozen=True)
class Injection:
    """One fault.

    Args:
        scene: In which training.
        site: Where.
        nth: At which pass.
        kind: What happens, of `KINDS`.
        then: For `twice`: how many calls later the second comes.
    """

    scene: str
    site: Site
    nth: int
    kind: str
    then: int = 0


class Stage:
    """Where injections are played: knows the sites of each scene and its states without a watcher.

    Args:
        scenes: Names of those to play.
    """

    def __init__(self, scenes: Iterable[str] = tuple(SCENES)) -> None:
        self.moment = Moment()
        self._numbers = itertools.count()
        self.folder = Path(tempfile.mkdtemp(prefix="faults-", dir=_MEMORY if _MEMORY.is_dir() else None))
        self.plain = {name: plain(name) for name in scenes}
        self.clean = {name: self._clean(name) for name in self.plain}

    def play(self, scene: str, run_dir: Path, loop: Loop) -> Played:
        """Play a scene, watched."""
        return play(scene, run_dir, self.moment, loop)

    def _clean(self, name: str) -> Played:
        """A scene watched without a fault."""
        played = self.play(name, self.folder / "clean", Loop())
        played.steps = len(gw.load(self.folder / "clean").grad_norms())
        shutil.rmtree(self.folder / "clean")
        return played

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def sites(self, scene: str) -> dict[Site, int]:
        """The sites of a scene, with how often each is passed."""
        with Catalogue(self.moment) as catalogue:
            played = self.play(scene, self.folder / "traced", Loop())
        shutil.rmtree(self.folder / "traced")
        if played.error or played.leaks or played.logged or played.digests != self.plain[scene]:
            raise RuntimeError(f"scene {scene!r} is not sound without a fault: {played}")
        return catalogue.hits

    def inject(self, injection: Injection) -> dict[str, Any]:
        """Play it; what came of it, `fired` saying whether the fault was reached."""
        run_dir, loop, wrong = self.folder / f"run-{next(self._numbers)}", Loop(), []
        error, scene = KINDS[injection.kind], injection.scene
        hit = partial(strike, injection.kind, loop)
        arguments: dict[str, Any] = {"nth": injection.nth, "then": injection.then, "error": error and type(error)}
        with Injector(injection.site, self.moment, hit, **arguments) as injector:
            played = self.play(scene, run_dir, loop)
        if injector.fired:
            fault = Fault(injection.site, injection.kind, is_foreseen=injector.is_foreseen)
            wrong = verdict(played, self.clean[scene], self.plain[scene], run_dir, fault)
        shutil.rmtree(run_dir, ignore_errors=True)
        logged = [text for _, text in played.logged]
        found = {"fired": injector.fired, "foreseen": injector.is_foreseen, "wrong": wrong}
        return {**found, "failures": played.failures, "logged": logged}


def chosen(sites: dict[str, dict[Site, int]], seed: int) -> Iterator[Injection]:
    """Injections without end: every instruction once, at any moment and of any kind, then again."""
    draw = random.Random(seed)  # noqa: S311 -- no secrets
    groups: dict[tuple[str, str, int, int, str], list[tuple[str, Site]]] = defaultdict(list)
    for scene, found in sites.items():
        for site in found:
            groups[site.file, site.function, site.first_line, site.offset, site.when].append((scene, site))
    order = sorted(groups)
    while True:
        draw.shuffle(order)
        for key in order:
            scene, site = draw.choice(groups[key])
            if not (kinds := kinds_for(site)):
                continue
            kind = draw.choice(kinds)
            nth = draw.randint(1, min(sites[scene][site], 20))
            yield Injection(scene, site, nth, kind, then=draw.randint(1, 25) if kind == "twice" else 0)
