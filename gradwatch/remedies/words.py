"""Numbers in words."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """A number of bytes for people.

    Examples:
        >>> in_bytes(3_200_000)
        '3.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
