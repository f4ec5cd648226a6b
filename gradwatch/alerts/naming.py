"""Channels from words, functions and the environment; and a message to see whether they work."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from gradwatch.alerts.apprise import Apprise
from gradwatch.alerts.channel import Channel
from gradwatch.alerts.command import Command
from gradwatch.alerts.console import Console
from gradwatch.alerts.function import Call
from gradwatch.alerts.log import Log
from gradwatch.alerts.message import test_message
from gradwatch.alerts.routing import RoutingOptions
from gradwatch.alerts.webhook import Webhook
from gradwatch.errors import ConfigurationError
from gradwatch.redaction import redacted

#: Addresses of channels, separated by white space, and the key of webhooks.
CHANNELS_VARIABLE, SECRET_VARIABLE = "GRADWATCH_ALERTS", "GRADWATCH_WEBHOOK_SECRET"


@dataclass(frozen=True)
class Outcome:
    """How a test message fared.

    Args:
        channel: Which channel, without its secrets.
        error: Why it failed; empty when it went out.
    """

    channel: str
    error: str = ""

    @property
    def is_sent(self) -> bool:
        """Whether it went out."""
        return not self.error


def channel_named(name: str, **routing: Unpack[RoutingOptions]) -> Channel:
    """The channel that a word stands for.

    Args:
        name: `log`, `console`, `command:PROGRAM ARGUMENTS`, an `https://` or `http://` address for a `Webhook` (signed
            with the environment's `GRADWATCH_WEBHOOK_SECRET`, where that is set), or anything that apprise understands.
        routing: Keyword arguments of `Routing`.

    Examples:
        >>> channel_named("command:notify-send '{title}'")
        Command('notify-send')
    """
    if name == "log":
        return Log(**routing)
    if name == "console":
        return Console(**routing)
    if name.startswith("command:"):
        return Command(shlex.split(name.removeprefix("command:")), **routing)
    if name.startswith(("https://", "http://")):
        return Webhook(name, secret=os.environ.get(SECRET_VARIABLE), **routing)
    return Apprise(name, **routing)


def channels_from_environment(
    environment: Mapping[str, str] = os.environ, **routing: Unpack[RoutingOptions]
) -> list[Channel]:
    """The channels that `GRADWATCH_ALERTS` names, separated by white space; so no secret stands on a command line."""
    return [channel_named(name, **routing) for name in environment.get(CHANNELS_VARIABLE, "").split()]


def as_channels(given: Iterable[Any]) -> list[Any]:
    """What a watcher was told to alert, as channels: words become those they stand for, functions a `Call`.

    Raises:
        ConfigurationError: For anything else.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigurationError.of("alerts", "a list of channels", given if not isinstance(given, str) else "a text")
    return [_as_channel(item) for item in given]


def alert_test(channels: Iterable[Channel]) -> list[Outcome]:
    """Send one message to each channel, now.

    Returns:
        One outcome for each, in their order.

    Examples:
        >>> alert_test([Call(lambda message: None), Call(lambda message: 1 / 0)])[1].error
        'ZeroDivisionError: division by zero'
    """
    message = test_message(socket.gethostname(), os.getpid())
    outcomes = []
    for channel in channels:
        try:
            channel.send(message)
            outcomes.append(Outcome(repr(channel)))
        except Exception as error:  # noqa: BLE001 -- whatever a receiver does is what is asked for here
            outcomes.append(Outcome(repr(channel), redacted(f"{type(error).__name__}: {error}", channel.secrets)))
    return outcomes


def _as_channel(item: Any) -> Any:
    if isinstance(item, str):
        return channel_named(item)
    if isinstance(item, type):
        raise ConfigurationError(f"'alerts' must hold channels: {item.__name__} is a class; write {item.__name__}(...)")
    if all(hasattr(item, name) for name in ("open", "steps", "finding", "action", "close")):
        return item
    if callable(item):
        return Call(item)
    raise ConfigurationError.of(
        "alerts", "a list of channels, functions of a message, or their names", type(item).__name__
    )
