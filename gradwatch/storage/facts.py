"""`run.json`: the facts of a run, replaced as a whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwatch.errors import RunCorruptError, RunFormatError
from gradwatch.records import Parameter, RunInfo
from gradwatch.storage.layout import check_version


@dataclass
class Facts:
    """What `run.json` holds: the `RunInfo`, and the processes that wrote the run, the last one last.

    Args:
        info: Of the last process.
        processes: Host, pid, started, ended, status, first step and versions of each process.
    """

    info: RunInfo
    processes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parameters: Sequence[Any] = ()
        self._encoded = ""

    def encode(self) -> bytes:
        """The text of the file; the long part, the parameters, is encoded again only when it changed."""
        if self._parameters is not self.info.parameters or not self._encoded:
            self._parameters = self.info.parameters
            self._encoded = json.dumps([_json_of(parameter) for parameter in self.info.parameters])
        head = dataclasses.replace(self.info, parameters=()).to_json()
        del head["parameters"]
        text = json.dumps({**head, "processes": self.processes}, allow_nan=False, default=str)
        return f'{text[:-1]}, "parameters": {self._encoded}}}\n'.encode()


_FIELDS = [field.name for field in dataclasses.fields(Parameter)]


def _json_of(parameter: Parameter) -> dict[str, Any]:
    return {name: getattr(parameter, name) for name in _FIELDS}


def decode_facts(data: bytes, where: str) -> Facts:
    """The inverse of `Facts.encode`.

    Raises:
        RunFormatError: When it is not the file of a run, or of a newer version.
        RunCorruptError: When it is torn or damaged.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunCorruptError(f"{where} is damaged: {error}") from error
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise RunFormatError(f"{where} was not written by gradwatch")
    check_version(fields["format_version"])
    try:
        info = RunInfo.from_json(fields)
        processes = [dict(process) for process in fields.get("processes", ())]
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise RunCorruptError(f"{where} is damaged: {error}") from error
    return Facts(info, processes)
