"""Between the ranks of a training: rows that are made whole, and decisions that all ranks apply at the same step.

Every `every` steps each rank hands what it measured to the exchange and goes on. Decisions that come back are applied
`every` steps later, at the same step on all ranks. Rank 0 records the rows, now of the whole, and what it decides from
them travels with the next exchange. Without actions between steps nobody ever waits for an answer.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradwatch.actions.base import Due
from gradwatch.actions.policy import Policy
from gradwatch.backends.shares import SUMMED, Union, roots, totals
from gradwatch.backends.torch_exchange import Exchange, Message
from gradwatch.integrations.torch_row import Row
from gradwatch.records import NOT_MEASURED, Floats

logger = logging.getLogger("gradwatch")
#: Of a message: ranks that leave, number of the first row and its square, learning-rate factor, whether all is well.
_HEAD = 5
#: Times the median of the other ranks above which the norm of one stands out.
_OUTLIER = 10.0
#: Seconds that a rank which ends waits for the others.
_AT_THE_END = 10.0


class _Own(NamedTuple):
    """What a rank measured in one row: norms, statistics if it is sampled, and the rank's own norm and loss."""

    norms: Floats
    statistics: dict[str, Floats] | None
    personal: Floats


@dataclass
class Shape:
    """The size of a message, the same on all ranks.

    Args:
        every: Rows.
        stats_every: Steps between rows with sampled statistics.
        sizes: Elements of each parameter of this rank, of its own part.
        is_personal: Whether each rank's own numbers travel too.
    """

    every: int
    stats_every: int
    sizes: Floats
    is_personal: bool = False

    @property
    def samples(self) -> int:
        """Rows with sampled statistics, at most."""
        return (self.every - 1) // self.stats_every + 1


