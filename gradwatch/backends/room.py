"""What snapshots cost, and whether there is room for them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from gradwatch.errors import ConfigurationError

logger = logging.getLogger("gradwatch")
#: Share of the free memory or disk that snapshots may take, and above which a user should hear of it.
_MOST, _MUCH = 0.8, 0.1


def require_room(keep: int, size: int, directory: Path | None) -> None:
    """Check that snapshots fit, and say in the log what they cost: as a warning where that is much.

    Args:
        keep: How many.
        size: Bytes of each.
        directory: Where they are written; None keeps them in host memory.

    Raises:
        ConfigurationError: There is no room for them.
    """
    cost = keep * size
    free = _free_memory() if directory is None else shutil.disk_usage(_existing(directory)).free
    if cost > _MOST * free:
        place = "memory" if directory is None else f"disk ({directory})"
        raise ConfigurationError(
            f"Rollback(keep={keep}) needs {in_bytes(cost)} of {place} and {in_bytes(free)} are free: "
            "lower 'keep', or choose where='disk'"
        )
    level, place = logging.WARNING if cost > _MUCH * free else logging.INFO, "memory" if directory is None else "disk"
    told = (keep, in_bytes(cost), place, in_bytes(free))
    logger.log(level, "gradwatch: room for %d snapshots of the weights: up to %s of %s (%s are free)", *told)


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


def _free_memory() -> int:
    """Memory that is free now, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**62


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
