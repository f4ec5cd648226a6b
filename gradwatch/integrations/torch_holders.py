"""Which optimizer holds which parameters, followed through parameter groups that are added."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.backends.torch_gradients import Gradients, Held
from gradwatch.backends.torch_model import held_by


class Holders:
    """Knows the column of each parameter and what each optimizer holds.

    Args:
        gradients: Has the parameters, in column order.
        gain: Called with each parameter that an optimizer brings, and its new column.
    """

    def __init__(self, gradients: Gradients, gain: Callable[[nn.Parameter, int], None]) -> None:
        self._gradients, self._gain = gradients, gain
        self.place = {id(parameter): place for place, parameter in enumerate(gradients.parameters)}
        self._held: weakref.WeakKeyDictionary[Optimizer, Held] = weakref.WeakKeyDictionary()
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def places(self, parameters: Iterable[Tensor]) -> list[int]:
        """The columns of those parameters that have one."""
        return [place for parameter in parameters if (place := self.place.get(id(parameter))) is not None]

    def of(self, optimizer: Optimizer) -> Held | None:
        """What an optimizer holds now; None when it holds nothing of ours."""
        parameters, known = held_by(optimizer), self._held.get(optimizer)
        if known is not None and known.is_current(parameters, len(self._gradients.parameters)):
            return known if known.places else None
        if (known is not None and known.places) or any(id(parameter) in self.place for parameter in parameters):
            return self._hold(optimizer, parameters, known)
        self._held[optimizer] = Held(parameters, [], len(self._gradients.parameters), number=-1)
        return None

    def _hold(self, optimizer: Optimizer, parameters: list[nn.Parameter], known: Held | None) -> Held:
        for parameter in parameters:
            if id(parameter) not in self.place:
                place = self.place[id(parameter)] = len(self._gradients.parameters)
                self._gradients.add(parameter)
                self._gain(parameter, place)
        if known is None or known.number < 0:
            number, self._number = self._number, self._number + 1
        else:
            number = known.number
        places = [self.place[id(parameter)] for parameter in parameters]
        held = self._held[optimizer] = Held(parameters, places, len(self._gradients.parameters), number=number)
        return held
