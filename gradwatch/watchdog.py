"""Watches the runs under a directory from outside: notices a training that was killed, froze, or stands still."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradwatch.alerts.channel import Channel
from gradwatch.errors import ConfigurationError, RunError
from gradwatch.records import Finding, RunInfo
from gradwatch.storage.facts import decode_facts
from gradwatch.storage.files import LocalFiles
from gradwatch.storage.layout import EVENTS_FILE, LOCK_FILE, RUN_FILE, STEPS
from gradwatch.storage.lock import is_locked

logger = logging.getLogger("gradwatch")
#: Steps whose times make the median.
_REMEMBERED = 200
#: What to do, by rule.
_ADVICE = {
    "died": "see the log of the process and dmesg (out of memory?); go on with resume=True",
    "froze": "the process is stopped, swapped out, or its machine is gone: look at it with ps and py-spy dump",
    "stall": "the process lives but trains no step: look at it with py-spy dump",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """When the watchdog speaks.

    Args:
        silence: Seconds without a sign of life after which a run counts as frozen. One comes every 15 seconds.
        stall: No step for so many times the median step time is a stall ...
        stall_seconds: ... but not before so many seconds.
        max_age: Runs that ended so many seconds before the watchdog began are left alone.
    """

    silence: float = 60.0
    stall: float = 10.0
    stall_seconds: float = 120.0
    max_age: float = 24 * 3600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigurationError.of(field.name, "> 0", getattr(self, field.name))


class RunWatch:
    """One run, looked at again and again.

    Args:
        path: The run.
        limits: When to speak.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self._info: RunInfo | None = None
        self._stamp, self._was_running = 0, False
        self._life: tuple[float, ...] = ()
        self._alive_at = self._stepped_at = 0.0
        self._told: Finding | None = None

    def look(self, now: float, wall: float) -> list[Finding]:
        """What opened or resolved.

        Args:
            now: Monotonic seconds.
            wall: Unix time.
        """
        info = self._read()
        if info is None:
            return []
        self._note_life(info, now, wall)
        trouble = self._trouble(info, now, wall)
        self._was_running |= info.status == "running"
        if trouble is None or (self._told is not None and self._told.rule != trouble.rule):
            over, self._told = self._told, None
            if over is not None:
                return [dataclasses.replace(over, resolved_step=over.last_step)]
        if trouble is None or self._told is not None:
            return []
        self._told = trouble
        return [trouble]

    def _read(self) -> RunInfo | None:
        """The facts of the run; those from before while the file cannot be read."""
        try:
            stamp = (self._path / RUN_FILE).lstat().st_mtime_ns
            if stamp != self._stamp:
                self._info = decode_facts(LocalFiles(self._path).read(RUN_FILE), str(self._path)).info
                self._stamp = stamp
        except (OSError, RunError) as error:
            logger.debug("gradwatch: cannot read %s", self._path, exc_info=error)
        return self._info

    def _note_life(self, info: RunInfo, now: float, wall: float) -> None:
        """Compare signs of life with those seen before: only changes count, so that clocks need not agree."""
        steps = _newest(self._path / STEPS)
        life = (info.heartbeat, steps, _changed(self._path / EVENTS_FILE))
        if not self._life:
            self._alive_at = now - max(0.0, wall - max(life))
            self._stepped_at = now - max(0.0, wall - steps) if steps else now
        elif life != self._life:
            self._alive_at = now
            if steps != self._life[1]:
                self._stepped_at = now
        self._life = life

    def _trouble(self, info: RunInfo, now: float, wall: float) -> Finding | None:
        if info.status == "crashed":
            # One that was seen running; others are old news.
            words = f"ended by an error: {info.status_detail}"
            return self._finding(info, "died", words) if self._was_running else None
        if info.status != "running":
            return None
        locked = is_locked(self._path / LOCK_FILE)
        silence = now - self._alive_at
        if locked is False and self._still_running():
            old = not self._was_running and wall - info.heartbeat > self._limits.max_age
            words = f"died without finishing; its last sign of life was {silence:.0f} s ago"
            return None if old else self._finding(info, "died", words)
        if silence >= self._limits.silence:
            old = silence > self._limits.max_age and not self._was_running
            return None if old else self._finding(info, "froze", f"has given no sign of life for {silence:.0f} s")
        stood = now - self._stepped_at
        if stood >= self._limits.stall_seconds and self._life[1] and stood >= self._usual_step() * self._limits.stall:
            return self._finding(info, "stall", f"has ended no step for {stood:.0f} s")
        return None

    def _still_running(self) -> bool:
        """Whether the facts, read after the lock was found free, still say so: a writer closes them first."""
        self._stamp = 0
        info = self._read()
        return info is not None and info.status == "running"

    def _usual_step(self) -> float:
        """The median step time in seconds; 0 where that cannot be told."""
        from gradwatch.reader import RunReader

        try:
            run = RunReader(self._path)
            last = run.span[1] if run.span else 0
            times = run.metrics(steps=slice(max(0, last - _REMEMBERED), None))["step_time"].dropna()
            return statistics.median(times) if len(times) else 0.0
        except (RunError, OSError, KeyError) as error:
            logger.debug("gradwatch: cannot read the steps of %s", self._path, exc_info=error)
            return 0.0

    def _finding(self, info: RunInfo, rule: str, words: str) -> Finding:
        name = self._path.name
        return Finding(
            id=f"{rule}@{self._path}@{info.started}@{self._alive_at:.0f}",
            rule=rule,
            severity="critical",
            first_step=0,
            last_step=0,
            message=f"Run {name} (process {info.pid} on {info.host}) {words}. It is at {self._path}.",
            evidence={"run": str(self._path), "run_name": name},
            advice=(_ADVICE[rule],),
        )