class Ranks:
    """One rank's side of the exchange.

    Args:
        exchange: Talks to the others.
        policy: Decides, on rank 0.
        shape: Of the messages.
        is_combining: Whether rank 0 may hold only a part of some gradient.
        apply: Carries out what was decided, before the next step.
    """

    def __init__(
        self, exchange: Exchange, policy: Policy, shape: Shape, *, is_combining: bool, apply: Callable[[Due], None]
    ) -> None:
        self.exchange, self._policy, self._shape, self._apply = exchange, policy, shape, apply
        self._is_first, self._is_armed = exchange.rank == 0, bool(policy.between)
        self._is_holding = is_combining and self._is_first
        self._outbox: list[Row] = []
        self._held: deque[Row] = deque()
        self._under_way: deque[tuple[Message, list[Row]]] = deque()
        self._union: Union | None = None
        self._due: Due | None = None
        self._sent: Due | None = None
        self.lr_factor, self.is_well = policy.state.lr_factor, True
        #: Why this rank goes on alone; empty while it does not.
        self.alone = ""
        #: Called once on rank 0 with the parameters of other ranks, in column order.
        self.on_union: Callable[[Sequence[Any]], None] = lambda parameters: None
        #: Called on rank 0 with what stands out at a rank, and the step.
        self.on_outlier: Callable[[str, int], None] = lambda words, step: None
        #: Called when this rank is left alone, with why.
        self.on_alone: Callable[[str], None] = lambda why: None

    def __len__(self) -> int:
        return len(self._held)

    @property
    def union(self) -> Union:
        """The parameters of all ranks, once they were met."""
        if self._union is None:
            if self.exchange.descriptions is None:
                raise RuntimeError(f"the other ranks were not met: {self.exchange.failure or 'too slow'}")
            self._union = Union(self.exchange.descriptions, self.exchange.rank)
        return self._union

    def decided(self, due: Due) -> None:
        """Rank 0 decided: all ranks shall be told; one decision travels at a time."""
        if self._is_first and self._due is None and self._sent is None:
            self._due = due

    def through(self, row: Row) -> Iterator[Row]:
        """Take a row of this rank; gives the rows that may be recorded now, and then sends what is to be sent."""
        row.metrics["lr_factor"] = self.lr_factor
        if self.alone:
            yield self._padded(row)
            return
        self._outbox.append(row)
        if self._is_holding:
            self._held.append(row)
        else:
            yield row
        is_time = len(self._outbox) >= self._shape.every
        if is_time or not self._is_armed:
            yield from self._arrivals(wait=self.exchange.timeout if self._is_armed else 0.0)
        if is_time and not self.alone:
            self._send(is_leaving=False)

    def finish(self, *, is_well: bool) -> Iterator[Row]:
        """This rank ends: the last exchange, and the rows that were held."""
        if not self.alone:
            self._is_armed = False
            self._send(is_leaving=True)
            yield from self._arrivals(wait=min(self.exchange.timeout, _AT_THE_END if is_well else 2.0))
        yield from self._release()
        self.exchange.close()

    def _send(self, *, is_leaving: bool) -> None:
        rows, self._outbox = self._outbox, []
        text = b""
        if self._is_first and self._due is not None:
            self._sent, self._due = self._due, None
            text = json.dumps(_as_json(self._sent, self._policy)).encode()
        head = np.zeros(_HEAD)
        number = rows[0].number if rows else 0
        head[:3] = is_leaving, number, number**2
        if self._is_first:
            head[3:] = self._policy.state.lr_factor, self._policy.is_well
        # A copy: the rows that rank 0 holds are made whole in place later.
        personal = [(row.metrics.get(f"rank_norm.{self.exchange.rank}"), row.metrics.get("loss")) for row in rows]
        own = [
            _Own(row.norms, row.statistics if row.is_sampled else None, np.array(numbers, np.float64))
            for row, numbers in zip(rows, personal, strict=True)
        ]
        message = Message(lambda: self._encoded(head, own), told=_HEAD, text=text)
        self._under_way.append((self.exchange.send(message), rows))

    def _arrivals(self, *, wait: float) -> Iterator[Row]:
        """What has come back, in order; `wait` is how long to wait for what has not."""
        while self._under_way and not self.alone:
            message, rows = self._under_way[0]
            if not wait and not message.done.is_set():
                break
            if not self.exchange.arrived(message, wait):
                break
            self._under_way.popleft()
            yield from self._received(message, rows)
        if self.exchange.failure and not self.alone:
            lost = (
                f"; no sign of life from rank {', '.join(map(str, self.exchange.lost))}" if self.exchange.lost else ""
            )
            self._go_alone(f"the exchange with the other ranks failed ({self.exchange.failure}){lost}")
        if self.alone:
            yield from self._release()

    def _received(self, message: Message, rows: list[Row]) -> Iterator[Row]:
        leaving, number, square, lr_factor, is_well = message.sums[:_HEAD]
        count = self.exchange.world_size
        if abs(count * square - number**2) > 1e-6 * max(1.0, square) and not leaving:
            self._go_alone("the ranks are at different steps")
            return
        self.lr_factor, self.is_well = float(lr_factor), bool(is_well)
        if self._is_first:
            yield from self._whole(message, rows)
        if message.text:
            due = self._sent if self._is_first else _from_json(message.text, self._policy)
            self._sent = None
            if due is not None:
                self._apply(due)
                if due.lr_factor is not None:  # now, since the next message already tells it
                    self.lr_factor = self._policy.state.lr_factor = due.lr_factor
        if 0 < leaving < count:
            self._go_alone("a rank ended before the others")

    def _whole(self, message: Message, rows: list[Row]) -> Iterator[Row]:
        """The rows with the numbers of all ranks."""
        union, shape = self.union, self._shape
        self.on_union(union.parameters)
        parts = _split(message.sums[_HEAD:], self._lengths())
        if union.is_needed:
            norms = roots(parts[1].reshape(shape.every, len(union)))
            sums = parts[2].reshape(shape.samples, len(SUMMED), len(union))
            largest = message.largest.reshape(-1, len(union))
            sampled = 0
            for place, row in enumerate(rows):
                if parts[0][place] == self.exchange.world_size:
                    row.norms, row.width = norms[place], len(union)
                # A rank that measured a NaN samples at once, and alone.
                statistics, row.statistics = row.statistics, {}
                if row.is_sampled:
                    row.statistics = self._statistics(statistics, sums[sampled], largest[sampled])
                    sampled += 1
        if shape.is_personal:
            self._put_personal(parts[-1].reshape(self.exchange.world_size, shape.every, 2), rows)
        if self._is_holding:
            for row in rows:
                self._held.popleft()
                yield self._padded(row)

    def _statistics(self, own: dict[str, Floats], sums: Floats, largest: Floats) -> dict[str, Floats]:
        every = np.array([math.prod(parameter.shape) for parameter in self.union.parameters], np.float64)
        weights, changes, zeros, damaged = roots(sums[0]), roots(sums[1]), totals(sums[2]), totals(sums[3])
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {
                "weight_norm": weights,
                "update_ratio": np.where((changes != NOT_MEASURED) & (weights > 0), changes / weights, NOT_MEASURED),
                "zero_fraction": np.where(zeros != NOT_MEASURED, zeros / every, NOT_MEASURED),
                "nonfinite_count": damaged,
                "grad_max": largest,
            }
        kept = {name: values.astype(np.float32) for name, values in found.items() if name in own}
        return {**own, **kept}

    def _put_personal(self, numbers: Floats, rows: list[Row]) -> None:
        """Each rank's norm and loss; a rank that stands out is named, once an exchange."""
        named: set[int] = set()
        for row, own in zip(rows, numbers.swapaxes(0, 1), strict=False):
            for rank, (norm, loss) in enumerate(own.tolist()):
                row.metrics[f"rank_norm.{rank}"], row.metrics[f"rank_loss.{rank}"] = norm, loss
            for rank, words in _outliers(own[:, 0]):
                if rank not in named:
                    named.add(rank)
                    self.on_outlier(f"rank {rank} alone: {words}, before gradients were reduced", row.number)

    def _lengths(self) -> list[int]:
        """Of the parts of a message behind its head."""
        count = len(self.union) if self.union.is_needed else 0
        rows, samples = self._shape.every * count, self._shape.samples * len(SUMMED) * count
        personal = [self.exchange.world_size * self._shape.every * 2] if self._shape.is_personal else []
        return [self._shape.every, rows, samples, *personal]

    def _encoded(self, head: Floats, rows: Sequence[_Own]) -> tuple[Any, Any]:
        """The numbers of a message; on the thread of the exchange, once the others were met."""
        union, shape = self.union, self._shape
        parts = [np.zeros(length) for length in self._lengths()]
        parts[0][: len(rows)] = 1.0
        if shape.is_personal:
            own = parts[-1].reshape(self.exchange.world_size, shape.every, 2)[self.exchange.rank]
            own[: len(rows)] = np.reshape([row.personal for row in rows], (len(rows), 2))
        largest = np.zeros(0)
        if union.is_needed:
            for squares, row in zip(parts[1].reshape(shape.every, -1), rows, strict=False):
                squares[:] = union.spread(np.square(row.norms, dtype=np.float64), row.norms)
            sampled = [row.statistics for row in rows if row.statistics is not None]
            largest = np.full((shape.samples, len(union)), NOT_MEASURED)
            samples = parts[2].reshape(shape.samples, len(SUMMED), -1)
            for place, statistics in enumerate(sampled[: shape.samples]):
                self._encode_sample(statistics, samples[place], largest[place])
        return np.concatenate([head, *parts]), largest.ravel()

    def _encode_sample(self, statistics: dict[str, Floats], sums: Floats, largest: Floats) -> None:
        nothing = np.full(len(self._shape.sizes), NOT_MEASURED, np.float32)
        of = {name: np.asarray(statistics.get(name, nothing), np.float64) for name in (*SUMMED, "grad_max")}
        terms = {
            "weight_norm": np.square(of["weight_norm"]),
            "update_ratio": np.square(of["update_ratio"] * of["weight_norm"]),
            "zero_fraction": of["zero_fraction"] * self._shape.sizes[: len(of["zero_fraction"])],
            "nonfinite_count": of["nonfinite_count"],
        }
        for place, name in enumerate(SUMMED):
            sums[place] = self.union.spread(terms[name], of[name])
        largest[self.union.columns[: len(of["grad_max"])]] = of["grad_max"]

    def _go_alone(self, why: str) -> None:
        self.alone = why
        self._due = self._sent = None
        logger.warning("gradwatch: %s; rank %d records what it measures itself", why, self.exchange.rank)
        self.on_alone(why)

    def _release(self) -> Iterator[Row]:
        while self._held:
            yield self._padded(self._held.popleft())
        self._outbox.clear()

    def _padded(self, row: Row) -> Row:
        """The row with columns for all that rank 0 knows."""
        if self._union is not None and self._is_first and row.width < len(self._union):
            row.widen(len(self._union))
        return row


