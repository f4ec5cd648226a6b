"""Messages into the standard `logging`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from gradwatch.alerts.channel import Channel
from gradwatch.alerts.message import Message
from gradwatch.alerts.routing import RoutingOptions

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}


class Log(Channel):
    """Writes messages to a logger; whatever handlers it has do the rest.

    Args:
        logger: A logger or its name.
        routing: Keyword arguments of `Routing`.

    Examples:
        >>> Log("training", min_severity="info")
        Log('training')
    """

    defaults: ClassVar[Mapping[str, Any]] = {"group_seconds": 0.0, "cooldown": 60.0, "per_hour": 600, "reminder": None}

    def __init__(self, logger: str | logging.Logger = "gradwatch.alerts", **routing: Unpack[RoutingOptions]) -> None:
        super().__init__(**routing)
        self._logger = logging.getLogger(logger) if isinstance(logger, str) else logger

    def send(self, message: Message) -> None:
        level = logging.INFO if message.is_resolved else _LEVELS[message.severity]
        self._logger.log(level, "%s\n%s", message.title, message.text)

    def __repr__(self) -> str:
        return f"Log({self._logger.name!r})"
