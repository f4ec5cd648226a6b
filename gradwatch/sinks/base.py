"""What every sink is: a thread of its own mirrors the numbers, and the training never waits for it."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import ActionRecord, Finding, RunInfo, StepBatch
from gradwatch.redaction import without_credentials
from gradwatch.sinks.rows import Row, Table

logger = logging.getLogger("gradwatch")
#: Batches, findings and actions that wait at most; further batches are dropped and counted.
MOST_WAITING = 10_000
#: Failures in a row after which a sink is switched off.
MOST_FAILURES = 5
#: Seconds between two looks at the queue, and how long `close` waits for the last numbers.
PAUSE, CLOSE_SECONDS = 0.5, 10.0

News = StepBatch | Finding | ActionRecord


class Sink(ABC):
    """Mirrors numbers into another tool. Derive from it and define `begin`, `write` and `end`.

    Args:
        every: Mirror only steps whose number this divides.
        by: `layer` or `parameter`: what norms are shown for.

    Attributes:
        dropped: Steps that were left out because the tool could not follow, or failed.

    Raises:
        ConfigurationError: When a setting breaks a rule.
    """

    def __init__(self, *, every: int = 1, by: str = "layer") -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError.of("every", "an integer >= 1", every)
        if by not in ("layer", "parameter"):
            raise UnknownNameError.among("value of 'by'", by, ("layer", "parameter"))
        self.every, self.by = every, by
        self.dropped = 0
        self._queue: deque[News] = deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._ending: str | None = None
        self._begun: tuple[RunInfo, Path] | None = None
        self._table: Table | None = None
        self._has_begun = self._is_over = False
        self._failures, self._last_tries = 0, 2
        #: Failures in all.
        self.failures = 0

    # -- what a sink defines; called by the sink's thread --------------------------------------------------------------

    @abstractmethod
    def begin(self, info: RunInfo, run_dir: Path) -> None:
        """The run begins."""

    @abstractmethod
    def write(self, rows: list[Row]) -> None:
        """Mirror some steps."""

    def tell(self, news: Finding | ActionRecord) -> None:  # noqa: B027 -- not every tool has a place for it
        """Mirror a finding or an action."""

    @abstractmethod
    def end(self, status: str) -> None:
        """The run ends: `finished` or `crashed`."""

    # -- called by the training thread ---------------------------------------------------------------------------------

    def open(
        self,
        info: RunInfo,
        run_dir: Path,
        *,
        first_step: int = 0,
        note: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        """A run begins.

        Raises:
            ConfigurationError: When the sink is open for another run.
        """
        if self._thread is not None:
            raise ConfigurationError(f"{self!r} serves another run: give each run a sink of its own")
        if info.rank:
            return
        self._begun, self._table, self._ending = (info, Path(run_dir)), None, None
        self._has_begun = self._is_over = False
        self._failures, self._last_tries = 0, 2
        self._thread = threading.Thread(target=self._loop, name=f"gradwatch-{type(self).__name__}", daemon=True)
        self._thread.start()

    def steps(self, batch: StepBatch) -> None:
        """Steps have ended."""
        if self._thread is None:
            return
        if self.every > 1 and len(batch.step) == 1 and batch.step[0] % self.every and not batch.statistics:
            return
        if len(self._queue) < MOST_WAITING:
            self._queue.append(batch)
        else:
            self.dropped += len(batch.step)

    def finding(self, finding: Finding) -> None:
        """A finding opened, changed or resolved."""
        if self._thread is not None and len(self._queue) < 2 * MOST_WAITING:
            self._queue.append(finding)

    def action(self, record: ActionRecord) -> None:
        """An action was applied, or its outcome is known."""
        if self._thread is not None and len(self._queue) < 2 * MOST_WAITING:
            self._queue.append(record)

    def close(self, status: str = "finished", detail: str = "") -> None:
        """The run ends: mirror what waits, and let go of the thread."""
        thread = self._thread
        if thread is None:
            return
        self._ending = status
        self._wake.set()
        if thread.is_alive():
            thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            logger.warning("gradwatch: %r did not answer in time; its last numbers may be lost", self)
        self._wake.clear()
        self._thread = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._is_over:
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 -- a failure of our own code must not end this thread
                self._failed(error)

    def _turn(self) -> None:
        if not self._has_begun:
            assert self._begun is not None
            self._has_begun = self._guard(self.begin, *self._begun, fatal=True)
            if not self._has_begun:
                self._queue.clear()
                self._is_over = True
        elif self._ending is None:
            self._wake.wait(PAUSE)
            self._mirror()
        else:
            self._mirror()
            self._guard(self.end, self._ending)
            self._is_over = True

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        logger.warning("gradwatch: %r failed (%s: %s)", self, type(error).__name__, error)
        if self._ending is None:
            time.sleep(PAUSE)
        else:
            self._last_tries -= 1
            self._is_over = self._last_tries <= 0

    def _mirror(self) -> None:
        table = self._table = self._table or Table(self.by)
        rows: list[Row] = []
        while self._queue:
            news = self._queue.popleft()
            if isinstance(news, StepBatch):
                rows += table.rows(news, self.every)
                if len(rows) >= 500:
                    self._write(rows)
                    rows = []
            else:
                self._guard(self.tell, news)
        if rows:
            self._write(rows)

    def _write(self, rows: list[Row]) -> None:
        if self._failures >= MOST_FAILURES or not self._guard(self.write, rows):
            self.dropped += len(rows)

    def _guard(self, work: Callable[..., None], *arguments: Any, fatal: bool = False) -> bool:
        """Whether the work went through. The first failure is logged; a sink that fails on and on is switched off."""
        if self._failures >= MOST_FAILURES:
            return False
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 -- whatever another tool does must not end this thread
            self.failures += 1
            self._failures = MOST_FAILURES if fatal else self._failures + 1
            if fatal or self._failures in (1, MOST_FAILURES):
                off = " and is switched off" if self._failures >= MOST_FAILURES else ""
                words = without_credentials(f"{type(error).__name__}: {error}")
                logger.warning("gradwatch: %r failed%s (%s)", self, off, words)
            return False
        self._failures = 0
        return True


def checked_sinks(given: Iterable[Any]) -> tuple[Any, ...]:
    """The sinks a watcher was told.

    Raises:
        ConfigurationError: When something else is among them.
    """
    sinks = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    for sink in sinks:
        if isinstance(sink, type):
            raise ConfigurationError(f"'sinks' must hold sinks: {sink.__name__} is a class; write {sink.__name__}(...)")
        if not all(hasattr(sink, name) for name in ("open", "steps", "finding", "action", "close")):
            raise ConfigurationError.of("sinks", "a list of sinks such as gradwatch.sinks.TensorBoard", sink)
    return sinks
