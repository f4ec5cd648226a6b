"""Runs the in-step actions and applies what they decide to the gradients that an optimizer is about to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradwatch.actions.base import InStepAction
from gradwatch.backends.torch_decide import Decider
from gradwatch.backends.torch_device import beside, host_or_copy
from gradwatch.backends.torch_gradients import Gradients, Held
from gradwatch.backends.torch_step import clip_values, scale_gradients, skip_step
from gradwatch.backends.torch_units import scale_units, spared_by
from gradwatch.integrations.torch_pending import Reading, ratio
from gradwatch.integrations.torch_row import Row, Step
from gradwatch.records import Parameter


class InStep:
    """Skips or scales.

    Args:
        actions: The in-step actions.
        gradients: Measures what clipping by value has left.
        described: Gives the parameters of the run as they are described now.
        is_dry: Record what would be done; do nothing.
    """

    def __init__(
        self,
        actions: Sequence[InStepAction],
        gradients: Gradients,
        described: Callable[[], Sequence[Parameter]],
        *,
        is_dry: bool,
    ) -> None:
        self.decider = Decider(actions)
        self._gradients, self._described, self._is_dry = gradients, described, is_dry
        #: Norms of the whole gradients from those of this rank's parts, where they differ; None where they do not.
        self.total: Callable[[Step, Reading], Any] = lambda step, reading: None
        #: The entries of an optimizer's parameters, of an array over those of all ranks.
        self.part: Callable[[Held, Any], Any] = lambda held, values: values

    def __bool__(self) -> bool:
        return bool(self.decider)

    @property
    def can_skip(self) -> bool:
        """Whether an action may skip steps."""
        return self.decider.can_skip and not self._is_dry

    def act(self, step: Step, row: Row, reading: Reading) -> Any:
        """Skip or scale as the actions decide; returns the factor on the global norm."""
        held = step.held

        def by_unit(action: InStepAction, norms: Any) -> Any:
            if self._is_dry:
                return norms
            spared = spared_by(action, self._described())[held.index]
            return scale_units(action, held.parameters, spared, norms)

        total = self.total(step, reading)
        verdict = self.decider.decide(reading.now if total is None else total, by_unit)
        if self._is_dry:
            row.put_metric("would_skip", verdict.skip)
            row.put_metric("would_clip", verdict.coefficient)
            return 1.0
        if verdict.skip is not False:
            row.put_skip(verdict.skip, verdict.norm)
            step.undo += skip_step(step.optimizer, held.parameters, verdict.skip, step.counters)
            if verdict.skip is True:
                return 1.0
        if verdict.scale is not None:
            is_split = total is not None and np.ndim(verdict.scale)
            scale_gradients(held.parameters, self.part(held, verdict.scale) if is_split else verdict.scale)
        if verdict.clip_value is None:
            return verdict.coefficient
        loss_scale = host_or_copy(getattr(step.optimizer, "grad_scale", None))
        clip_values(held.parameters, verdict.clip_value * loss_scale)
        return self._left(step, reading.now if total is None else total, loss_scale)

    def _left(self, step: Step, before: Any, loss_scale: Any) -> Any:
        """The factor on the global norm that clipping by value amounts to, which no norm foretells: measured again."""
        norms = step.held.part(self._gradients.measure(step.held).norms)
        norms = norms / beside(loss_scale, norms)
        whole = self.total(step, Reading(norms, norms))
        return ratio(norms if whole is None else whole, before)
