"""`gradwatch.heal`: try remedies on short forks of a sick training, rank them, and hand over the best."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from gradwatch.actions.presets import PRESETS
from gradwatch.errors import ConfigurationError, GradwatchError, UnknownNameError
from gradwatch.records import SEVERITIES, Finding
from gradwatch.remedies import initialize, insert_norm, mend_output, replace_activation
from gradwatch.remedies.initialization import fill
from gradwatch.remedies.network import Change, layers_of
from gradwatch.remedies.structure import is_saturating
from gradwatch.watch import watch

#: Share of the candidates that goes on to the next, longer round; the last is a race of two.
_KEEP, _LAST = 0.4, 2
#: Steps below which a round says nothing.
_LEAST = 3
#: Losses at the end of a fork that its rank is taken from.
_TAIL = 10
#: A loss that has fallen by this share of the first one shows that something is learnt.
_LEARNT = 0.03


def _random_states() -> tuple[Any, ...]:
    """Of all global generators that a training may draw from."""
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices  # noqa: NPY002 -- the user's


def _set_random_states(states: tuple[Any, ...]) -> None:
    of_python, of_numpy, of_torch, on_devices = states
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002 -- the user's
    torch.set_rng_state(of_torch)
    torch.cuda.set_rng_state_all(on_devices)


class Training(Protocol):
    """A training that `heal` can fork: made anew, from the same snapshot, each time."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def optimizer(self) -> Optimizer | list[Optimizer]:
        """What updates it."""
        ...

    def step(self, k: int) -> Any:
        """Do everything up to and including update number k; returns the loss."""
        ...


#: Changes a training before its first step; returns what was changed.
Prepare = Callable[[Training], Sequence[Change]]


def _nothing(_: Training) -> Sequence[Change]:
    """Changes nothing."""
    return ()


@dataclass(frozen=True)
class Candidate:
    """A remedy, or a combination.

    Args:
        name: What the table calls it.
        prepare: Applied to a fresh training.
        lr_factor: Factor on the learning rate of every step.
    """

    name: str
    prepare: Prepare = _nothing
    lr_factor: float = 1.0


@dataclass
class Fork:
    """One candidate's run.

    Args:
        candidate: Which.
        training: Its training, which can go on.
        steps: Steps taken.
        losses: Their losses.
        findings: What was found.
        failed: Why the candidate could not be applied; empty when it could.
    """

    candidate: Candidate
    training: Training
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    failed: str = ""
    _state: Any = field(default=None, init=False, repr=False)
    _random: Any = field(default_factory=_random_states, init=False, repr=False)

    @property
    def loss(self) -> float:
        """Median of the last losses; infinite when they are not finite."""
        tail = [loss if math.isfinite(loss) else math.inf for loss in self.losses[-_TAIL:]]
        return statistics.median(tail) if tail and not self.failed else math.inf

    @property
    def sickness(self) -> int:
        """2 with a critical finding open, 1 with a warning, 0 without."""
        return max((SEVERITIES.index(finding.severity) for finding in self.findings if finding.is_open), default=0)

    def run(self, steps: int, *, preset: str = "protect") -> None:
        """Take further steps at the candidate's learning rate.

        Args:
            steps: How many.
            preset: The actions meanwhile: `protect`, or for a long way alone `repair` or `rebuild`.

        Raises:
            UnknownNameError: No such preset.
            StopTraining: The preset gave up.
        """
        if preset not in PRESETS:
            raise UnknownNameError.among("preset of actions", preset, PRESETS)
        training = self.training
        with self._own_random_numbers(), tempfile.TemporaryDirectory() as folder:
            with watch(training.model, training.optimizer, run_dir=Path(folder) / "run", actions=preset) as watcher:
                if self._state is not None:
                    watcher.load_state_dict(self._state)
                else:
                    state = watcher._policy.state  # noqa: SLF001 -- a factor from the start, which no way back undoes
                    state.lr_factor, state.recovered = self.candidate.lr_factor, self.candidate.lr_factor < 1.0
                for k in range(self.steps, self.steps + steps):
                    self.losses.append(float(training.step(k)))
                    watcher.log(loss=self.losses[-1])
                self._state = watcher.state_dict()
            self.findings = list({finding.id: finding for finding in [*self.findings, *watcher.findings]}.values())
        self.steps = len(self.losses)

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """What a fork draws does not depend on the others: it is what it would draw alone."""
        outside = _random_states()
        _set_random_states(self._random)
        try:
            yield
        finally:
            self._random = _random_states()
            _set_random_states(outside)

    @property
    def rank(self) -> tuple[bool, bool, float, int]:
        """The less the better: finite, then learning or at least well, then the loss, then the gradients' health.

        A network that is stuck at the loss of a constant is not better than one that begins above it and is well.
        """
        first = next((loss for loss in self.losses if math.isfinite(loss)), math.inf)
        is_stuck = self.sickness > 0 and not self.loss < first - _LEARNT * abs(first)
        return not math.isfinite(self.loss), is_stuck, self.loss, self.sickness


