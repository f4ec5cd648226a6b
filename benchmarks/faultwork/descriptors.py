"""Which files of a folder this process holds open; nothing where the system does not tell."""

from __future__ import annotations

from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")


def open_files(folder: Path) -> list[str]:
    """Paths of the open files below a folder."""
    found = []
    for link in _DESCRIPTORS.iterdir() if _DESCRIPTORS.exists() else ():
        try:
            path = str(link.readlink())
        except OSError:  # the descriptor of this very listing
            continue
        if path.startswith(f"{folder}/"):
            found.append(path)
    return found
