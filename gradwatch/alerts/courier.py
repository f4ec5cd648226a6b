"""The thread of a channel: takes findings from the training, sends messages, tries again."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gradwatch.alerts.ledger import Ledger, rules_of
from gradwatch.alerts.message import Message
from gradwatch.alerts.plot import NormPlot
from gradwatch.alerts.routing import Routing
from gradwatch.alerts.stall import StallWatch
from gradwatch.records import Finding, StepBatch
from gradwatch.redaction import redacted

logger = logging.getLogger("gradwatch")
#: Seconds until the first and the longest until the next try after a delivery failed.
FIRST_RETRY, LAST_RETRY = 1.0, 300.0
_LONGEST_WAIT = 3600.0


class Sender(Protocol):
    """What a courier needs of a channel."""

    routing: Routing

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be seen."""
        ...

    def send(self, message: Message) -> None:
        """Deliver, or raise."""
        ...


class Courier:
    """Delivers what is found in one run through one channel.

    Args:
        channel: Where messages go.
        blank: A message without content: names the run.
        note: Adds an event to the record.
    """

    def __init__(self, channel: Sender, blank: Message, note: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._channel, self._blank, self._note = channel, blank, note
        self._ledger = Ledger(channel.routing)
        self._stall = StallWatch(channel.routing)
        self._plot = NormPlot()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = self._is_over = False
        #: Rounds that may fail before the thread gives up what waits at the end.
        self._last_tries = 2
        self._outgoing: Message | None = None
        self._pause, self._next_try = 0.0, 0.0
        self._complaints: set[str] = set()
        #: Of deliveries and of our own code.
        self.failures = 0
        self._thread = threading.Thread(target=self._run, name=f"gradwatch-{type(channel).__name__}", daemon=True)

    def start(self) -> None:
        """Begin to work; not when made, so that an interrupt leaves no thread that nobody knows."""
        self._thread.start()

    # -- called by the training thread ---------------------------------------------------------------------------------

    def beat(self, batch: StepBatch) -> None:
        """Steps have ended."""
        self._stall.beat(time.monotonic(), int(batch.step[-1]), len(batch.step))
        self._plot.add(batch)

    def add(self, finding: Finding) -> None:
        """A finding opened, changed or resolved."""
        with self._lock:
            has_news = self._ledger.add(finding, now=time.monotonic(), wall=time.time())
        if has_news and not self._wake.is_set():
            self._wake.set()

    def did(self, rule: str, what: str) -> None:
        """Something was done about a rule."""
        with self._lock:
            self._ledger.did(rule, what)

    @property
    def step(self) -> int:
        """The last step."""
        return self._stall.step or self._blank.step

    def close(self) -> None:
        """Tell what waits and end the thread, within `close_seconds`."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self._channel.routing.close_seconds)
        if self._thread.is_alive():
            logger.warning("gradwatch: %r did not answer in time; its last message may be lost", self._channel)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over:
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 -- nothing may end this thread
                self._failed(error)

    def _turn(self) -> None:
        if not self._closing:
            self._wake.wait(self._round())
            self._wake.clear()
        else:
            self._last_round()
            self._is_over = True

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._complain(error)
        if self._closing:
            self._last_tries -= 1
            self._is_over = self._last_tries <= 0
        else:
            self._wake.clear()
            self._wake.wait(FIRST_RETRY)

    def _round(self) -> float:
        """Do what is due; seconds until there may be more."""
        look_again = self._look_for_stall()
        if self._outgoing is None:
            self._outgoing = self._compose(final=False)
        if self._outgoing is not None and time.monotonic() >= self._next_try:
            self._deliver(self._outgoing)
        if self._outgoing is not None:
            due = self._next_try
        else:
            with self._lock:
                due = self._ledger.next_due(now=time.monotonic(), wall=time.time())
        return min(max(min(due, look_again) - time.monotonic(), 0.01), _LONGEST_WAIT)

    def _last_round(self) -> None:
        for _ in range(2):
            if self._outgoing is None:
                self._outgoing = self._compose(final=True)
            if self._outgoing is not None and not self._deliver(self._outgoing):
                self._record(self._outgoing, "lost")
                logger.warning("gradwatch: %r could not deliver: %s", self._channel, self._outgoing.title)
                return

    def _look_for_stall(self) -> float:
        finding, look_again = self._stall.look(time.monotonic())
        if finding is not None and self._channel.routing.wants("stall", finding.severity):
            self.add(finding)
        return look_again

    def _compose(self, *, final: bool) -> Message | None:
        with self._lock:
            groups = self._ledger.take(now=time.monotonic(), wall=time.time(), final=final)
        if not groups:
            return None
        fresh = Message(self._blank.run)
        return dataclasses.replace(
            self._blank, id=fresh.id, time=fresh.time, step=self.step, groups=groups, plot=self._plot.png()
        )

    def _deliver(self, message: Message) -> bool:
        """Whether the message went out; if not, the next try is set."""
        try:
            self._channel.send(message)
        except Exception as error:  # noqa: BLE001 -- whatever a receiver does must not end this thread
            self.failures += 1
            self._pause = min(LAST_RETRY, 2 * self._pause or FIRST_RETRY)
            self._next_try = time.monotonic() + self._pause
            self._complain(error)
            return False
        self._outgoing, self._pause, self._next_try = None, 0.0, 0.0
        self._complaints.clear()
        self._record(message, "sent")
        return True

    def _complain(self, error: Exception) -> None:
        """Log a failure, each kind once until a delivery succeeds."""
        words = redacted(f"{type(error).__name__}: {error}", self._channel.secrets)
        if words not in self._complaints and len(self._complaints) < 10:
            self._complaints.add(words)
            logger.warning("gradwatch: %r cannot deliver (%s); it tries again", self._channel, words)

    def _record(self, message: Message, state: str) -> None:
        event = {
            "channel": type(self._channel).__name__,
            "state": state,
            "id": message.id,
            "severity": message.severity,
            "step": message.step,
            "rules": rules_of(message.groups),
            "title": redacted(message.title, self._channel.secrets),
        }
        try:
            self._note("alert", event)
        except Exception as error:
            logger.debug("gradwatch: alert not recorded", exc_info=error)
