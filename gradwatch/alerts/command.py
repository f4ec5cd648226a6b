"""Messages to a program of your own."""

from __future__ import annotations

import json
import os
import signal
import subprocess  # programs, never a shell  # nosec B404
from collections.abc import Sequence
from typing import Unpack

from gradwatch.alerts.channel import Channel
from gradwatch.alerts.message import Message
from gradwatch.alerts.routing import RoutingOptions
from gradwatch.errors import ConfigurationError


class Command(Channel):
    """Runs a program for each message: JSON on its standard input, the main facts in its environment.

    The environment holds `GRADWATCH_TITLE`, `GRADWATCH_TEXT`, `GRADWATCH_SEVERITY`, `GRADWATCH_RESOLVED` (0 or 1),
    `GRADWATCH_RUN`, `GRADWATCH_RUN_DIR`, `GRADWATCH_STEP`. No shell is involved. `{title}` and `{text}` in an argument
    are replaced; in a script for a shell write `"$GRADWATCH_TEXT"` instead, since a message holds names that others
    chose. An exit status other than 0 counts as a failure.

    Args:
        arguments: The program and its arguments.
        timeout: Seconds until it is killed, with all it started.
        routing: Keyword arguments of `Routing`.

    Raises:
        ConfigurationError: When a setting breaks a rule.

    Examples:
        >>> Command(["notify-send", "{title}", "{text}"], min_severity="critical")
        Command('notify-send')
    """

    def __init__(self, arguments: Sequence[str], *, timeout: float = 30.0, **routing: Unpack[RoutingOptions]) -> None:
        super().__init__(**routing)
        texts = isinstance(arguments, (list, tuple)) and all(isinstance(a, (str, os.PathLike)) for a in arguments)
        if not arguments or not texts:
            raise ConfigurationError.of("arguments", "a list: a program and its arguments", arguments)
        if not timeout > 0:
            raise ConfigurationError.of("timeout", "> 0", timeout)
        self._arguments, self._timeout = [os.fspath(argument) for argument in arguments], timeout

    @property
    def secrets(self) -> tuple[str, ...]:
        return tuple(self._arguments[1:])

    def send(self, message: Message) -> None:
        filled = [_filled(argument, message) for argument in self._arguments]
        process = subprocess.Popen(  # noqa: S603 -- the user's own program  # nosec B603
            filled,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | _facts(message),
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(json.dumps(message.to_json(), allow_nan=False).encode(), self._timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self._arguments[0]} took longer than {self._timeout:g} s and was killed") from None
        finally:
            _end(process)
        if process.returncode:
            words = errors.decode(errors="replace").strip()[-200:]
            raise RuntimeError(f"{self._arguments[0]} ended with status {process.returncode}: {words}")

    def __repr__(self) -> str:
        return f"Command({self._arguments[0]!r})"


def _filled(argument: str, message: Message) -> str:
    filled = argument.replace("{title}", message.title).replace("{text}", message.text)
    # A run may be named like an option: a space keeps what it fills in a text.
    return " " + filled if filled.startswith("-") and argument.startswith("{") else filled


def _facts(message: Message) -> dict[str, str]:
    return {
        "GRADWATCH_TITLE": message.title,
        "GRADWATCH_TEXT": message.text,
        "GRADWATCH_SEVERITY": message.severity,
        "GRADWATCH_RESOLVED": str(int(message.is_resolved)),
        "GRADWATCH_RUN": message.run,
        "GRADWATCH_RUN_DIR": message.run_dir,
        "GRADWATCH_STEP": str(message.step),
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            stream.close()
