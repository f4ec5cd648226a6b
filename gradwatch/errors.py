"""Every error that gradwatch raises on purpose.

    GradwatchError
    ├── ConfigurationError (ValueError)      a value that breaks a rule: names the thing, the rule and the value
    │   └── UnknownNameError                 a rule, action, statistic or parameter that is none; lists the known ones
    ├── ModelError (TypeError)               a model or optimizer that cannot be watched, and why
    ├── MissingDependencyError (ImportError) an optional package is absent; says which extra to install
    ├── RunError                             the run directory
    │   ├── RunNotFoundError (FileNotFoundError)  nothing there, or not a gradwatch run
    │   ├── RunExistsError (FileExistsError)      there already: say resume=True or overwrite=True
    │   ├── RunLockedError                   another live process writes to it; names the process
    │   ├── RunFormatError                   written by a newer gradwatch, or by something else
    │   └── RunCorruptError                  a file that should be whole is not
    ├── WatcherClosedError (RuntimeError)    a watcher used after close()
    └── StopTraining                         the action `Stop`: leave the training loop

`except GradwatchError` catches them all. Nothing else is raised into a training loop (DESIGN.md, law 2).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GradwatchError(Exception):
    """Base of all errors of gradwatch."""


class ConfigurationError(GradwatchError, ValueError):
    """A setting breaks a rule.

    Examples:
        >>> raise ConfigurationError.of("max_norm", "> 0", -1.0)
        Traceback (most recent call last):
        gradwatch.errors.ConfigurationError: 'max_norm' must be > 0: -1.0
    """

    @classmethod
    def of(cls, name: str, rule: str, value: object) -> ConfigurationError:
        """The error that says: `name` must be `rule`, but is `value`."""
        return cls(f"'{name}' must be {rule}: {value!r}")


class UnknownNameError(ConfigurationError):
    """A name that is none of the known ones.

    Examples:
        >>> raise UnknownNameError.among("rule", "explodng", ["exploding", "spike"])
        Traceback (most recent call last):
        gradwatch.errors.UnknownNameError: unknown rule 'explodng'; did you mean 'exploding'? Known: exploding, spike
    """

    @classmethod
    def among(cls, kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
        """The error that names the closest of the `known` names of this `kind`."""
        names = sorted(known)
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return cls(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")


class ModelError(GradwatchError, TypeError):
    """The model or the optimizer cannot be watched."""


class MissingDependencyError(GradwatchError, ImportError):
    """An optional package is not installed.

    Examples:
        >>> raise MissingDependencyError.of("lightning", extra="lightning")
        Traceback (most recent call last):
        gradwatch.errors.MissingDependencyError: 'lightning' is not installed: pip install "gradwatch[lightning]"
    """

    @classmethod
    def of(cls, package: str, *, extra: str) -> MissingDependencyError:
        """The error that says which `extra` brings the `package`."""
        return cls(f"'{package}' is not installed: pip install \"gradwatch[{extra}]\"")


class RunError(GradwatchError):
    """Something about a run directory."""


class RunNotFoundError(RunError, FileNotFoundError):
    """There is no run at this path."""


class RunExistsError(RunError, FileExistsError):
    """There is a run at this path already."""


class RunLockedError(RunError):
    """Another process is writing to this run."""


class RunFormatError(RunError):
    """The directory was written by a newer gradwatch or by another program."""


class RunCorruptError(RunError):
    """A file of the run that should be whole is not."""


class WatcherClosedError(GradwatchError, RuntimeError):
    """The watcher was used after `close()`."""


class StopTraining(GradwatchError):  # noqa: N818 -- a request to the loop, like StopIteration, not a failure
    """Raised at a step boundary by the action `Stop`; carries the finding's words as its message."""
