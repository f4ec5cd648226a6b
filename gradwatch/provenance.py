"""Where and with what a run was made."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gradwatch.records import Parameter, RunInfo


def provenance(
    parameters: tuple[Parameter, ...], modules: tuple[str, ...] = (), *, framework: str, config: Mapping[str, Any]
) -> RunInfo:
    """The facts of a run that starts now in this process."""
    now = time.time()
    return RunInfo(
        parameters=parameters,
        modules=modules,
        started=now,
        heartbeat=now,
        framework=framework,
        versions=_versions(framework),
        host=socket.gethostname(),
        pid=os.getpid(),
        config=config,
    )


def default_run_dir() -> Path:
    """`runs/DATE-TIME-PID` in the working directory."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _versions(framework: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("gradwatch", "numpy", framework):
        try:
            versions[package] = metadata.version(package) if package else ""
        except metadata.PackageNotFoundError:
            versions[package] = getattr(sys.modules.get(package), "__version__", "")
    versions.pop("", None)
    return versions
