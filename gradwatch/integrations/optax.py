"""optax, and with it Flax and any JAX loop: `optimizer = watch(optax.adam(1e-3), run_dir="runs/flax")`.

The transformation that `watch` returns measures the gradients that it is handed, applies the in-step actions, and calls
the one that it wraps. It is pure, so it can be compiled, scanned and checkpointed; numbers leave the compiled step by a
callback on the host, which nothing waits for. Only a `DecayLR` is waited for, since its factor comes back the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, Unpack

from gradwatch.actions.policy import Policy
from gradwatch.errors import ConfigurationError, MissingDependencyError
from gradwatch.records import NOT_MEASURED
from gradwatch.settings import Options, settings_from

try:
    import jax
    import optax
    from jax import numpy as jnp
    from jax.experimental import io_callback

    from gradwatch.backends import jax_step
    from gradwatch.integrations.optax_watcher import OptaxWatcher
except ImportError:
    raise MissingDependencyError.of("optax", extra="optax") from None

Tree = Any
#: What can be applied between the steps of a loop that is not ours.
_BETWEEN = ("DecayLR", "RaiseLR", "Stop")


class WatchState(NamedTuple):
    """The state of a watched optimizer.

    Args:
        count: Updates so far.
        actions: What the in-step actions remember.
        inner: The state of the optimizer that is watched.
    """

    count: Any
    actions: jax_step.States
    inner: Any


class Watched(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # optax has no types
    """A watched optimizer: a `GradientTransformation` like any other, that also holds the watcher."""

    recorder: Recorder

    @property
    def watcher(self) -> OptaxWatcher | None:
        """The watcher; None until `init` was called."""
        return self.recorder.watcher

    @property
    def should_stop(self) -> bool:
        """Whether a `Stop` wants the training to end, for loops that do not call `log`."""
        return self.watcher is not None and self.watcher.stops is not None

    def log(self, **numbers: Any) -> None:
        """Add numbers to the record of the newest step, and wait for it.

        To log the loss without waiting, pass it to the update: `optimizer.update(grads, state, params, value=loss)`.

        Args:
            numbers: Names to numbers or scalar arrays, such as `loss=loss`.

        Raises:
            StopTraining: A `Stop` is due.
        """
        if self.watcher is None:
            raise ConfigurationError("'log' needs a step: call init() of the watched optimizer first")
        self.watcher.log(**numbers)

    def close(self, status: str = "finished", detail: str = "") -> None:
        """Wait for the last step and close the record. What is compiled stays valid, and records no more."""
        if self.watcher is not None:
            self.watcher.close(status, detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.close("crashed", f"{kind.__name__}: {error}")


def watch(optimizer: optax.GradientTransformation, **settings: Unpack[Options]) -> Watched:
    """Watch an optax optimizer, in a compiled loop or not.

    Norms are those of the gradients that the update is handed; wrap the whole chain, and they are those before it
    clips. One row is one update; inside `optax.MultiSteps` one row is one update of the accumulated gradients.
    `learning_rate` of `optax.inject_hyperparams` is recorded as `lr`, and `value=loss` of the update as `loss`.

    `Clip`, `ZClip`, `AutoClip` and `SkipStep` act on the update whose gradients they see, `DecayLR` one update after
    it is decided: its factor scales the updates. `Stop` raises `StopTraining` from `log`.

    Args:
        optimizer: The optimizer.
        settings: `run_dir` and the other fields of `gradwatch.settings.Settings`.

    Returns:
        The optimizer to use instead, also a context manager.

    Raises:
        ConfigurationError: A setting breaks a rule, or an action cannot be applied to a JAX loop.

    Examples:
        >>> import jax, optax, tempfile
        >>> from jax import numpy as jnp
        >>> optimizer = watch(optax.sgd(0.1), run_dir=tempfile.mkdtemp() + "/run")
        >>> params = {"dense": {"kernel": jnp.ones((3, 1))}}
        >>> state = optimizer.init(params)
        >>> @jax.jit
        ... def step(params, state, x):
        ...     loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["dense"]["kernel"]) ** 2))(params)
        ...     updates, state = optimizer.update(grads, state, params, value=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(3):
        ...     params, state = step(params, state, jnp.ones((2, 3)))
        >>> optimizer.close()
        >>> optimizer.watcher.findings
        []
    """
    recorder = Recorder(optax.with_extra_args_support(optimizer), settings)
    watched = Watched(recorder.init, recorder.update)
    watched.recorder = recorder
    return watched


class Recorder:
    """The two functions of a watched optimizer, and what they share with the host.

    Args:
        inner: What is watched.
        settings: Keyword arguments of `gradwatch.settings.Settings`.
    """

    def __init__(self, inner: optax.GradientTransformationExtraArgs, settings: Options) -> None:
        checked = settings_from(settings)
        policy = Policy(checked.actions, dry_run=checked.dry_run)
        if beyond := [action for action in policy.between if action.name not in _BETWEEN]:
            raise ConfigurationError(f"'actions': the weights of a JAX loop are not ours to change: {beyond[0]!r}")
        if by_unit := [action for action in policy.in_step if action.by_unit]:
            raise ConfigurationError(
                f"'actions': put optax.adaptive_grad_clip into the chain instead of {by_unit[0]!r}"
            )
        self.watcher: OptaxWatcher | None = None
        self._inner, self._settings = inner, settings
        self._actions, self._every = policy.in_step, checked.stats_every
        self._acts = bool(policy.in_step) and not checked.dry_run
        self._asks = not checked.dry_run and any(action.only_rate for action in policy.between)
        self._names: tuple[str, ...] = ()

    def init(self, params: Tree) -> WatchState:
        """The state before the first update; the record begins."""
        parameters = jax_step.described(params)
        names = tuple(parameter.name for parameter in parameters)
        if self.watcher is None:
            self.watcher, self._names = OptaxWatcher(parameters, **self._settings), names
        elif names != self._names:
            raise ConfigurationError(
                "'init' got other parameters than before: watch each model by an optimizer of its own"
            )
        return WatchState(jnp.zeros((), jnp.int32), jax_step.initial_states(self._actions), self._inner.init(params))

    def update(
        self, updates: Tree, state: WatchState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, WatchState]:
        """One update, watched."""
        measured = self._safely(self._measured, updates, state.actions, default=None)
        if measured is None:
            changes, inner = self._inner.update(updates, state.inner, params, **extra)
            return changes, WatchState(state.count + 1, state.actions, inner)
        row, verdict, edited = measured
        changes, inner = self._inner.update(edited, state.inner, params, **extra)
        if self._acts:
            changes = jax.tree.map(lambda change: jnp.where(verdict.skip, 0, change), changes)
            inner = jax.tree.map(partial(jnp.where, verdict.skip), state.inner, inner)
        tell = partial(self._told, params=params, loss=extra.get("value"))
        changes = self._safely(tell, state, row, verdict, changes, default=changes)
        return changes, WatchState(state.count + 1, verdict.states, inner)

    def _safely(self, work: Callable[..., Any], *args: Any, default: Any) -> Any:
        """What fails while a step is traced is ours, and must not end the training."""
        return default if self.watcher is None else self.watcher.faults.call("optax", work, *args, default=default)

    def _measured(self, updates: Tree, states: jax_step.States) -> tuple[Any, jax_step.Verdict, Tree]:
        """The norms in their columns, the verdict over them, and the gradients to use."""
        gradients = {name: leaf for name, leaf in jax_step.named(updates).items() if name in self._names}
        leaves = list(gradients.values())
        norms = jax_step.norms_of(leaves)
        verdict = jax_step.decide(self._actions, norms, states)
        row = jax_step.in_columns(dict(zip(gradients, norms, strict=True)), self._names)
        used = jax_step.edited(leaves, verdict)
        verdict = jax_step.with_coefficient(verdict, norms, used)
        return row, verdict, _replaced(updates, leaves, used) if self._acts else updates

    def _told(
        self, state: WatchState, row: Any, verdict: jax_step.Verdict, changes: Tree, *, params: Tree | None, loss: Any
    ) -> Tree:
        """Hand the step to the host; the changes to apply, scaled where a `DecayLR` may ask for it."""
        numbers = {
            "reason": verdict.reason,
            "clip_coefficient": verdict.coefficient,
            "lr": _learning_rate(state.inner),
            "loss": loss,
        }
        known = {name: jnp.asarray(value) for name, value in numbers.items() if value is not None}
        known = {name: value for name, value in known.items() if value.shape == ()}
        statistics = self._sampled(state.count, changes, params)
        if not self._asks:
            jax.debug.callback(self._took, state.count, row, known, statistics)
            return changes
        answer = jax.ShapeDtypeStruct((), jnp.float32)
        factor = io_callback(self._took, answer, state.count, row, known, statistics)
        return jax.tree.map(lambda change: (change * factor).astype(change.dtype), changes)

    def _sampled(self, count: Any, changes: Tree, params: Tree | None) -> Any:
        """Norms of weights and ratios of updates to them, shape (2, p), every `stats_every` updates."""
        nothing = jnp.full((2, len(self._names)), NOT_MEASURED, jnp.float32)
        if params is None:
            return nothing
        weights, steps = jax_step.named(params), jax_step.named(changes)

        def measured() -> Any:
            both = [name for name in self._names if name in weights and name in steps]
            norms = jax_step.norms_of([weights[name] for name in both])
            ratios = jax_step.norms_of([steps[name] for name in both]) / norms
            return jnp.stack(
                [jax_step.in_columns(dict(zip(both, values, strict=True)), self._names) for values in (norms, ratios)]
            )

        return jax.lax.cond(count % self._every == 0, measured, lambda: nothing)

    def _took(self, count: Any, row: Any, numbers: Mapping[str, Any], statistics: Any) -> Any:
        """On the host, once for each update."""
        assert self.watcher is not None
        return self.watcher.took(int(count), row, numbers, statistics)


def _replaced(tree: Tree, old: Sequence[Any], new: Sequence[Any]) -> Tree:
    """The tree with other leaves in the place of some."""
    instead = {id(leaf): other for leaf, other in zip(old, new, strict=True)}
    return jax.tree.map(lambda leaf: instead.get(id(leaf), leaf), tree)


def _learning_rate(state: Any) -> Any:
    """What `optax.inject_hyperparams` keeps; None without it."""
    return next((value for _, value in optax.tree_utils.tree_get_all_with_path(state, "learning_rate")), None)