@dataclass
class Healing:
    """What `heal` found.

    Args:
        forks: All, the best first.
    """

    forks: list[Fork]

    @property
    def best(self) -> Fork:
        """The fork that did best; its training can go on from where it is."""
        return self.forks[0]

    @property
    def steps(self) -> int:
        """Steps that all forks took together."""
        return sum(fork.steps for fork in self.forks)

    def show(self) -> None:
        """Print the table."""
        from rich.console import Console
        from rich.table import Table

        table = Table("remedy", "steps", "loss", "gradients", "")
        health = ("well", "warning", "critical")
        for fork in self.forks:
            table.add_row(fork.candidate.name, str(fork.steps), f"{fork.loss:.4g}", health[fork.sickness], fork.failed)
        Console().print(table)


def heal(
    make_training: Callable[[], Training],
    *,
    budget_steps: int,
    candidates: Iterable[Candidate] | None = None,
    restructure: bool = True,
    progress: bool = True,
) -> Healing:
    """Try remedies on short forks of a training and rank them.

    Every candidate starts from a training of its own, made by `make_training`, so all start from the same snapshot.
    They race in rounds (successive halving: Jamieson and Talwalkar 2016, section 3): after each, the worse are left
    behind and the others go on for longer. Ctrl-C ends the race and ranks what there is.

    Args:
        make_training: Makes the sick training, from its checkpoint or its seed: something with `model`, `optimizer` and
            `step(k)`, which does update number k and returns the loss.
        budget_steps: Steps for all forks together.
        candidates: What to try; None means the usual remedies and small combinations of them.
        restructure: Whether the usual ones may change the architecture.
        progress: Show a progress bar.

    Returns:
        All forks, ranked by loss and health of the gradients. `best.run(steps)` goes on where its fork ended;
        a fork is short, so give a long way `preset="repair"`.

    Raises:
        ConfigurationError: The budget is smaller than the number of candidates.

    Examples:
        >>> import torch
        >>> class Line:
        ...     def __init__(self):
        ...         torch.manual_seed(0)
        ...         self.model = nn.Linear(1, 1)
        ...         self.optimizer = torch.optim.SGD(self.model.parameters(), lr=3.0)
        ...     def step(self, k):
        ...         self.optimizer.zero_grad()
        ...         loss = (self.model(torch.ones(4, 1)) - 2).square().mean()
        ...         loss.backward()
        ...         self.optimizer.step()
        ...         return loss.detach()
        >>> heal(Line, budget_steps=400, progress=False).best.candidate.name
        'learning rate / 10'
    """
    chosen = list(usual_candidates(restructure=restructure) if candidates is None else candidates)
    if budget_steps < len(chosen):
        raise ConfigurationError.of("budget_steps", f">= {len(chosen)} (one step for each candidate)", budget_steps)
    with _bar(progress, budget_steps) as advance:
        forks = _forked(chosen, make_training)
        with contextlib.suppress(KeyboardInterrupt):
            _race([fork for fork in forks if not fork.failed], budget_steps, advance)
    return Healing(sorted(forks, key=lambda fork: fork.rank))


