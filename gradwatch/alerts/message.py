"""What a person gets to read: one message about everything that is new."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gradwatch.records import SEVERITIES, Severity

State = Literal["firing", "reminder", "passed", "resolved"]
#: Names the layout of `Message.to_json`.
SCHEMA = "gradwatch.alert/1"
#: Layers that the text lists by name.
_NAMED = 6
_STATE_WORDS = {"firing": "", "reminder": "still ", "passed": "over: ", "resolved": "resolved: "}


@dataclass(frozen=True, slots=True)
class Group:
    """What a message says of one rule: all its findings together.

    Args:
        rule: The rule.
        state: `firing`; `reminder` (told before, and goes on); `passed` (over before it could be told); `resolved`.
        severity: The worst of the findings.
        count: How many findings.
        first_step: Where the first began.
        last_step: Where it was seen last, or resolved.
        layers: The first layers by name, the worst first.
        layer_count: How many layers in all.
        message: One sentence on the worst finding.
        cause: Its likely cause; empty while unknown.
        advice: What to do, the best first.
        done: What gradwatch did about it since it was last told.
        waiting_since: Unix time from which the findings were held back by a cooldown, the rate limit, or quiet hours.
        run: Name of the run, in messages of a watchdog over several.
    """

    rule: str
    state: State
    severity: Severity
    count: int
    first_step: int
    last_step: int
    layers: tuple[str, ...] = ()
    layer_count: int = 0
    message: str = ""
    cause: str = ""
    advice: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    waiting_since: float | None = None
    run: str = ""

    @property
    def headline(self) -> str:
        """Rule and layers in a few words."""
        where = f" in {self.layers[0]}" if self.layers else ""
        more = f" and {self.layer_count - 1} more layers" if self.layer_count > 1 else ""
        return f"{_STATE_WORDS[self.state]}{self._subject}{where}{more}"

    @property
    def _subject(self) -> str:
        return f"{self.run} {self.rule}" if self.run else self.rule

    @property
    def text(self) -> str:
        """A paragraph."""
        steps = (
            f"step {self.first_step}"
            if self.first_step == self.last_step
            else f"steps {self.first_step}-{self.last_step}"
        )
        lines = [f"{_STATE_WORDS[self.state]}{self._subject} ({self.severity}), {steps}"]
        if self.layers:
            lines.append(f"  Layers: {_listed(self.layers[:_NAMED], self.layer_count)}")
        lines += [f"  {self.message}"] if self.message else []
        lines += [f"  Cause: {self.cause}"] if self.cause else []
        lines += [f"  Advice: {advice}" for advice in self.advice[:3]]
        lines += [f"  Done: {done}" for done in self.done]
        if self.waiting_since is not None:
            since = time.strftime("%H:%M", time.localtime(self.waiting_since))
            lines.append(f"  Held back since {since}: {self.count} finding{'s' * (self.count > 1)} in this one message")
        return "\n".join(line if line[:2] != "  " else "  " + visible(line[2:]) for line in lines)


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Args:
        run: Name of the run.
        run_dir: Path of the run.
        host: Where it trains.
        pid: Its process.
        step: The last step that was seen.
        groups: What is new, the worst first.
        id: Unique; the same when a delivery is tried again, so that a receiver can drop what it got twice.
        time: Unix time of its making.
        is_test: Sent by `alert_test`.
        plot: A small picture (PNG) of the global norm, where there is one.
    """

    run: str
    run_dir: str = ""
    host: str = ""
    pid: int = 0
    step: int = 0
    groups: tuple[Group, ...] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: float = field(default_factory=time.time)
    is_test: bool = False
    plot: bytes | None = field(default=None, repr=False)

    @property
    def severity(self) -> Severity:
        """The worst that is not resolved; `info` when all is."""
        alive = [SEVERITIES.index(group.severity) for group in self.groups if group.state != "resolved"]
        return SEVERITIES[max(alive, default=0)]

    @property
    def is_resolved(self) -> bool:
        """Whether it only tells of what is over."""
        return bool(self.groups) and all(group.state == "resolved" for group in self.groups)

    @property
    def title(self) -> str:
        """One line, such as `[CRITICAL] mnist: exploding in conv1 and 39 more layers`."""
        if self.is_test:
            return f"[TEST] {visible(self.run)}: this channel works"
        mark = "RESOLVED" if self.is_resolved else self.severity.upper()
        more = f" (+{len(self.groups) - 1} more)" if len(self.groups) > 1 else ""
        return visible(f"[{mark}] {self.run}: {self.groups[0].headline.removeprefix('resolved: ')}{more}")

    @property
    def text(self) -> str:
        """The whole message as plain text."""
        parts = [group.text for group in self.groups]
        process = f" on {self.host} (process {self.pid})" if self.host else ""
        place = f"Run {visible(self.run)}{visible(process)}, step {self.step}"
        parts.append(f"{place}\n{visible(self.run_dir)}" if self.run_dir else place)
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The message as JSON types; docs/alerts.md describes every field."""
        data = dataclasses.asdict(self)
        del data["plot"]
        return {
            "schema": SCHEMA,
            **data,
            "severity": self.severity,
            "resolved": self.is_resolved,
            "title": self.title,
            "text": self.text,
        }


def test_message(host: str, pid: int) -> Message:
    """What `alert_test` sends."""
    group = Group(
        "exploding", "firing", "info", 1, 120, 131, ("conv1",), 1,
        message="This is a test. A real message names the layers, the cause and what to do.",
        cause="gradwatch alert-test was run", advice=("nothing to do",),
    )  # fmt: skip
    return Message("alert-test", host=host, pid=pid, step=131, groups=(group,), is_test=True)


def visible(text: str) -> str:
    r"""The text on one line without control characters: no name can forge a line or a header of a message.

    Examples:
        >>> visible("run\r\nBcc: all")
        'run  Bcc: all'
    """
    return "".join(character if character.isprintable() else " " for character in text)


def _listed(names: Sequence[str], count: int) -> str:
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return ", ".join(names) + more
