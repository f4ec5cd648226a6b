"""Tells when a backward pass is over, with hooks on few parameters and none on modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from gradwatch.backends.torch_hooks import Handle

_task_id = torch._C._current_graph_task_id
#: Has autograd call a function at the end of the pass that is running.
_queue: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback


class BackwardEnd:
    """Calls back once at the end of each backward pass that reaches one of the watched parameters.

    A hook on a parameter queues the callback with autograd, which runs it when all gradients have been accumulated. All
    parameters carry a hook at first, to learn in which order gradients arrive, until `thin` is called. Passes nested in
    one that reached a parameter before, as re-entrant activation checkpointing makes, are part of it.

    Args:
        parameters: The parameters, a list that may grow.
        on_end: Called at the end of a pass.
        on_error: Told of what must not be raised into the pass.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        on_end: Callable[[], None],
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._parameters, self._on_end, self._on_error = parameters, on_end, on_error
        self._handles: dict[int, Handle] = {}
        self._running: list[int] = []
        self._arrivals: list[int] = []
        self._passes: dict[tuple[int, int], list[int]] = {}
        self._suspects: set[int] = set()
        try:
            self.add(range(len(parameters)))
        except BaseException:
            self.remove()
            raise

    def add(self, places: Iterable[int]) -> None:
        """Put hooks on more parameters."""
        for place in places:
            parameter = self._parameters[place]
            if place not in self._handles and parameter.requires_grad and parameter.is_leaf:
                hook = self._hook(place)
                self._handles[place] = Handle(parameter, "_post_accumulate_grad_hooks", hook)
                parameter.register_post_accumulate_grad_hook(hook)

    def suspect(self, places: Iterable[int]) -> None:
        """These gradients changed without a pass that we saw: put hooks on them until one is seen."""
        places = list(places)
        self.add(places)
        self._suspects.update(place for place in places if place in self._handles)

    @property
    def arrivals(self) -> list[int]:
        """The places in order of arrival, of the pass that reached the most parameters."""
        return max(self._passes.values(), key=len, default=[])

    def thin(self) -> None:
        """Keep only the hooks of the first and the last to arrive in each kind of pass that was seen."""
        if not in_backward():
            self._running.clear()  # of a pass that raised
        if not self._passes or self._suspects or len(self._handles) <= 2:
            return
        for place in set(self._handles) - {end for ends in self._passes for end in ends}:
            self._handles[place].remove()
            del self._handles[place]

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _hook(self, place: int) -> Callable[[Tensor], None]:
        # The garbage collector cannot look into a tensor's hooks: a strong reference here would keep us for ever.
        reference = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            """The gradient of the parameter at this place is complete."""
            try:
                end = reference()
                if end is None:
                    return
                task = _task_id()
                if task not in end._running:  # as `begin`, without the call: this runs in every step
                    end._begin(task)
                end._arrivals.append(place)
            except Exception as error:  # noqa: BLE001 -- nothing of ours may break the pass
                _tell(reference, error)

        return arrived

    def begin(self) -> None:
        """A backward pass is beginning, perhaps one that reaches no parameter with a hook."""
        if (task := _task_id()) not in self._running:
            self._begin(task)

    def _begin(self, task: int) -> None:
        """The first gradient of a backward pass has arrived."""
        if not self._running:
            self._arrivals = []
        if task != -1:
            self._running.append(task)
            _queue(self._queue_end)

    def _queue_end(self) -> None:
        # Queued again from the end of the pass, to come behind those of DistributedDataParallel and FSDP, which reduce
        # gradients in callbacks of their own.
        try:
            _queue(self._end)
        except Exception as error:  # noqa: BLE001 -- nothing of ours may break the pass
            self._on_error(error)

    def _end(self) -> None:
        try:
            self._finish_pass()
        except Exception as error:  # noqa: BLE001 -- nothing of ours may break the pass
            self._on_error(error)

    def _finish_pass(self) -> None:
        if torch._C._current_autograd_node() is not None and len(self._running) > 1:
            self._running.pop()  # nested in the backward of another node, whose own pass will end
            return
        self._running.clear()
        arrivals = self._arrivals
        ends = (arrivals[0], arrivals[-1]) if arrivals else None
        if ends is not None and len(arrivals) > len(self._passes.get(ends, ())):
            self._passes[ends] = arrivals
        if self._suspects:
            self._suspects.difference_update(arrivals)
        self._on_end()


def _tell(reference: weakref.ref[BackwardEnd], error: Exception) -> None:
    try:
        if (end := reference()) is not None:
            end._on_error(error)
    except Exception:  # noqa: BLE001 -- there is nobody left to tell
        return


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return bool(_task_id() != -1)
