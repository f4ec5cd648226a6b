"""Where and with what a benchmark ran; goes into every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Date, processor, cores, Python, and versions of the packages that matter."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 -- a pseudo file
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "pyarrow", *packages)}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }
