"""What a watcher can be told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from gradwatch.actions.base import Action
from gradwatch.detectors.engine import Chosen
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.monitor import Listener
from gradwatch.records import Parameter

if TYPE_CHECKING:
    from gradwatch.alerts import Channel, Message


class Told(Protocol):
    """What can be told in JSON types."""

    def to_json(self) -> Mapping[str, Any]:
        """It in JSON types."""
        ...


@dataclass(frozen=True)
class Settings:
    """What every kind of watcher is told.

    Args:
        run_dir: Directory of the record; None makes `runs/DATE-TIME-PID` in the working directory.
        detectors: "default", or a list of rule names, detectors, and functions of a step batch.
        actions: Remedies, as a list, a `Ladder`, or the name of a preset: `protect`, `repair`, `rebuild`; none by
            default: watching alone changes nothing.
        alerts: Channels that tell people: those of `gradwatch.alerts`, functions that take a message, or words that
            `gradwatch.alerts.channel_named` knows.
        sinks: Where numbers are mirrored live: those of `gradwatch.sinks`.
        stats_every: Steps between samples of the dearer statistics (weight norm, update ratio, ...).
        activations: Sample the outputs of activation modules too (saturation, dying ReLU), by forward hooks that sit on
            the model only during a sampled step, in Keras inside the step. Not for what `torch.compile` compiles.
        check_every: Steps between looks at the record; findings are the same, later by up to this many steps. At 1,
            where no between-step action, alert or sink waits for them, up to twelve steps that take less than 50 ms
            together are looked at at once; `watcher.findings` looks first.
        flush_every: Steps that a killed process loses at most.
        flush_seconds: Seconds that a killed process loses at most.
        resume: Go on with a run that ended.
        overwrite: Replace a run that is there.
        dry_run: Record what the actions would do; do nothing.
        record: False in a process of a distributed training whose record another process writes: it measures, finds and
            acts alike, but writes nothing and tells nobody. For workers of a `tf.distribute` strategy that are not the
            chief it is always False.
        start_step: Number of the first step; by default 0, or what follows in a resumed run.
        preflight: What `gradwatch.preflight` found, to be kept with the record and shown in the report.
    """

    run_dir: str | os.PathLike[str] | None = None
    detectors: str | Sequence[Chosen] = "default"
    actions: str | Sequence[Action] = ()
    alerts: Sequence[Any] = ()
    sinks: Sequence[Listener] = ()
    stats_every: int = 10
    activations: bool = False
    check_every: int = 1
    flush_every: int = 50
    flush_seconds: float = 2.0
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    record: bool = True
    start_step: int | None = None
    preflight: Told | None = None

    def __post_init__(self) -> None:
        for name in ("stats_every", "check_every", "flush_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError.of(name, "an integer >= 1", value)
        if not self.flush_seconds > 0:
            raise ConfigurationError.of("flush_seconds", "> 0", self.flush_seconds)
        if self.alerts:
            from gradwatch.alerts import as_channels

            object.__setattr__(self, "alerts", tuple(as_channels(self.alerts)))
        if self.sinks:
            from gradwatch.sinks import checked_sinks

            object.__setattr__(self, "sinks", checked_sinks(self.sinks))
        if self.preflight is not None and not callable(getattr(self.preflight, "to_json", None)):
            raise ConfigurationError.of("preflight", "what gradwatch.preflight returned", self.preflight)
        if self.resume and self.overwrite:
            raise ConfigurationError("'resume' and 'overwrite' exclude each other")


class Options(TypedDict, total=False):
    """The keyword arguments of `Settings`."""

    run_dir: str | os.PathLike[str] | None
    detectors: str | Sequence[Chosen]
    actions: str | Sequence[Action]
    alerts: Sequence[Channel | Listener | Callable[[Message], object] | str]
    sinks: Sequence[Listener]
    stats_every: int
    activations: bool
    check_every: int
    flush_every: int
    flush_seconds: float
    resume: bool
    overwrite: bool
    dry_run: bool
    record: bool
    start_step: int | None
    preflight: Told | None


class TorchOptions(Options, total=False):
    """What only PyTorch has besides."""

    loss_fn: Any


class WatchOptions(TorchOptions, total=False):
    """The keyword arguments of `watch`: besides, what only several processes of PyTorch have."""

    per_rank: bool
    rank_timeout: float


def settings_from(given: Options) -> Settings:
    """Settings from keyword arguments; an unknown one gets an error that names the closest."""
    known = Settings.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UnknownNameError.among("setting", name, known)
    return Settings(**given)


def checked_parameters(parameters: Iterable[Parameter]) -> tuple[Parameter, ...]:
    """The parameters of a run.

    Raises:
        ConfigurationError: None, something else among them, or two of one name.
    """
    checked = tuple(parameters)
    if not checked:
        raise ConfigurationError.of("parameters", "a list of at least one gradwatch.Parameter", checked)
    names = set()
    for parameter in checked:
        if not isinstance(parameter, Parameter):
            raise ConfigurationError.of("parameters", "a list of gradwatch.Parameter", parameter)
        if parameter.name in names:
            raise ConfigurationError(f"two parameters are named {parameter.name!r}")
        names.add(parameter.name)
    return checked
