"""Messages to a function of your own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from gradwatch.alerts.channel import Channel
from gradwatch.alerts.message import Message
from gradwatch.alerts.routing import RoutingOptions
from gradwatch.errors import ConfigurationError


class Call(Channel):
    """Calls a function with each message, in a thread of gradwatch; what it raises counts as a failure.

    Args:
        function: Takes a `Message`.
        routing: Keyword arguments of `Routing`.

    Raises:
        ConfigurationError: When it cannot be called, or a setting breaks a rule.

    Examples:
        >>> Call(lambda message: print(message.title), min_severity="info")
        Call(<lambda>)
    """

    def __init__(self, function: Callable[[Message], object], **routing: Unpack[RoutingOptions]) -> None:
        super().__init__(**routing)
        if not callable(function):
            raise ConfigurationError.of("function", "callable", function)
        self._function = function

    def send(self, message: Message) -> None:
        self._function(message)

    def __repr__(self) -> str:
        return f"Call({getattr(self._function, '__name__', type(self._function).__name__)})"
