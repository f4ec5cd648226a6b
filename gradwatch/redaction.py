"""Taking secrets out of texts that are shown, logged or recorded."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: What stands between `://` and `@` of an address, and what follows its `?`.
_CREDENTIALS, _QUERY = re.compile(r"(://)[^/?#@\s]*@"), re.compile(r"(://[^?\s'\"]*\?)[^\s'\")]+")


def redacted(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets.

    Examples:
        >>> redacted("401 for https://x/?token=abc", ("abc",))
        '401 for https://x/?token=***'
    """
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def without_credentials(text: str) -> str:
    """The text without users, passwords and queries of the addresses in it, where secrets stand that nobody named.

    Examples:
        >>> without_credentials("no run at s3://key:secret@bucket/run?token=abc")
        'no run at s3://***@bucket/run?***'
    """
    return _QUERY.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))
