"""`events.jsonl`: one JSON object a line, read back past any line that is torn or not JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from gradwatch.records import ActionRecord, Finding
from gradwatch.storage.files import Files
from gradwatch.storage.layout import EVENTS_FILE

T = TypeVar("T", Finding, ActionRecord)
KINDS = ("finding", "action", "alert", "mark")
#: A mark of this name: the run went on from the step it names; what was recorded from there on is superseded.
RESUMED = "resumed"
#: A mark of this name: steps were left out because the disk could not follow.
THINNED = "thinned"


def encode_event(kind: str, data: Mapping[str, Any]) -> bytes:
    """One line; what JSON cannot hold is written as text, so that no event is lost for it."""
    fields = {"kind": kind, "time": time.time(), **{k: v for k, v in data.items() if k not in {"kind", "time"}}}
    try:
        line = json.dumps(fields, default=_plain, allow_nan=False)
    except ValueError:
        line = json.dumps(_finite(fields), default=_plain, allow_nan=False, skipkeys=True)
    return line.encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return _finite(value.item())
    return _finite(value.tolist()) if isinstance(value, np.ndarray) else str(value)


def _finite(value: Any) -> Any:
    """As in `records`: NaN becomes null, infinities become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple, set)) else value


def decode_events(data: bytes) -> Iterator[dict[str, Any]]:
    """The events of whole lines."""
    for line in data.split(b"\n")[:-1]:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("kind"), str):
            yield event


def whole_lines(data: bytes) -> int:
    """How many bytes the complete lines take."""
    return data.rfind(b"\n") + 1


class EventLog:
    """The events of a run, read further on `refresh`.

    Args:
        files: Of the run.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._offset = 0
        self._events: list[dict[str, Any]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that were added since."""
        try:
            data = self._files.read(EVENTS_FILE, self._offset)
        except FileNotFoundError:
            return
        self._offset += whole_lines(data)
        self._events += decode_events(data)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, without the word for it."""
        return [{k: v for k, v in event.items() if k != "kind"} for event in self._events if event["kind"] == kind]

    def findings(self) -> list[Finding]:
        """The last state of each finding, in order of first appearance."""
        return self._last(Finding, "finding", lambda finding: finding.first_step)

    def actions(self) -> list[ActionRecord]:
        """The last state of each action, in order of first appearance."""
        return self._last(ActionRecord, "action", lambda action: action.step)

    def _last(self, build: type[T], kind: str, step: Callable[[T], int]) -> list[T]:
        found: dict[str, T] = {}
        for event in self._events:
            try:
                if event["kind"] == "mark" and event.get("name") == RESUMED:
                    limit = int(event["step"])
                    found = {key: item for key, item in found.items() if step(item) < limit}
                elif event["kind"] == kind:
                    item = build.from_json(event)
                    step(item) + 0
                    found[str(event["id"])] = item
            except (KeyError, TypeError, ValueError):  # not one of ours
                continue
        return list(found.values())
