"""`events.jsonl`: one JSON object a line, read back past any line that is torn or not JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

KINDS = ("finding", "action", "alert", "mark")
#: A mark of this name: a process went on with the run from the step it names; what was recorded beyond it is superseded.
RESUMED = "resumed"


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
