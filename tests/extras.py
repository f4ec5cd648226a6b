"""Tests of an extra that is not installed, or of a server that was not asked for, are left out by name, visibly.

Mark a test `needs("alerts")` or `server("prometheus")`. GRADWATCH_TEST_EXTRAS names the extras to test, by default
those that are installed; GRADWATCH_TEST_SERVERS the servers, by default none. What is named and not there ends the run:
it is tested or fails, never skipped in silence.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Mapping

import pytest

#: Extra to the packages that its tests import.
EXTRAS = {
    "alerts": ("apprise", "aiosmtpd"),
    "tensorboard": ("tensorboard",),
    "prometheus": ("prometheus_client",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "remote": ("fsspec",),
    "dev": ("duckdb", "polars"),
    "fastai": ("fastai",),
    "flax": ("flax", "optax"),
    "deepspeed": ("deepspeed",),
}
#: Server to its program.
SERVERS = {"prometheus": "prometheus"}


def _chosen(variable: str, known: Iterable[str], there: Mapping[str, bool], default: Iterable[str]) -> tuple[str, ...]:
    text = os.environ.get(variable)
    names = tuple(default) if text is None else tuple(filter(None, (name.strip() for name in text.split(","))))
    for name in () if names == ("none",) else names:
        if name not in known:
            raise pytest.UsageError(f"{variable}: unknown name {name!r}. Known: {', '.join(known)}")
        if not there[name]:
            raise pytest.UsageError(f"{variable}: {name!r} is not installed")
    return () if names == ("none",) else names


_installed = {name: all(map(importlib.util.find_spec, packages)) for name, packages in EXTRAS.items()}
_programs = {name: shutil.which(program) is not None for name, program in SERVERS.items()}
CHOSEN = {
    "needs": _chosen("GRADWATCH_TEST_EXTRAS", EXTRAS, _installed, [name for name in EXTRAS if _installed[name]]),
    "server": _chosen("GRADWATCH_TEST_SERVERS", SERVERS, _programs, ()),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(name): belongs to one of the extras in GRADWATCH_TEST_EXTRAS")
    config.addinivalue_line("markers", "server(name): needs one of the servers in GRADWATCH_TEST_SERVERS")


def pytest_report_header() -> list[str]:
    return [_line("needs", "extras", EXTRAS), _line("server", "servers", SERVERS)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        if any(mark.args[0] not in CHOSEN[kind] for kind in CHOSEN for mark in item.iter_markers(kind))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _line(kind: str, words: str, known: Iterable[str]) -> str:
    left_out = [name for name in known if name not in CHOSEN[kind]]
    more = f"; left out: {', '.join(left_out)}" if left_out else ""
    return f"{words} under test: {', '.join(CHOSEN[kind]) or 'none'}{more}"
