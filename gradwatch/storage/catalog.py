"""Which segments a run has, which of their steps count, and the facts of the run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from gradwatch.errors import RunCorruptError, RunError
from gradwatch.records import Ints, Parameter, RunInfo, Samples, StepBatch
from gradwatch.storage.batches import join
from gradwatch.storage.facts import Facts, decode_facts
from gradwatch.storage.files import Files
from gradwatch.storage.layout import GRAD_NORM, OPEN_SUFFIX, RUN_FILE, SAMPLES, SEALED_SUFFIX, STEPS, Layout, Stem
from gradwatch.storage.segments import Numbers, SealedSegment
from gradwatch.storage.stream import StreamDecoder

logger = logging.getLogger("gradwatch")
_EMPTY = Layout(())


class StreamSegment:
    """A segment that is not sealed: read whole and kept, read further on `refresh`.

    Args:
        files: Of the run.
        path: Of the stream.
    """

    def __init__(self, files: Files, path: str) -> None:
        self._files, self._path = files, path
        self._decoder: StreamDecoder | None = None
        self._batch = StepBatch((), np.empty(0, np.int64), np.empty((0, 0), np.float32))
        self.refresh()

    def refresh(self) -> None:
        """Read what was appended since."""
        tail = self._files.read(self._path, self._decoder.offset if self._decoder else 0)
        if self._decoder is None:
            try:
                self._decoder = StreamDecoder(tail)
            except RunCorruptError:
                return  # not even the schema is there yet
            tail = tail[self._decoder.offset :]
        parameters = tuple(Parameter(name) for name in self.layout.parameters)
        batches = list(self._decoder.decode(tail, parameters))
        if batches:
            self._batch = join([self._batch, *batches] if len(self._batch) else batches, self.layout)

    @property
    def layout(self) -> Layout:
        """Its columns."""
        return self._decoder.layout if self._decoder else _EMPTY

    @property
    def step(self) -> Ints:
        """The steps, int64 of shape (n,)."""
        return self._batch.step

    @property
    def count(self) -> int:
        """How many steps."""
        return len(self._batch)

    def values(self, statistic: str, names: Sequence[str]) -> Samples:
        """As `SealedSegment.values`."""
        place = {name: i for i, name in enumerate(self.layout.names(statistic))}
        columns = [place[name] for name in names]
        if statistic == GRAD_NORM:
            return Samples(np.arange(self.count), self._batch.grad_norm[:, columns])
        samples = self._batch.statistics.get(statistic)
        if samples is None:
            return Samples(np.empty(0, np.int64), np.empty((0, len(names)), np.float32))
        return Samples(samples.rows, samples.values[:, columns])

    def metrics(self, names: Sequence[str], *, words: bool = False) -> Numbers:
        """As `SealedSegment.metrics`."""
        batch = self._batch
        return Numbers(
            {name: np.asarray(batch.metric(name), np.float64) for name in names}, batch.stage, batch.skip_reason
        )

    def batch(self, parameters: tuple[Parameter, ...], statistics: Sequence[str] | None) -> StepBatch:
        """The whole segment."""
        kept = {k: v for k, v in self._batch.statistics.items() if statistics is None or k in statistics}
        return dataclasses.replace(self._batch, parameters=parameters, statistics=kept)


Segment = StreamSegment | SealedSegment


class Catalog:
    """The segments of a run in the order of writing.

    Args:
        files: Of the run.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._sealed: dict[Stem, SealedSegment] = {}
        self._streams: dict[Stem, StreamSegment] = {}
        self._names: dict[Stem, str] = {}
        self._layouts: list[Layout] = []
        self._layouts_of: tuple[Stem, ...] | None = None
        #: What could not be read, in words.
        self.damage: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look which segments there are now, and read on in those that still grow."""
        names: dict[Stem, str] = {}
        for name in self._files.listing(STEPS):
            text, dot, suffix = name.partition(".")
            stem = Stem.parse(text)
            # While a segment is being sealed, both files are there; the sealed one counts.
            if stem and (dot + suffix == SEALED_SUFFIX or (dot + suffix == OPEN_SUFFIX and stem not in names)):
                names[stem] = name
        self._names = dict(sorted(names.items()))
        self._streams = {
            stem: s for stem, s in self._streams.items() if self._names.get(stem, "").endswith(OPEN_SUFFIX)
        }
        for stem in list(self._streams):
            try:
                self._streams[stem].refresh()
            except FileNotFoundError:
                del self._streams[stem]

    def stems(self) -> list[Stem]:
        """The segments in the order of writing."""
        return list(self._names)

    def is_sealed(self, stem: Stem) -> bool:
        """Whether the segment is Parquet already."""
        return self._names[stem].endswith(SEALED_SUFFIX)

    def limit(self, stem: Stem) -> int | None:
        """The step from which on a later segment answers; None for the last segment."""
        return min((other.first for other in self._names if other.sequence > stem.sequence), default=None)

    def segment(self, stem: Stem) -> Segment:
        """The segment; RunError when it cannot be read."""
        if not self.is_sealed(stem):
            try:
                if stem not in self._streams:
                    self._streams[stem] = StreamSegment(self._files, f"{STEPS}/{stem}{OPEN_SUFFIX}")
                return self._streams[stem]
            except FileNotFoundError:  # sealed since we looked
                self._names[stem] = f"{stem}{SEALED_SUFFIX}"
        if stem not in self._sealed:
            sealed = f"{stem}{SEALED_SUFFIX}"
            self._sealed[stem] = SealedSegment(self._files.open, f"{STEPS}/{sealed}", f"{SAMPLES}/{sealed}")
        return self._sealed[stem]

    def note(self, stem: Stem, error: Exception) -> None:
        """Remember that a segment cannot be read; says so in the log, once."""
        if str(stem) not in self.damage:
            self.damage[str(stem)] = str(error)
            logger.warning("gradwatch: segment %s cannot be read and is left out: %s", stem, error)

    def readable(self, steps: slice | None = None) -> list[tuple[Stem, Segment, slice]]:
        """The segments that can be read, each with the rows that count; what cannot be read is noted in `damage`.

        Args:
            steps: Leave out segments that have no step in this range, as far as their names tell.
        """
        found = [(stem, self.counted(stem)) for stem in self.stems_in(steps)]
        return [(stem, *counted) for stem, counted in found if counted is not None]

    def stems_in(self, steps: slice | None) -> list[Stem]:
        """The segments that may have a step in the range, as far as their names tell."""
        return [stem for stem in self.stems() if steps is None or not self._is_outside(stem, steps)]

    def counted(self, stem: Stem) -> tuple[Segment, slice] | None:
        """A segment and its rows that count; None when it has none, or cannot be read."""
        try:
            segment = self.segment(stem)
            rows = self._rows_that_count(stem, segment)
        except RunError as error:
            self.note(stem, error)
            return None
        return (segment, rows) if rows.stop else None

    def _is_outside(self, stem: Stem, steps: slice) -> bool:
        limit = self.limit(stem)
        before = steps.start is not None and limit is not None and limit <= steps.start
        return before or (steps.stop is not None and stem.first >= steps.stop)

    def _rows_that_count(self, stem: Stem, segment: Segment) -> slice:
        limit = self.limit(stem)
        count = segment.count
        if limit is not None and count and limit <= int(segment.step[-1]):
            count = int(np.searchsorted(segment.step, limit))
        return slice(0, count)

    def last_step(self) -> int:
        """The last step that was recorded; -1 when none was."""
        span = self.span()
        return -1 if span is None else span[1]

    def span(self) -> tuple[int, int] | None:
        """First and last step that count; reads the outermost segments only."""
        stems = self.stems()
        ends: list[int] = []
        for ordered, row in ((stems, 0), (stems[::-1], -1)):
            for stem in ordered:
                try:
                    segment = self.segment(stem)
                    rows = self._rows_that_count(stem, segment)
                except RunError as error:
                    self.note(stem, error)
                    continue
                if rows.stop:
                    ends.append(int(segment.step[rows][row]))
                    break
        return (ends[0], ends[1]) if len(ends) == 2 else None

    def layouts(self) -> list[Layout]:
        """The layouts of the segments, each once."""
        if (stems := tuple(self._names)) != self._layouts_of:
            self._layouts = list(dict.fromkeys(segment.layout for _, segment, _ in self.readable()))
            self._layouts_of = stems
        return self._layouts

    def batches(
        self, parameters: tuple[Parameter, ...], statistics: Sequence[str] | None, steps: slice | None, *, size: int
    ) -> Iterator[StepBatch]:
        """The steps that count, with the given parameters' descriptions, in pieces of at most `size`."""
        known = {parameter.name: parameter for parameter in parameters}
        for stem, segment, rows in self.readable(steps):
            part = within(segment.step[rows], steps)
            columns = tuple(known.get(name) or Parameter(name) for name in segment.layout.parameters)
            for wanted in (statistics, ()):  # when the samples are damaged, the steps still count
                try:
                    batch = segment.batch(parameters if columns == parameters else columns, wanted)
                except RunError as error:
                    self.note(stem, error)
                    continue
                yield from batch[part].split(size)
                break

    def facts(self, where: str = RUN_FILE) -> Facts:
        """The content of `run.json`; when it is missing or damaged, as much as the segments tell.

        Raises:
            RunFormatError: When the directory is not one of gradwatch, or of a newer one.
            RunCorruptError: When nothing tells what the run was.
        """
        try:
            return decode_facts(self._files.read(RUN_FILE), where)
        except (RunCorruptError, FileNotFoundError) as error:
            parameters: list[str] = []
            for _, segment, _ in self.readable():
                parameters += segment.layout.parameters
            if not parameters:
                raise RunCorruptError(f"{where} is missing or damaged, and there are no steps: {error}") from error
            self.damage[RUN_FILE] = str(error)
            return Facts(RunInfo(tuple(Parameter(name) for name in dict.fromkeys(parameters))))


def within(steps: Ints, wanted: slice | None) -> slice:
    """The rows of ascending steps that lie in the range of steps `wanted`."""
    if wanted is None:
        return slice(0, len(steps))
    low = 0 if wanted.start is None else int(np.searchsorted(steps, wanted.start))
    high = len(steps) if wanted.stop is None else int(np.searchsorted(steps, wanted.stop))
    return slice(low, max(low, high))
