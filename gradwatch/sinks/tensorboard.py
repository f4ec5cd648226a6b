"""Numbers into TensorBoard."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.errors import MissingDependencyError
from gradwatch.records import ActionRecord, Finding, RunInfo
from gradwatch.sinks.base import Sink
from gradwatch.sinks.heatmap import Heatmap
from gradwatch.sinks.rows import Row

if TYPE_CHECKING:
    from typing import BinaryIO


class TensorBoard(Sink):
    """Writes event files that TensorBoard shows: scalars, findings and actions as text, a heatmap of the layers' norms.

    Tags: `metrics/loss`, `metrics/global_norm`, `grad_norm/LAYER`, `update_ratio/LAYER`, ...; `findings`, `actions`;
    `heatmap/grad_norm`. Needs the tensorboard package and imports no TensorFlow.

    Args:
        log_dir: A directory of this machine; several runs below one directory are compared by TensorBoard.
        every: Mirror only steps whose number this divides.
        by: `layer` or `parameter`.
        heatmap_every: Rows between two pictures; 0 draws none.

    Raises:
        MissingDependencyError: Without the tensorboard package.
        ConfigurationError: When a setting breaks a rule.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], *, every: int = 1, by: str = "layer", heatmap_every: int = 1000
    ) -> None:
        super().__init__(every=every, by=by)
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise MissingDependencyError.of("tensorboard", extra="tensorboard") from None
        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2
        self._tensor: Any = tensor_pb2.TensorProto
        self._record_writer: Any = RecordWriter
        self.log_dir = Path(log_dir)
        self._heatmap = Heatmap()
        self._heatmap_every, self._rows_seen, self._step = heatmap_every, 0, 0

    def begin(self, info: RunInfo, run_dir: Path) -> None:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # TensorBoard knows its files by the first words and reads them in the order of the times.
        name = f"events.out.tfevents.{time.time():.0f}.{info.host}.{os.getpid()}.{time.time_ns()}.gradwatch"
        self._file: BinaryIO = (self.log_dir / name).open("ab")
        self._records = self._record_writer(self._file)
        self._put(file_version="brain.Event:2", wall_time=time.time())
        self._text("run", f"`{run_dir}` on {info.host}", 0)
        self._file.flush()

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            values = [
                self._summary.Summary.Value(tag=f"{family}/{name}", simple_value=value)
                for (family, name), value in row.values.items()
            ]
            self._put(wall_time=row.time, step=row.step, summary=self._summary.Summary(value=values))
            self._step = row.step
            self._heatmap.add({name: value for (family, name), value in row.values.items() if family == "grad_norm"})
            self._rows_seen += 1
            if self._heatmap_every and self._rows_seen % self._heatmap_every == 0:
                self._draw()
        self._file.flush()

    def tell(self, news: Finding | ActionRecord) -> None:
        if isinstance(news, Finding):
            state = "" if news.is_open else f" (resolved at step {news.resolved_step})"
            advice = "".join(f"\n- {advice}" for advice in news.advice)
            text = f"**{news.rule}**, {news.severity}{state}: {news.message}\n\n{news.cause}\n{advice}"
            self._text(f"findings/{news.rule}", text, news.last_step)
        else:
            self._text(f"actions/{news.action}", f"**{news.action}**: {news.detail} {news.outcome}", news.step)

    def end(self, status: str) -> None:
        if self._heatmap_every:
            self._draw()
        self._text("run", f"The run has {status}.", self._step)
        self._file.close()

    def _draw(self) -> None:
        if drawn := self._heatmap.png():
            picture, width, height = drawn
            image = self._summary.Summary.Image(encoded_image_string=picture, width=width, height=height, colorspace=3)
            value = self._summary.Summary.Value(tag="heatmap/grad_norm", image=image)
            self._put(wall_time=time.time(), step=self._step, summary=self._summary.Summary(value=[value]))

    def _text(self, tag: str, text: str, step: int) -> None:
        metadata = self._summary.SummaryMetadata(
            plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name="text")
        )
        tensor = self._tensor(dtype="DT_STRING", string_val=[text.encode()])
        value = self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._put(wall_time=time.time(), step=step, summary=self._summary.Summary(value=[value]))

    def _put(self, **fields: Any) -> None:
        self._records.write(self._event(**fields).SerializeToString())

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.log_dir)!r})"
