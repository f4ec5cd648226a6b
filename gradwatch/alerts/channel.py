"""What every channel is: it delivers one message; when and which, its courier decides."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

from gradwatch.alerts.courier import Courier
from gradwatch.alerts.message import Message
from gradwatch.alerts.routing import Routing, RoutingOptions
from gradwatch.errors import ConfigurationError
from gradwatch.records import ActionRecord, Finding, RunInfo, StepBatch

#: Actions that end or undo training: people hear of them at once.
_GRAVE = {"Stop", "Rollback"}


def ignore(kind: str, data: Mapping[str, Any]) -> None:
    """A record that keeps nothing."""


class Channel(ABC):
    """Where messages go. Derive from it and define `send`; the rest is done.

    The training thread only hands findings over, in microseconds. A thread of the channel groups them, waits where it
    must, sends, and tries again with growing pauses when that fails, as long as the run lives. Nothing is raised into
    the training.

    Args:
        routing: Keyword arguments of `Routing`: `min_severity`, `rules`, `cooldown`, `quiet_hours`, ...

    Raises:
        ConfigurationError: When a setting breaks a rule, or is none.

    Examples:
        >>> class Printer(Channel):
        ...     def send(self, message: Message) -> None:
        ...         print(message.title)
        >>> Printer(min_severity="critical").routing.min_severity
        'critical'
    """

    #: Settings that differ from those of `Routing` for this kind of channel.
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **routing: Unpack[RoutingOptions]) -> None:
        self.routing = Routing.of({**self.defaults, **routing})
        self._courier: Courier | None = None
        self._is_stopped = False
        self._failed = 0

    @property
    def failures(self) -> int:
        """How often a delivery, or something in the thread, has failed in this run."""
        return self._failed + (self._courier.failures if self._courier is not None else 0)

    @abstractmethod
    def send(self, message: Message) -> None:
        """Deliver one message within a bounded time; whatever is raised counts as a failure, to be tried again."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be seen in a log or in the record."""
        return ()

    def open(
        self,
        info: RunInfo,
        run_dir: Path,
        *,
        first_step: int = 0,
        note: Callable[[str, Mapping[str, Any]], None] = ignore,
    ) -> None:
        """A run begins.

        Args:
            info: Its facts.
            run_dir: Where its record is.
            first_step: Its first step.
            note: Adds an event to the record.

        Raises:
            ConfigurationError: When the channel is open for another run.
        """
        if self._courier is not None:
            raise ConfigurationError(f"{self!r} serves another run: give each run a channel of its own")
        if info.rank == 0:  # all ranks find the same: one of them tells
            blank = Message(Path(run_dir).resolve().name, str(Path(run_dir).resolve()), info.host, info.pid, first_step)
            self._courier = Courier(self, blank, note)
            self._courier.start()

    def steps(self, batch: StepBatch) -> None:
        """Steps have ended."""
        if self._courier is not None:
            self._courier.beat(batch)

    def finding(self, finding: Finding) -> None:
        """A finding opened, changed or resolved."""
        if self._courier is not None and self.routing.wants(finding.rule, finding.severity):
            self._courier.add(finding)

    def action(self, record: ActionRecord) -> None:
        """An action was applied, or its outcome is known."""
        if self._courier is None or record.dry_run:
            return
        what = f"{record.action}, step {record.step}: {record.detail}" + f" ({record.outcome})" * bool(record.outcome)
        self._courier.did(record.reason, what)
        self._is_stopped |= record.action == "Stop"
        if record.action in _GRAVE and not record.outcome and self.routing.wants(record.action, "critical"):
            words = f"{record.action} was applied at step {record.step}: {record.detail}"
            self._courier.add(_notice(record.action, record.step, words, advice=()))

    def close(self, status: str = "finished", detail: str = "") -> None:
        """The run ends: tell what waits, and let go of the thread within `close_seconds`."""
        courier = self._courier
        if courier is None:
            return
        if status == "crashed" and not self._is_stopped and not detail.startswith("KeyboardInterrupt"):
            courier.add(_notice("crashed", courier.step, f"Training ended by an error: {detail}"))
        elif status == "finished" and self.routing.finished:
            courier.add(_notice("finished", courier.step, "Training has finished.", severity="info"))
        courier.close()
        self._failed, self._courier = self.failures, None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _notice(rule: str, step: int, words: str, **fields: Any) -> Finding:
    return Finding(
        **{
            "id": f"{rule}@{step}@{time.time_ns()}", "rule": rule, "severity": "critical",
            "first_step": step, "last_step": step, "message": words, **fields,
        }
    )  # fmt: skip
