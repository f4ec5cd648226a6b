"""Tells when a backward pass is over, with hooks on few parameters and none on modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BackwardEnd:
    """Calls back once at the end of each backward pass that reaches one of the watched parameters.

    A hook on a parameter queues the callback with autograd, which runs it when all gradients have been accumulated. All
    parameters carry a hook at first, to learn in which order gradients arrive, until `thin` is called.

    Args:
        parameters: The parameters, a list that may grow.
        on_end: Called at the end of a pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], on_end: Callable[[], None]) -> None:
        self._parameters, self._on_end = parameters, on_end
        self._handles: dict[int, Any] = {}
        self._graph_task = -1
        self.arrivals: list[int] = []
        self._is_learning = True
        self.add(range(len(parameters)))

    def __contains__(self, place: int) -> bool:
        return place in self._handles

    def add(self, places: Iterable[int]) -> None:
        """Put hooks on more parameters."""
        for place in places:
            parameter = self._parameters[place]
            if place not in self._handles and parameter.requires_grad and parameter.is_leaf:
                self._handles[place] = parameter.register_post_accumulate_grad_hook(self._hook(place))

    def learned(self) -> list[int]:
        """The places in order of arrival in the first pass; ends the learning."""
        self._is_learning = False
        return self.arrivals

    def thin(self) -> None:
        """Keep only the hooks of the first and the last to arrive: enough for a loop that runs the same pass each step."""
        if self.arrivals:
            for place in set(self._handles) - {self.arrivals[0], self.arrivals[-1]}:
                self._handles.pop(place).remove()

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _hook(self, place: int) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            if self._is_learning:
                self.arrivals.append(place)
            task = torch._C._current_graph_task_id()
            if task != self._graph_task:
                self._graph_task = task
                torch.autograd.Variable._execution_engine.queue_callback(self._on_end)  # type: ignore[attr-defined]

        return arrived


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1
