"""What a detector remembers between steps, declared once: made, grown with the run, saved and restored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gradwatch.detectors.base import RunContext

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
T = TypeVar("T")


class Kept(Generic[T]):
    """An attribute of a `Remembers`: a number, a text, None, or a list or dict of JSON types.

    Args:
        first: Its value when a run begins.
    """

    def __init__(self, first: T) -> None:
        self.first = first

    def fresh(self, context: RunContext) -> Any:
        """The value that a run with this context begins with."""
        return copy.deepcopy(self.first)

    def grown(self, value: Any, old: RunContext, new: RunContext) -> Any:
        """The value after the run gained parameters."""
        return value

    def saved(self, value: Any) -> Any:
        """The value as a numpy array or JSON types."""
        return copy.deepcopy(value)

    def restored(self, value: Any, context: RunContext) -> Any:
        """The value from what `saved` gave."""
        return copy.deepcopy(value)

    if TYPE_CHECKING:  # at run time the instance's own attribute hides this one

        def __get__(self, owner: object, kind: type) -> T: ...
        def __set__(self, owner: object, value: T) -> None: ...


class PerLayer(Kept[npt.NDArray[Any]]):
    """An array whose last axis is the layers, from input to output.

    Args:
        fill: Value of a layer that is new; its type is the array's.
        rows: Length of a first axis, as for a ring of past steps; None for none.
    """

    def __init__(self, fill: float, rows: int | None = None) -> None:
        self.fill, self.rows = fill, rows

    def fresh(self, context: RunContext) -> npt.NDArray[Any]:
        """An array full of `fill`."""
        width = self._width(context)
        return np.full(width if self.rows is None else (self.rows, width), self.fill)

    def grown(self, value: npt.NDArray[Any], old: RunContext, new: RunContext) -> npt.NDArray[Any]:
        """The same with columns of `fill` where the new ones are."""
        wider = self.fresh(new)
        wider[..., self._columns(old, new)] = value
        return wider

    def restored(self, value: Any, context: RunContext) -> npt.NDArray[Any]:
        """The array from a saved state, which may hold lists."""
        return np.array(value, dtype=np.array(self.fill).dtype)

    def _width(self, context: RunContext) -> int:
        return len(context.layers)

    def _columns(self, old: RunContext, new: RunContext) -> IntArray:
        """Where the old layers are now: new ones may have come in between."""
        place = {name: i for i, name in enumerate(new.layers.names)}
        return np.array([place[name] for name in old.layers.names], dtype=np.int64)


class PerParameter(PerLayer):
    """An array whose last axis is the parameters."""

    def _width(self, context: RunContext) -> int:
        return len(context.parameters)

    def _columns(self, old: RunContext, new: RunContext) -> IntArray:
        return np.arange(len(old.parameters))


class Remembers:
    """Base of what keeps state: every class attribute of type `Kept` is part of it."""

    memory: ClassVar[dict[str, Kept[Any]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.memory = {**cls.memory, **{name: kept for name, kept in vars(cls).items() if isinstance(kept, Kept)}}

    def begin(self, context: RunContext) -> None:
        """Forget everything and prepare for the parameters of `context`."""
        self.context = context
        for name, kept in self.memory.items():
            setattr(self, name, kept.fresh(context))
        self.prepare(context)

    def grow(self, context: RunContext) -> None:
        """Go on with more parameters; layers may have come in between the old ones."""
        for name, kept in self.memory.items():
            setattr(self, name, kept.grown(getattr(self, name), self.context, context))
        self.context = context
        self.prepare(context)

    def prepare(self, context: RunContext) -> None:
        """Work out what depends on the parameters alone; called by `begin` and `grow`."""

    def remembered(self) -> dict[str, Any]:
        """A copy of all state: numpy arrays and JSON types."""
        return {name: kept.saved(getattr(self, name)) for name, kept in self.memory.items()}

    def recall(self, state: Mapping[str, Any]) -> None:
        """Go on from what `remembered` gave."""
        for name, kept in self.memory.items():
            setattr(self, name, kept.restored(state[name], self.context))


R = TypeVar("R", bound=Remembers)


class Part(Kept[R]):
    """Something that keeps state of its own.

    Args:
        kind: Its class; made without arguments.
    """

    def __init__(self, kind: type[R]) -> None:
        self.kind = kind

    def fresh(self, context: RunContext) -> R:
        """A new one."""
        part = self.kind()
        part.begin(context)
        return part

    def grown(self, value: R, old: RunContext, new: RunContext) -> R:
        """The same one, grown."""
        value.grow(new)
        return value

    def saved(self, value: R) -> dict[str, Any]:
        """Its state."""
        return value.remembered()

    def restored(self, value: Mapping[str, Any], context: RunContext) -> R:
        """One that goes on from the state."""
        part = self.fresh(context)
        part.recall(value)
        return part
