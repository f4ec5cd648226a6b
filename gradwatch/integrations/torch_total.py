"""Norms of whole gradients inside the step, for the actions that decide on them: one sum over the ranks.

What travels stays where the gradients are: of gradients on an accelerator no number comes to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.backends.shares import Union
from gradwatch.backends.torch_device import host_or_copy, on_host
from gradwatch.backends.torch_exchange import Exchange
from gradwatch.backends.torch_gradients import Held
from gradwatch.backends.torch_partial import Sums, is_copy, may_be_partial, term
from gradwatch.backends.torch_sharding import is_partial
from gradwatch.integrations.torch_pending import Reading
from gradwatch.integrations.torch_row import Step
from gradwatch.records import NOT_MEASURED


@dataclass(frozen=True)
class _Layout:
    """Where the numbers of one optimizer stand in a sum.

    Args:
        taken: Which of this rank's norms count.
        columns: Of those, in the whole.
        own: Columns of all that the optimizer holds.
        sums: Columns whose gradients are sums over ranks, with the elements of each; the same on all ranks.
        mine: The places of their parameters, where this rank has them.
    """

    taken: Tensor
    columns: Tensor
    own: Tensor
    sums: tuple[tuple[int, int], ...]
    mine: dict[int, int]


class Total:
    """Adds up squares over the ranks; of gradients that are sums themselves the elements.

    Args:
        exchange: With the other ranks.
        union: Gives the parameters of all ranks, once they were met.
        parameters: Of this rank, in column order.
        sums: Those whose gradients are sums; learns their norms.
    """

    def __init__(
        self, exchange: Exchange, union: Callable[[], Union], parameters: Sequence[nn.Parameter], sums: Sums
    ) -> None:
        self._exchange, self._union, self._parameters, self._sums = exchange, union, parameters, sums
        self._layouts: dict[int, _Layout] = {}

    def of(self, step: Step, reading: Reading) -> Any:
        """Norms over all columns of the whole; None where this rank's norms are those already.

        Args:
            step: Of the optimizer that is about to use the gradients.
            reading: This rank's norms.

        Raises:
            RuntimeError: The other ranks do not answer.
        """
        self._exchange.met()
        union = self._union()
        if not (union.is_needed or union.may_be_partial):
            return None
        own = torch.as_tensor(reading.now)
        layout = self._layouts.get(step.held.number) or self._agree(step.held, union, own.device)
        if not set(self._sums.places).intersection(step.held.places) <= set(layout.mine.values()):
            raise RuntimeError("a gradient is a sum over ranks that was none when the ranks agreed")
        scale = host_or_copy(getattr(step.optimizer, "grad_scale", None))
        whole = self._add_up(layout, own, scale)
        for column, place in layout.mine.items():
            norm = whole[column] * scale / reading.coefficient
            self._sums.know(place, float(norm) if on_host(norm) else norm)
        return whole.numpy() if isinstance(reading.now, np.ndarray) else whole

    def part(self, held: Held, values: Any) -> Any:
        """The entries of an optimizer's parameters, of an array over all columns."""
        layout = self._layouts[held.number]
        return values.index_select(0, layout.own) if isinstance(values, Tensor) else values[layout.own.numpy()]

    def _add_up(self, layout: _Layout, own: Tensor, scale: Any) -> Tensor:
        lengths = [len(self._union()), *(size for _, size in layout.sums)]
        line = torch.zeros(sum(lengths), dtype=torch.float64, device=own.device)
        squares, *elements = line.split(lengths)
        used = torch.where(own == NOT_MEASURED, 0.0, own.double().square())
        squares.index_copy_(0, layout.columns, used.index_select(0, layout.taken))
        for (column, _), part in zip(layout.sums, elements, strict=True):
            grad = self._parameters[layout.mine[column]].grad if column in layout.mine else None
            if grad is not None and (mine := term(grad)) is not None:
                part.copy_(mine / scale)
        self._exchange.add_up(line)
        for (column, _), part in zip(layout.sums, elements, strict=True):
            squares[column] = part.square().sum()
        norms: Tensor = squares.sqrt().float()
        return norms

    def _agree(self, held: Held, union: Union, device: torch.device) -> _Layout:
        """Find out with the others, once, which gradients are sums; one that is not there yet may turn out to be."""
        places = [place for place in held.places if place < len(union.columns)]
        column = {place: int(union.columns[place]) for place in places}
        candidates = {column[place]: place for place in places if may_be_partial(self._parameters[place])}
        sums: list[int] = []
        if union.may_be_partial:
            flags = torch.zeros(len(union), dtype=torch.float64)
            for each, place in candidates.items():
                grad = self._parameters[place].grad
                flags[each] = float(is_partial(grad) if grad is not None else is_copy(self._parameters[place]))
            self._exchange.add_up(flags)
            sums = flags.nonzero().flatten().tolist()
        taken = [
            at
            for at, place in enumerate(held.places)
            if place in column and union.adds[place] and column[place] not in sums
        ]
        layout = self._layouts[held.number] = _Layout(
            taken=torch.tensor(taken, dtype=torch.int64).to(device),
            columns=torch.tensor([column[held.places[at]] for at in taken], dtype=torch.int64).to(device),
            own=torch.tensor([column[place] for place in places], dtype=torch.int64).to(device),
            sums=tuple((each, math.prod(union.parameters[each].shape)) for each in sums),
            mine={each: place for each, place in candidates.items() if each in sums},
        )
        return layout
