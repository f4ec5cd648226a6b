"""DeepSpeed: `watcher = watch(engine, run_dir="runs/ds")` on every rank, after `deepspeed.initialize`.

ZeRO keeps a rank's part of the reduced gradients in buffers of its own, and its optimizer holds none of the parameters
of the model: hooks do not see what is used. So the parts are measured when `engine.step` is called, and put together
every `flush_every` steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.backends.shares import SEEN, roots
from gradwatch.backends.torch_exchange import Exchange
from gradwatch.backends.torch_model import describe
from gradwatch.backends.torch_norms import flat
from gradwatch.backends.torch_sharding import world
from gradwatch.errors import ConfigurationError, MissingDependencyError
from gradwatch.integrations.torch_row import logged_number
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, Floats, Parameter, RunInfo
from gradwatch.rows import global_norm
from gradwatch.settings import Options
from gradwatch.watcher import Watcher

try:
    from gradwatch.backends.deepspeed_parts import part, whole_shape
except ImportError:
    raise MissingDependencyError.of("deepspeed", extra="deepspeed") from None

#: Seconds that a rank which crashes waits for the others.
_AT_THE_END = 2.0


def watch(engine: Any, **settings: Unpack[Options]) -> DeepSpeedWatcher:
    """Watch the training of a DeepSpeed engine, ZeRO stage 0, 1, 2 or 3; called on every rank, at the same place.

    Recorded are the norm of the whole gradient of every parameter at every step, without the loss scale and before
    DeepSpeed clips, the learning rate, the clip coefficient and which steps were skipped. Findings come up to
    `flush_every` steps late. Actions are not carried out, and the sampled statistics are missing.

    Args:
        engine: What `deepspeed.initialize` returned first.
        settings: What `gradwatch.watch` takes, but actions.

    Returns:
        The watcher of this rank; that of rank 0 records.

    Raises:
        ConfigurationError: There are actions, or the model is in parts that are not those of ZeRO.
    """
    return DeepSpeedWatcher(engine, **settings)


@dataclass
class _Row:
    """One step: squares of this rank's parts, shape (number of parameters,), 0 where it has none; and numbers."""

    squares: Tensor
    scale: float
    metrics: dict[str, Any]
    is_skipped: bool = False


