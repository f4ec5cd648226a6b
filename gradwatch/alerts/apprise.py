"""Messages through the apprise library: chats, mail, pagers, phones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

from gradwatch.alerts.channel import Channel
from gradwatch.alerts.message import Message
from gradwatch.alerts.routing import RoutingOptions
from gradwatch.errors import ConfigurationError, MissingDependencyError


class Apprise(Channel):
    """Sends to Slack, Discord, Teams, Telegram, e-mail, PagerDuty, ntfy, Feishu/Lark, DingTalk, WeCom and many more.

    Each address is served by itself: where one fails, only that one is tried again. Apprise's own limits on time are
    four seconds to connect and four for the answer (fifteen for mail); `?cto=10&rto=10` in an address changes them.

    Args:
        urls: Addresses as apprise writes them, such as `slack://token-a/token-b/token-c` or
            `mailtos://user:password@example.org`, or paths of apprise configuration files, which keep secrets out
            of your code. They are never shown.
        routing: Keyword arguments of `Routing`.

    Raises:
        MissingDependencyError: Without the apprise package.
        ConfigurationError: When apprise does not understand an address, or a setting breaks a rule.
    """

    def __init__(self, urls: str | Iterable[str], **routing: Unpack[RoutingOptions]) -> None:
        super().__init__(**routing)
        given = [urls] if isinstance(urls, str) else list(urls)
        if not given:
            raise ConfigurationError.of("urls", "at least one address", given)
        with warnings.catch_warnings():  # of modules that apprise imports when it meets an address
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                import apprise
            except ImportError:
                raise MissingDependencyError.of("apprise", extra="alerts") from None
            self._apprise: Any = apprise
            self._servers = [server for place, url in enumerate(given) for server in self._parsed(place, url)]
        self._secrets = (*given, *(part for server in self._servers for part in _secret_parts(server)))
        self._message, self._served = "", set[int]()

    @property
    def secrets(self) -> tuple[str, ...]:
        return self._secrets

    def send(self, message: Message) -> None:
        if message.id != self._message:
            self._message, self._served = message.id, set()
        failed = []
        for place, server in enumerate(self._servers):
            if place in self._served:
                continue
            if self._notify(server, message):
                self._served.add(place)
            else:
                failed.append(_kind(server))
        if failed:
            raise ConnectionError(f"apprise could not deliver to {', '.join(failed)}; its log says why")

    def __repr__(self) -> str:
        return f"Apprise({', '.join(map(_kind, self._servers))})"

    def _parsed(self, place: int, url: str) -> list[Any]:
        if not isinstance(url, str):
            raise ConfigurationError.of("urls", "addresses as text", type(url).__name__)
        if Path(url).is_file():
            config = self._apprise.AppriseConfig()
            config.add(url)
            servers = list(self._apprise.Apprise([config]))
        else:
            server = self._apprise.Apprise.instantiate(url)
            servers = [server] if server else []
        if not servers:
            # The address itself may hold a password: only its place and its scheme are shown.
            scheme = url.partition("://")[0] if "://" in url else "without ://"
            raise ConfigurationError(f"'urls[{place}]' must be an address that apprise understands: {scheme}")
        return servers

    def _notify(self, server: Any, message: Message) -> bool:
        kinds = self._apprise.NotifyType
        kind = kinds.SUCCESS if message.is_resolved else {"warning": kinds.WARNING, "critical": kinds.FAILURE}.get(
            message.severity, kinds.INFO
        )  # fmt: skip
        attach = self._picture(message) if getattr(server, "attachment_support", False) else None
        one = self._apprise.Apprise([server])
        return bool(
            one.notify(body=message.text, title=message.title, notify_type=kind, body_format="text", attach=attach)
        )

    def _picture(self, message: Message) -> Any:
        if message.plot is None:
            return None
        from apprise.attachment.memory import AttachMemory

        memory: Any = AttachMemory
        picture = memory(content=message.plot, name="global_norm.png", mimetype="image/png")
        return self._apprise.AppriseAttachment([picture])


def _kind(server: Any) -> str:
    """What an address is, without what it says: `slack`, `mailtos`."""
    return str(server.url(privacy=True)).partition("://")[0]


def _secret_parts(server: Any) -> list[str]:
    open_text, private = str(server.url(privacy=False)), str(server.url(privacy=True))
    password = getattr(server, "password", None)
    return [text for text in (open_text, password) if text and text != private]
