"""Runs the detectors over a record again, with thresholds of one's own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.catalogue import CATALOGUE
from gradwatch.detectors.engine import Engine, replay
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import Finding

if TYPE_CHECKING:
    from gradwatch.reader import RunReader


def findings_of(run: RunReader, rules: Path | None = None) -> list[Finding]:
    """The findings of a replay.

    Args:
        run: The run.
        rules: TOML with thresholds; by default those the run was watched with.

    Raises:
        ConfigurationError: The file cannot be read, names an unknown rule, or holds a nonsense threshold.
    """
    info = run.info
    context = RunContext(info.parameters, framework=info.framework, config=info.config)
    config = info.config.get("detectors")
    engine = Engine.from_config(config, context) if isinstance(config, dict) else Engine("default", context)
    return replay(run.batches(), engine if rules is None else Engine(_detectors(rules), context))


def _detectors(path: Path) -> list[Any]:
    """The detectors that a rules file asks for.

    A table per rule sets its thresholds; the rules without a table run with theirs. A list `only` at the top leaves all
    others out: `only = ["exploding", "nonfinite"]`.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{str(path)!r} is not TOML: {error}") from error
    only = settings.pop("only", list(CATALOGUE))
    for name in [*only, *settings]:
        if name not in CATALOGUE:
            raise UnknownNameError.among("rule", name, CATALOGUE)
    return [_detector(name, settings.get(name, {}), path) for name in dict.fromkeys([*only, *settings])]


def _detector(name: str, thresholds: Any, path: Path) -> Any:
    if not isinstance(thresholds, dict):
        raise ConfigurationError.of(name, f"a table of thresholds in {str(path)!r}", thresholds)
    try:
        return CATALOGUE[name](**thresholds)
    except TypeError as error:
        known = ", ".join(CATALOGUE[name]().config())
        raise ConfigurationError(f"rule {name!r} in {str(path)!r}: {error}. Known: {known}") from error
