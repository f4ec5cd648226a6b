"""Watches one rank of a training on `torch.distributed`.

Gradients that are alike on all ranks (DistributedDataParallel) need no talk: rank 0 records them. Where each rank holds
a part of the gradients, and for actions between steps, the ranks talk through `Ranks`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Unpack

import numpy as np
from torch import nn
from torch.optim import Optimizer

from gradwatch.actions.base import Due
from gradwatch.actions.renewal import Reinitialize, Restructure
from gradwatch.backends.shares import Holding, describe_rank
from gradwatch.backends.torch_device import host_or_copy
from gradwatch.backends.torch_exchange import Exchange
from gradwatch.backends.torch_own_norm import OwnNorm
from gradwatch.backends.torch_partial import Sums, may_be_partial
from gradwatch.backends.torch_restart import leave_word
from gradwatch.backends.torch_sharding import AtBackward, holdings, is_wrapped_by_fsdp1, local, world
from gradwatch.errors import ConfigurationError
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_ranks import Ranks, Shape
from gradwatch.integrations.torch_row import Row
from gradwatch.integrations.torch_total import Total
from gradwatch.records import Parameter, RunInfo
from gradwatch.settings import TorchOptions

#: What only trainings of several processes look at.
RANK_SETTINGS = ("per_rank", "rank_timeout")
#: Steps between two exchanges where actions between steps wait for them.
_SOON = 10


class RankWatcher(TorchWatcher):
    """Watches one rank; every rank makes one, at the same place.

    Args:
        model: The model, as wrapped for the training.
        optimizers: The optimizers of this rank.
        per_rank: Record the loss and the gradient norm that each rank measured before gradients were reduced.
        rank_timeout: Seconds that the other ranks have to answer, before this one goes on alone.
        settings: Those of `TorchWatcher`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        per_rank: bool = False,
        rank_timeout: float = 30.0,
        **settings: Unpack[TorchOptions],
    ) -> None:
        if not rank_timeout > 0:
            raise ConfigurationError.of("rank_timeout", "> 0", rank_timeout)
        self._ranks: Ranks | None = None
        self._own: OwnNorm | None = None
        self._sums: Sums | None = None
        self._is_missing = False
        self._begin_hook: Any = None
        self._rank, self._world_size = world()
        if self._rank:
            settings = {**settings, "record": False, "detectors": (), "start_step": settings.get("start_step", 0)}
        super().__init__(model, optimizers, **settings)
        try:
            self._join(model, per_rank=per_rank, timeout=rank_timeout)
        except BaseException:
            self.close("crashed", "could not join the other ranks")
            raise

    def _info(self) -> RunInfo:
        return dataclasses.replace(super()._info(), rank=self._rank, world_size=self._world_size)

    def _join(self, model: nn.Module, *, per_rank: bool, timeout: float) -> None:
        """Meet the other ranks where there is something to talk about."""
        self._sums = Sums(self._gradients.parameters)
        held = holdings(model, self._gradients.parameters)
        is_sharded = any(len(holding.ranks) > 1 for holding in held)
        if is_sharded:
            self._refuse()
        if is_wrapped_by_fsdp1(model):
            begins = partial(_begins, weakref.ref(self._backward))
            self._begin_hook = model.register_forward_hook(AtBackward(begins))
        self.pending.is_reduced_by_loop = any(holding.fingerprint is not None for holding in held)
        may_be = any(map(may_be_partial, self._gradients.parameters))
        is_combining = is_sharded or self.pending.is_reduced_by_loop or (may_be and bool(self._policy.in_step))
        if not (is_combining or self._policy.between or per_rank):
            return
        if per_rank and not is_sharded:
            self._own = OwnNorm(self._gradients.parameters)
        self._talk(held, is_combining=is_combining, per_rank=per_rank, timeout=timeout)

    def _talk(self, held: Sequence[Holding], *, is_combining: bool, per_rank: bool, timeout: float) -> None:
        may_be = any(map(may_be_partial, self._gradients.parameters))
        description = describe_rank(self._parameters, held, next_step=self._next_step, may_be_partial=may_be)
        topic = str(self.settings.run_dir or "")
        exchange = Exchange(self._rank, self._world_size, description, timeout=timeout, topic=topic)
        every = self.settings.flush_every
        sizes = np.array([tensor.numel() for tensor in local(self._gradients.parameters)], np.float64)
        if self._policy.between:
            every = min(every, _SOON)
        shape = Shape(every, self.settings.stats_every, sizes, is_personal=per_rank)
        ranks = self._ranks = Ranks(
            exchange, self._policy, shape, is_combining=is_combining or per_rank, apply=self._apply_everywhere
        )
        ranks.on_union, ranks.on_alone, ranks.on_outlier = self._know, self._left_alone, self.monitor.mark
        self._between.is_well = lambda: ranks.is_well
        if is_combining:
            assert self._sums is not None
            total = Total(exchange, lambda: ranks.union, self._gradients.parameters, self._sums)
            self._in_step.total, self._in_step.part = total.of, total.part
        if (self._policy.between or self.settings.resume) and exchange.met():
            assert exchange.descriptions is not None
            self._next_step = int(exchange.descriptions[0]["next_step"])

    def _refuse(self) -> None:
        """Refuse at once what would need the whole tensors."""
        for action in self._policy.between:
            if isinstance(action, (Reinitialize, Restructure)):
                raise ConfigurationError(f"{action.name} needs whole weights: it does not work on sharded parameters")
        for each in self._policy.in_step:
            if each.by_unit:
                raise ConfigurationError(f"{each.name} looks at whole units: it does not work on sharded parameters")

    def _know(self, parameters: Sequence[Parameter]) -> None:
        """Take columns for the parameters of other ranks, once."""
        known = {parameter.name for parameter in self._parameters}
        for parameter in parameters:
            if parameter.name not in known:
                self._gain(parameter)

    def _left_alone(self, why: str) -> None:
        self._between.is_off = True
        self.monitor.mark(f"{why}; from here on only what rank {self._rank} measures is recorded", self._upcoming)

    def _apply_everywhere(self, due: Due) -> None:
        self._between.take(due, self._upcoming)

    @property
    def _waiting(self) -> int:
        return super()._waiting + (len(self._ranks) if self._ranks is not None else 0)

    def _record(self, row: Row) -> None:
        if self._ranks is None:
            super()._record(row)
            return
        row.receive()
        self._record_all(self._ranks.through(row))
        # What rank 0 decided, the others do not know yet.
        self._policy.state.lr_factor = self._ranks.lr_factor

    def _record_all(self, rows: Iterable[Row]) -> None:
        for row in rows:
            super()._record(row)

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `TorchWatcher.before_step`."""
        result = super().before_step(optimizer, args, kwargs)
        if self._own is not None and self._row is not None:
            self._row.put_metric(f"rank_norm.{self._rank}", self._own.norm())
        return result

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `TorchWatcher.after_step`."""
        super().after_step(optimizer, args, kwargs)
        held, row = self._holders.of(optimizer), self._row
        if self._sums is None or not self._sums.places or held is None or row is None or row.skip_reason:
            return
        known = {place: self._sums.norms[place] for place in held.places if place in self._sums.norms}
        if known:
            scale = host_or_copy(getattr(optimizer, "grad_scale", None))
            row.put_norms_at(list(known), [norm / scale for norm in known.values()])
        if missing := set(self._sums.places).intersection(held.places).difference(known):
            self._miss(sorted(missing))

    def _miss(self, places: Sequence[int]) -> None:
        """Say once of which gradients nobody saw the whole."""
        if self._is_missing:
            return
        self._is_missing = True
        if self._is_first_row:  # no rule shall expect a gradient there
            self._redescribe(
                [
                    dataclasses.replace(parameter, trainable=parameter.trainable and place not in places)
                    for place, parameter in enumerate(self._parameters)
                ]
            )
        names = [self._parameters[place].name for place in places]
        listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self.monitor.mark(
            f"the gradients of {listed} are sums over ranks (Partial) that the step did not add up: "
            "their norms are not recorded",
            self._upcoming - 1,
        )

    def _after_backward(self) -> None:
        if self._sums is not None:
            self._sums.expect()
        super()._after_backward()

    def _apply(self, due: Due) -> None:
        if self._ranks is None:
            super()._apply(due)
        else:
            self._ranks.decided(due)

    def close(self, status: str = "finished", detail: str = "") -> None:
        """See `TorchWatcher.close`."""
        if status == "crashed" and not self.is_closed:
            leave_word(str(self.settings.run_dir), self._rank, detail)
        super().close(status, detail)

    def _finish(self, status: str) -> None:
        if self._own is not None:
            self._own.remove()
        if self._begin_hook is not None:
            self._begin_hook.remove()
        if self._sums is not None:
            self._sums.close()
        if self._ranks is not None:
            self.faults.call(
                "ranks",
                lambda ranks: self._record_all(ranks.finish(is_well=status == "finished")),
                self._ranks,
                default=None,
            )


def _begins(backward: weakref.ref[Any]) -> None:
    if (end := backward()) is not None:
        end.begin()
