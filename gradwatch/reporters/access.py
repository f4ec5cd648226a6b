"""Who may see live pages: this machine, or who knows the token."""

from __future__ import annotations

import ipaddress
import secrets


def token_for(host: str, token: str | None) -> str | None:
    """The token that is needed at this address: the given one, a new one where others can reach it, else none."""
    return token or (None if is_local(host) else secrets.token_urlsafe(24))


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