class DeepSpeedWatcher(Watcher):
    """Watches one rank of a DeepSpeed engine; made by `watch`.

    Args:
        engine: The engine.
        rank_timeout: Seconds that the other ranks have to answer.
        settings: Those of `gradwatch.watch`.
    """

    def __init__(self, engine: Any, *, rank_timeout: float = 30.0, **settings: Unpack[Options]) -> None:
        rank, count = world()
        if settings.get("actions"):
            raise ConfigurationError("'actions' are not carried out under DeepSpeed: use its gradient_clipping")
        if getattr(engine, "dp_world_size", count) != count:
            raise ConfigurationError.of("engine", f"data parallel over all {count} ranks", engine.dp_world_size)
        self._rank, self._count, self._trainer = rank, count, engine
        self._tensors: list[nn.Parameter] = []
        if rank:
            settings = {**settings, "record": False, "detectors": ()}
        described, self._tensors = _described(engine.module)
        super().__init__(described, framework="torch", **settings)
        self._rows_held: list[_Row] = []
        self._open: _Row | None = None
        self._early: dict[str, Any] = {}
        self._is_alone = False
        self._exchange: Exchange | None = None
        if count > 1:
            topic = f"deepspeed {self.settings.run_dir or ''}"
            self._exchange = Exchange(rank, count, {}, timeout=rank_timeout, topic=topic)
        self._original = engine.step
        engine.step = self._step

    def _info(self) -> RunInfo:
        return dataclasses.replace(super()._info(), rank=self._rank, world_size=self._count)

    def _log(self, numbers: Mapping[str, Any]) -> None:
        """Numbers belong to the step taken last."""
        book = self._early if self._open is None else self._open.metrics
        book.update({name: logged_number(name, value) for name, value in numbers.items()})

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """`engine.step`, which steps the optimizer only where the accumulation of gradients ends."""
        is_last = bool(self._trainer.is_gradient_accumulation_boundary())
        if is_last:
            self.faults.call("gradients", self._measure, default=None)
        result = self._original(*args, **kwargs)
        if is_last:
            self.faults.call("gradients", self._complete, default=None)
        return result

    @torch.no_grad()
    def _measure(self) -> None:
        self._put_away()
        parts = [part(tensor, is_first=self._rank == 0) for tensor in self._tensors]
        home = next((own.device for own in parts if own is not None), torch.device("cpu"))
        nothing = torch.zeros((), dtype=torch.float64, device=home)
        squares = [
            nothing if own is None else torch.linalg.vector_norm(flat(own), dtype=torch.float64).square() + SEEN
            for own in parts
        ]
        scale = float(getattr(self._trainer.optimizer, "loss_scale", 1.0) or 1.0)
        self._open = _Row(torch.stack(squares), scale, {"time": time.time(), **self._early})
        self._early = {}

    def _complete(self) -> None:
        """The engine has stepped, or found an overflow."""
        if self._open is not None:
            rates = self._trainer.get_lr()
            self._open.metrics |= {"lr": float(rates[0])} if rates else {}
            self._open.is_skipped = not self._trainer.was_step_applied()

    def _put_away(self) -> None:
        """The open row takes no more numbers."""
        if self._open is not None:
            self._rows_held.append(self._open)
            self._open = None
        if len(self._rows_held) >= self.settings.flush_every:
            self._flush()

    def _flush(self) -> None:
        """Put the parts of all ranks together, and record."""
        rows, self._rows_held = self._rows_held, []
        # Of one size on all ranks, whatever they have; the last column counts who has the row.
        line = torch.zeros(self.settings.flush_every, len(self._tensors) + 1, dtype=torch.float64)
        if rows:
            line[: len(rows), :-1] = torch.stack([row.squares for row in rows]).cpu()
            line[: len(rows), -1] = 1.0
        if self._exchange is not None:
            try:
                self._exchange.add_up(line)
            except RuntimeError as error:
                line.zero_()
                if not self._is_alone:
                    self.mark(f"the other ranks did not answer ({error}): norms are not recorded any more")
                self._is_alone = True
        for row, sums in zip(rows, line.numpy(), strict=False):
            is_whole = sums[-1] == self._count
            self._record(row, roots(sums[:-1]) if is_whole else np.full(len(self._tensors), NOT_MEASURED, np.float32))

    def _record(self, row: _Row, norms: Floats) -> None:
        norms = np.where(norms == NOT_MEASURED, norms, norms / np.float32(row.scale)).astype(np.float32)
        metrics = {name: float(value) for name, value in row.metrics.items()}
        if (limit := float(self._trainer.gradient_clipping() or 0.0)) > 0.0 and not row.is_skipped:
            metrics["clip_coefficient"] = min(1.0, limit / (global_norm(norms) + 1e-6))
        if row.scale != 1.0:
            metrics["grad_scale"] = row.scale
        self._close_row(norms, metrics, skip_reason=SKIP_REASONS.index("grad_scaler" if row.is_skipped else ""))

    def close(self, status: str = "finished", detail: str = "") -> None:
        """See `Watcher.close`; every rank calls it."""
        if self.is_closed:
            return
        if self._trainer.__dict__.get("step") == self._step:
            del self._trainer.step
        self._put_away()
        if self._exchange is not None and status == "crashed":
            self._exchange.timeout = min(self._exchange.timeout, _AT_THE_END)
        self.faults.call("gradients", self._flush, default=None)
        if self._exchange is not None:
            self._exchange.close()
        super().close(status, detail)


def _described(model: nn.Module) -> tuple[list[Parameter], list[nn.Parameter]]:
    described, tensors = describe(model, [])
    return [
        dataclasses.replace(each, shape=whole_shape(tensor)) for each, tensor in zip(described, tensors, strict=True)
    ], tensors
