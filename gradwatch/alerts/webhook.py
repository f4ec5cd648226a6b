"""Messages as JSON to an address of your own, signed."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Unpack

from gradwatch.alerts.channel import Channel
from gradwatch.alerts.message import Message
from gradwatch.alerts.routing import RoutingOptions
from gradwatch.errors import ConfigurationError

#: Headers of every request.
ID_HEADER, TIME_HEADER, SIGNATURE_HEADER = "X-Gradwatch-Id", "X-Gradwatch-Timestamp", "X-Gradwatch-Signature"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A signed message goes to the address that was given and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Webhook(Channel):
    """Posts messages as JSON (`Message.to_json`); docs/alerts.md describes the fields and the signature.

    Any answer but 2xx counts as a failure, redirections too. `HTTPS_PROXY` and the like are obeyed, certificates are
    checked.

    Args:
        url: Where to, `https://` or `http://`; a password or token in it is never shown.
        secret: Signs each message (HMAC-SHA256); the receiver checks it with `verify_signature`.
        headers: Further headers, such as `Authorization`; their values are never shown.
        timeout: Seconds for the connection and for each answer.
        routing: Keyword arguments of `Routing`.

    Raises:
        ConfigurationError: When the address or another setting breaks a rule.

    Examples:
        >>> Webhook("https://me:password@example.org/hook?token=abc", secret="s3cret")
        Webhook('https://example.org')
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        **routing: Unpack[RoutingOptions],
    ) -> None:
        super().__init__(**routing)
        parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError("'url' must be an https:// or http:// address with a host")
        if not timeout > 0:
            raise ConfigurationError.of("timeout", "> 0", timeout)
        self._origin = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        self._url = urllib.parse.urlunsplit(parts._replace(netloc=self._origin.partition("://")[2]))
        self._headers = {"Content-Type": "application/json", "User-Agent": "gradwatch", **(headers or {})}
        if parts.username is not None:
            self._headers["Authorization"] = _basic(parts.username, parts.password or "")
        self._secret, self._timeout = secret, timeout
        self._secrets = tuple(
            filter(
                None,
                (url, self._url, parts.password, parts.query, parts.path.strip("/"), secret, *(headers or {}).values()),
            )
        )
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def secrets(self) -> tuple[str, ...]:
        return self._secrets

    def send(self, message: Message) -> None:
        body = json.dumps(message.to_json(), allow_nan=False).encode()
        timestamp = str(int(time.time()))
        headers = {**self._headers, ID_HEADER: message.id, TIME_HEADER: timestamp}
        if self._secret is not None:
            headers[SIGNATURE_HEADER] = signature(self._secret, timestamp, body)
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")  # noqa: S310 -- checked
        try:
            with self._opener.open(request, timeout=self._timeout):
                pass
        except urllib.error.HTTPError as error:
            with error:
                raise ConnectionError(f"{self._origin} answered {error.code} {error.reason}") from None

    def __repr__(self) -> str:
        return f"Webhook({self._origin!r})"


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """The value of `X-Gradwatch-Signature`: `sha256=` and the HMAC-SHA256 of timestamp, dot and body, in hex.

    Examples:
        >>> signature("s3cret", "1700000000", b"{}")[:20]
        'sha256=97926816e98fb'
    """
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def verify_signature(
    secret: str, headers: Mapping[str, str], body: bytes, *, max_age: float = 300.0, now: float | None = None
) -> bool:
    """For receivers: whether a request was signed with the secret, and lately.

    Args:
        secret: As given to `Webhook`.
        headers: Of the request.
        body: Of the request, as received.
        max_age: Seconds after which a signature is too old, so that a recorded request cannot be sent again.
        now: Unix time; by default now.
    """
    given = {name.lower(): value for name, value in headers.items()}
    timestamp, signed = given.get(TIME_HEADER.lower(), ""), given.get(SIGNATURE_HEADER.lower(), "")
    if not timestamp.isdecimal() or abs((time.time() if now is None else now) - int(timestamp)) > max_age:
        return False
    return hmac.compare_digest(signature(secret, timestamp, body).encode(), signed.encode())


def _basic(user: str, password: str) -> str:
    import base64

    pair = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password)}"
    return "Basic " + base64.b64encode(pair.encode()).decode()
