"""What flows through gradwatch: parameters, batches of steps, findings, actions, and the facts of a run.

Plain data on numpy alone. Every later stage (writer, detectors, actions, reporters) speaks in these words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from gradwatch.json_types import from_json, to_json

FORMAT_VERSION = 1

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Severity = Literal["info", "warning", "critical"]
T = TypeVar("T")

#: What an array holds where nothing was measured. Minus infinity is no norm, fraction or count, so one comparison tells
#: "not measured" from NaN, which a gradient that contains NaN does have. On disk it is null.
NOT_MEASURED = -math.inf

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
STAGES = ("pre_clip", "post_clip")
SKIP_REASONS = ("", "nonfinite", "spike", "grad_scaler")
RULES = (
    "nonfinite", "exploding", "vanishing", "spike", "dead", "imbalance", "update_ratio", "saturation", "dying_relu",
    "divergence", "plateau", "oscillation", "underflow", "unused", "stall",
)  # fmt: skip
PARAMETER_STATISTICS = ("grad_norm", "weight_norm", "update_ratio", "grad_max", "nonfinite_count", "zero_fraction")
MODULE_STATISTICS = ("activation_mean", "activation_std", "saturated_fraction", "dead_fraction", "output_grad_norm")
#: Metrics that every step has; users add their own with `watcher.log`.
METRICS = ("time", "step_time", "hook_time", "loss", "lr", "lr_factor", "global_norm", "clip_coefficient", "skipped")

#: The metric that is 1 at the first step after a remedy gave the network other weights: detectors begin anew there.
RENEWED = "renewed"
#: The metric that counts the losses that were not finite and after which the loop itself took no step.
DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One trainable tensor.

    Args:
        name: Dotted name in the framework, such as `encoder.0.weight`.
        shape: Its shape.
        layer: The module that owns it; by default the name without its last part.
        depth: Place of the layer from input (0) to output.
        dtype: Name of the element type, such as `float32`.
        kind: Type of the owning module, such as `Conv2d`.
        activation: Type of the activation that follows the layer, such as `ReLU`, where known.
        aliases: Other names of the same tensor (tied weights).
        trainable: False when the parameter was frozen as it was first seen, or its gradient cannot be measured: no rule
            expects a gradient of it.

    Examples:
        >>> Parameter("conv1.weight", shape=(64, 3, 7, 7)).layer
        'conv1'
    """

    name: str
    shape: tuple[int, ...] = ()
    layer: str = ""
    depth: int = 0
    dtype: str = "float32"
    kind: str = ""
    activation: str = ""
    aliases: tuple[str, ...] = ()
    trainable: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        object.__setattr__(self, "aliases", tuple(self.aliases))
        if not self.layer:
            object.__setattr__(self, "layer", self.name.rpartition(".")[0] or self.name)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Layers:
    """Groups parameters into layers, in order of depth.

    Args:
        parameters: The p parameters of a run.

    Attributes:
        names: The l layer names, from input to output.
        of_parameter: int array of shape (p,): the layer of each parameter.
        depth: int array of shape (l,).

    Examples:
        >>> layers = Layers([Parameter("fc.weight", depth=1), Parameter("fc.bias", depth=1), Parameter("conv.weight")])
        >>> layers.names
        ('conv', 'fc')
        >>> layers.norms(np.array([[3.0, 4.0, 1.0]]))
        array([[1., 5.]])
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        parameters = tuple(parameters)
        first: dict[str, int] = {}
        for parameter in parameters:
            first.setdefault(parameter.layer, parameter.depth)
        order = sorted(first, key=first.__getitem__)
        place = {name: i for i, name in enumerate(order)}
        self.names = tuple(order)
        self.of_parameter: npt.NDArray[np.int64] = np.array([place[p.layer] for p in parameters], dtype=np.int64)
        self.depth: npt.NDArray[np.int64] = np.array([first[name] for name in order], dtype=np.int64)
        self._order = np.argsort(self.of_parameter, kind="stable")
        sorted_places = self.of_parameter[self._order]
        self._starts = np.flatnonzero(np.diff(sorted_places, prepend=-1))

    def __len__(self) -> int:
        return len(self.names)

    def norms(self, grad_norm: Floats) -> npt.NDArray[np.float64]:
        """Root of the sum of squares per layer.

        Args:
            grad_norm: Parameter norms of shape (n, p); `NOT_MEASURED` entries count as absent.

        Returns:
            Shape (n, l), float64; NaN or inf where a parameter's norm is, `NOT_MEASURED` where none was measured.
        """
        if not len(self):
            return np.empty((len(grad_norm), 0))
        norms = np.asarray(grad_norm, dtype=np.float64)[:, self._order]
        absent = norms == NOT_MEASURED
        squares = np.square(np.where(absent, 0.0, norms))
        total = np.sqrt(np.add.reduceat(squares, self._starts, axis=1))
        if absent.any():
            total[np.logical_and.reduceat(absent, self._starts, axis=1)] = NOT_MEASURED
        return total


@dataclass(frozen=True, slots=True)
class Samples:
    """A statistic that is taken at some steps only.

    Args:
        rows: int array of shape (k,): which rows of the batch were sampled, ascending.
        values: float32 array of shape (k, columns); columns are parameters, or modules for module statistics.
    """

    rows: Ints
    values: Floats


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Consecutive steps: n rows, p parameters, m modules whose outputs are sampled.

    Args:
        parameters: The p parameters, the columns of `grad_norm` and of the parameter statistics.
        step: int64, shape (n,), ascending.
        grad_norm: float32, shape (n, p): L2 norms; `NOT_MEASURED` without gradient, NaN or inf as the gradient is.
        metrics: Name to float64 of shape (n,); `NOT_MEASURED` where not known. Holds `METRICS` and what was logged.
        statistics: Other names of `PARAMETER_STATISTICS` and `MODULE_STATISTICS` to `Samples`.
        modules: Names of the m modules, the columns of the module statistics.
        stage: int8, shape (n,): index into `STAGES`.
        skip_reason: int8, shape (n,): index into `SKIP_REASONS`; 0 when the step was taken.
    """

    parameters: tuple[Parameter, ...]
    step: Ints
    grad_norm: Floats
    metrics: Mapping[str, Floats] = field(default_factory=dict)
    statistics: Mapping[str, Samples] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    stage: Ints = field(default_factory=lambda: np.empty(0, np.int8))
    skip_reason: Ints = field(default_factory=lambda: np.empty(0, np.int8))

    def __post_init__(self) -> None:
        for name in ("stage", "skip_reason"):
            if len(getattr(self, name)) != len(self.step):
                object.__setattr__(self, name, np.zeros(len(self.step), np.int8))

    def __len__(self) -> int:
        return len(self.step)

    def metric(self, name: str) -> Floats:
        """The metric `name`, shape (n,); all `NOT_MEASURED` when nothing of that name was logged."""
        found = self.metrics.get(name)
        return found if found is not None else np.full(len(self), NOT_MEASURED)

    def __getitem__(self, rows: slice) -> StepBatch:
        """The steps `rows` (a slice without a stride) as a batch."""
        start, stop, _ = rows.indices(len(self))
        return dataclasses.replace(
            self,
            step=self.step[start:stop],
            grad_norm=self.grad_norm[start:stop],
            metrics={name: values[start:stop] for name, values in self.metrics.items()},
            statistics={name: _rows(samples, start, stop) for name, samples in self.statistics.items()},
            stage=self.stage[start:stop],
            skip_reason=self.skip_reason[start:stop],
        )

    def split(self, size: int) -> Iterator[StepBatch]:
        """The batch in pieces of at most `size` steps."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def _rows(samples: Samples, start: int, stop: int) -> Samples:
    low, high = np.searchsorted(samples.rows, (start, stop))
    return Samples(rows=samples.rows[low:high] - start, values=samples.values[low:high])


@dataclass(frozen=True, slots=True)
class Finding:
    """One detected condition, from its opening to its resolution.

    The same `id` appears again in the record each time the finding grows or resolves; the last one counts.

    Args:
        id: Unique in the run and the same in a replay: rule, first step and a number where both coincide.
        rule: One of `RULES`, or the name of a rule of the user's own.
        severity: `info`, `warning` or `critical`; never falls while the finding is open.
        first_step: Where the condition began to hold.
        last_step: The last step at which it held so far.
        layers: The layers concerned, the worst first; empty for a condition of the whole run.
        parameters: The parameters concerned, the worst first, where the rule looks at parameters.
        value: The worst value seen, in the rule's own measure.
        threshold: What `value` was held against.
        message: One sentence for a person: what, where, since when, how much.
        evidence: Further numbers and names that the verdict rests on; JSON types only.
        cause: The likely cause in words, from `gradwatch.diagnosis`; empty while unknown.
        advice: What to do, the best first.
        resolved_step: The step from which the condition no longer held; None while open.
    """

    id: str
    rule: str
    severity: Severity
    first_step: int
    last_step: int
    layers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    value: float = math.nan
    threshold: float = math.nan
    message: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    cause: str = ""
    advice: tuple[str, ...] = ()
    resolved_step: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether the condition still holds."""
        return self.resolved_step is None

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; keys of later versions are passed over."""
        return from_json(cls, data)


@dataclass(frozen=True, slots=True)
class ActionRecord:
    """One remedy that was applied, or would have been (`dry_run`).

    Args:
        id: Unique in the run; a later record with the same id carries the outcome.
        step: The first step that felt it.
        action: Class name of the action, such as `DecayLR`.
        layers: The layers it touched; empty for the whole model.
        detail: What was done, in one sentence.
        reason: The rule that called for it.
        finding: Id of the finding that called for it; empty when none did.
        before: The number that the action changed (learning-rate factor, norm), before.
        after: The same, after.
        outcome: `helped`, `no effect`, `worse`, `failed: why`, or empty while not known.
        dry_run: Decided and recorded but not applied.
    """

    id: str
    step: int
    action: str
    layers: tuple[str, ...] = ()
    detail: str = ""
    reason: str = ""
    finding: str = ""
    before: float = math.nan
    after: float = math.nan
    outcome: str = ""
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; keys of later versions are passed over."""
        return from_json(cls, data)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The facts of a run, kept in `run.json`.

    Args:
        parameters: In column order.
        modules: Modules whose outputs are sampled, in column order.
        status: `running`, `finished`, or `crashed`.
        status_detail: Why, for a crash; otherwise empty.
        started: Unix time, seconds.
        heartbeat: Unix time of the writer's last sign of life.
        ended: Unix time, None while running.
        framework: Such as `torch`.
        versions: Package name to version (gradwatch, Python and the framework among them).
        host: Host name.
        pid: Process that writes or wrote.
        rank: Rank of that process.
        world_size: Number of processes in the training.
        config: Settings of `watch()` as JSON: detectors with their thresholds, actions, intervals.
        overhead: What gradwatch measured about itself: seconds in hooks, bytes written, internal errors.
        format_version: Version of the record's format.
    """

    parameters: tuple[Parameter, ...]
    modules: tuple[str, ...] = ()
    status: str = "running"
    status_detail: str = ""
    started: float = 0.0
    heartbeat: float = 0.0
    ended: float | None = None
    framework: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    pid: int = 0
    rank: int = 0
    world_size: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    overhead: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; keys of later versions are passed over."""
        parameters = tuple(from_json(Parameter, p) for p in data.get("parameters", ()))
        return from_json(cls, {**data, "parameters": parameters})