def usual_candidates(*, restructure: bool = True) -> list[Candidate]:
    """What `heal` tries: nothing, smaller rates, new weights, and with `restructure` other activations and norms."""
    found = [
        Candidate("none"),
        Candidate("learning rate / 10", lr_factor=0.1),
        Candidate("learning rate / 100", lr_factor=0.01),
        Candidate("learning rate / 1000", lr_factor=0.001),
        Candidate("initialised", _initialised),
        Candidate("fitted to a batch", _fitted),
        Candidate("fitted, learning rate / 10", _fitted, lr_factor=0.1),
    ]
    if restructure:
        found += [
            Candidate("output mended", lambda training: _needed(mend_output(training.model))),
            Candidate("ReLU, initialised", lambda training: [*_relu(training), *_initialised(training)]),
            Candidate("ReLU, fitted", lambda training: [*_relu(training), *_fitted(training)]),
            Candidate("normalised, initialised", lambda training: [*_normalised(training), *_initialised(training)]),
        ]
    return found


def _initialised(training: Training) -> Sequence[Change]:
    return initialize(training.model)


def _fitted(training: Training) -> Sequence[Change]:
    """Fit to the first batch that the training shows the model."""
    model, changes = training.model, list(initialize(training.model))

    def fit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            handle.remove()
            fill(model, "auto", forward=lambda: model.forward(*args, **kwargs))

    handle = model.register_forward_pre_hook(fit, with_kwargs=True)
    return changes


def _relu(training: Training) -> Sequence[Change]:
    hidden = [layer for layer in layers_of(training.model) if not layer.is_output and layer.activation is not None]
    sick = {
        type(layer.activation) for layer in hidden if layer.activation is not None and is_saturating(layer.activation)
    }
    return _needed(replace_activation(training.model, tuple(sick), "ReLU") if sick else [])


def _normalised(training: Training) -> Sequence[Change]:
    optimizer = training.optimizer[0] if isinstance(training.optimizer, list) else training.optimizer
    return insert_norm(training.model, optimizer=optimizer)


def _needed(changes: Sequence[Change]) -> Sequence[Change]:
    if not changes:
        raise ConfigurationError("nothing to change")
    return changes


def _forked(candidates: Iterable[Candidate], make_training: Callable[[], Training]) -> list[Fork]:
    """A fork for each, all from the same random numbers."""
    forks, outside = [], _random_states()
    for candidate in candidates:
        _set_random_states(outside)
        training, failed = make_training(), ""
        try:
            candidate.prepare(training)
        except GradwatchError as error:
            failed = str(error)
        forks.append(Fork(candidate, training, failed=failed))
    _set_random_states(outside)
    return forks


def _race(forks: list[Fork], budget: int, advance: Callable[[int], None]) -> None:
    """Successive halving: each round costs the same, and has fewer runners than the one before."""
    fields = _fields(len(forks), budget)
    for place, runners in enumerate(fields):
        length = max(1, budget // (len(fields) - place) // runners)
        forks = sorted(forks, key=lambda fork: fork.rank)[:runners]
        for fork in forks:
            fork.run(length)
            advance(length)
        budget -= length * runners


def _fields(count: int, budget: int) -> list[int]:
    """How many run in each round; fewer rounds where they would be too short."""
    fields = [count]
    while fields[-1] > _LAST:
        fields.append(max(_LAST, math.ceil(_KEEP * fields[-1])))
    while len(fields) > 1 and budget // len(fields) < _LEAST * count:
        fields.pop(1)
    return fields if count else []


class _bar:  # noqa: N801 -- used like a function
    """A progress bar, or nothing."""

    def __init__(self, shown: bool, total: int) -> None:
        self._progress: Any = None
        if shown:
            from rich.progress import Progress

            self._progress = Progress(transient=True)
            self._task = self._progress.add_task("trying remedies", total=total)

    def __enter__(self) -> Callable[[int], None]:
        if self._progress is None:
            return lambda steps: None
        self._progress.start()
        return lambda steps: self._progress.advance(self._task, steps)

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