class Watchdog:
    """The runs under a directory, old and new.

    Args:
        root: The directory.
        limits: When to speak.
    """

    def __init__(self, root: Path, limits: Limits) -> None:
        self._root, self._limits = root, limits
        self._watches: dict[Path, RunWatch] = {}

    def look(self) -> Iterator[Finding]:
        """Look at every run once; what opened or resolved since."""
        from gradwatch.reporters.listing import find_runs

        for path in find_runs(self._root):
            watch = self._watches.setdefault(path, RunWatch(path.resolve(), self._limits))
            yield from watch.look(time.monotonic(), time.time())


def watch_root(
    root: str | os.PathLike[str],
    channels: Sequence[Channel],
    *,
    every: float = 10.0,
    limits: Limits | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Look at the runs under a directory until stopped, and tell of those that die, freeze or stand still.

    A process that was killed is told of within `every` and the channel's `group_seconds`; one that was stopped, within
    `limits.silence` more. A run that finished is never told of.

    Args:
        root: A run, or a directory with runs below it, now or later.
        channels: Whom to tell.
        every: Seconds between two looks.
        limits: When to speak.
        stop: Ends the watch when it is set; without one it ends with the process.

    Raises:
        ConfigurationError: When there is no such directory, no channel, or a setting breaks a rule.
    """
    if not Path(root).is_dir():
        raise ConfigurationError.of("root", "a directory", str(root))
    if not channels:
        raise ConfigurationError.of("channels", "at least one channel", list(channels))
    if not every > 0:
        raise ConfigurationError.of("every", "> 0", every)
    stop = stop or threading.Event()
    watchdog = Watchdog(Path(root), limits or Limits())
    info = RunInfo((), host=socket.gethostname(), pid=os.getpid())
    opened = []
    try:
        for channel in channels:
            channel.open(info, Path(root))
            opened.append(channel)
        while not stop.is_set():
            for finding in watchdog.look():
                for channel in channels:
                    channel.finding(finding)
            stop.wait(every)
    finally:
        for channel in opened:
            channel.close("stopped")


def _newest(folder: Path) -> float:
    try:
        return max((_changed(path) for path in folder.iterdir()), default=0.0)
    except OSError:
        return 0.0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