def _outliers(norms: Floats) -> list[tuple[int, str]]:
    """Ranks that stand out from the others, and how."""
    finite = np.isfinite(norms)
    if not finite.any():
        return []
    found = [(rank, "its gradient is not finite") for rank in np.flatnonzero(~finite).tolist()]
    for rank in np.flatnonzero(finite).tolist():
        others = np.delete(norms, rank)[np.delete(finite, rank)]
        typical = float(np.median(others)) if len(others) else 0.0
        if 0.0 < typical * _OUTLIER < norms[rank]:
            found.append((rank, f"its gradient norm is {norms[rank]:.3g}, the median of the others {typical:.3g}"))
    return found


def _split(numbers: Floats, lengths: Sequence[int]) -> list[Floats]:
    return np.split(numbers, np.cumsum(lengths)[:-1])


def _as_json(due: Due, policy: Policy) -> dict[str, Any]:
    place = next(place for place, action in enumerate(policy.between) if action is due.action)
    return {
        "action": place,
        "detail": due.detail,
        "layers": due.layers,
        "lr_factor": due.lr_factor,
        "until_step": due.until_step,
        "backs": due.backs,
        "undo": due.undo,
    }


def _from_json(text: bytes, policy: Policy) -> Due:
    fields = json.loads(text)
    action, layers = policy.between[fields.pop("action")], tuple(fields.pop("layers"))
    return Due(action, layers=layers, **fields)
