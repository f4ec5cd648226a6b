"""Messages as alerts of Weights & Biases, which mails or slacks them on."""

from __future__ import annotations

from typing import Any, Unpack

from gradwatch.alerts.channel import Channel
from gradwatch.alerts.message import Message
from gradwatch.alerts.routing import RoutingOptions
from gradwatch.errors import ConfigurationError, MissingDependencyError

_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}


class WandBAlert(Channel):
    """Sends through `wandb.alert` of a run.

    Args:
        run: A W&B run; by default the one that is active.
        routing: Keyword arguments of `Routing`.

    Raises:
        MissingDependencyError: Without the wandb package.
        ConfigurationError: When no run is active.
    """

    def __init__(self, run: Any = None, **routing: Unpack[RoutingOptions]) -> None:
        super().__init__(**routing)
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError.of("wandb", extra="wandb") from None
        self._run = run if run is not None else wandb.run
        if self._run is None:
            raise ConfigurationError("no W&B run is active: call wandb.init() first, or pass 'run'")
        self._levels = wandb.AlertLevel

    def send(self, message: Message) -> None:
        self._run.alert(title=message.title, text=message.text, level=self._levels[_LEVELS[message.severity]])
