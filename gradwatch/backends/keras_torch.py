"""The tap in a Keras step on the PyTorch backend: rows stay on the device in a list that is read every few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gradwatch.backends.keras_rule import EXTRAS, Gradients, base_of, gather, is_loss_scaled
from gradwatch.backends.keras_samples import EXTREMES, Sampler
from gradwatch.backends.keras_tap import Tap, no_rows
from gradwatch.backends.torch_norms import CpuNorms, values
from gradwatch.backends.torch_statistics import CpuExtremes, Updates, device_extremes
from gradwatch.faults import Faults
from gradwatch.records import NOT_MEASURED, Floats

Tensor = Any


class TorchTap(Tap):
    """See `Tap`; works in eager steps and under `torch.compile`.

    Args:
        rule: See `Tap`.
        scales_lr: See `Tap`.
        faults: See `Tap`.
        sampler: See `Tap`.
    """

    def __init__(self, rule: Any, *, scales_lr: bool, faults: Faults, sampler: Sampler | None = None) -> None:
        super().__init__(rule, scales_lr=scales_lr, faults=faults, sampler=sampler)
        self._sampling, self._sample = False, torch.zeros(0)
        self._pending: list[Tensor] = []
        self._state: dict[int, list[Tensor]] = {}
        self._plans: dict[Any, CpuNorms] = {}
        self._extreme_plans: dict[Any, CpuExtremes] = {}
        #: Weights, and what measures their updates.
        self._updates: dict[tuple[int, ...], tuple[list[Tensor], Updates]] = {}
        self._loss: Tensor | None = None
        # A tensor, not a number: a compiled step would be compiled again for each value of a number.
        self._factor = torch.ones((), dtype=torch.float32)

    def lr_factor(self) -> Tensor:
        return self._factor

    def set_lr_factor(self, factor: float) -> None:
        self._factor.fill_(factor)

    def set_sampling(self, wanted: bool) -> None:
        self._sampling = wanted

    def sample(self) -> Tensor:
        return self._sample

    def reset(self) -> None:
        self._pending.clear()
        self.begin_anew()
        self.set_lr_factor(1.0)

    def begin_anew(self) -> None:
        self._state.clear()

    def drain(self, *, lag: int = 0) -> Floats:
        if not self._pending:
            return no_rows(self.width if self.columns is not None else 0)
        rows, self._pending = torch.stack(self._pending), []
        return rows.cpu().numpy()

    def norms(self, grads: Sequence[Tensor]) -> Tensor:
        if not grads:
            return torch.zeros(0)
        if grads[0].device.type != "cpu":
            return torch.stack(torch._foreach_norm([values(grad) for grad in grads], 2, dtype=torch.float32))
        key = _kinds(grads)
        if key not in self._plans:
            self._plans[key] = CpuNorms(grads)
        return torch.from_numpy(self._plans[key](grads))

    def multiply(self, grad: Tensor, scale: Tensor) -> Tensor:
        return (grad * scale).to(grad.dtype)

    def limit(self, grad: Tensor, limit: Tensor) -> Tensor:
        return torch.clamp(grad, -limit, limit)

    def row(self, norms: Tensor, gradients: Gradients, extras: dict[str, Tensor | float]) -> Tensor:
        if norms.device.type != "cpu":
            return super().row(norms, gradients, extras)
        line = np.full(self.width + len(EXTRAS), NOT_MEASURED, np.float32)
        line[gradients.columns] = norms.numpy()
        line[self.width :] = [float(extras.get(name, NOT_MEASURED)) for name in EXTRAS]
        return torch.from_numpy(line)

    def _extremes(self, gradients: Gradients) -> Tensor:
        tensors, columns = gradients.tensors, gradients.columns
        home = tensors[0].device if tensors else torch.device("cpu")
        found = torch.full((self.width, len(EXTREMES)), NOT_MEASURED, device=home)
        if tensors and home.type == "cpu":
            key = _kinds(tensors)
            plan = self._extreme_plans.get(key) or self._extreme_plans.setdefault(key, CpuExtremes(tensors))
            found[columns] = torch.from_numpy(plan(tensors).T)
        elif tensors:
            found[columns] = device_extremes(tensors, home).T
        found[:, 0] *= gradients.factor
        return found.view(-1)

    def copies(self, values: Sequence[Tensor]) -> Any:
        key = tuple(map(id, values))
        if key not in self._updates:
            self._updates[key] = list(values), Updates(range(len(values)), [value.detach() for value in values])
        return self._updates[key][1].start(0)

    def changes(self, before: Any, after: Sequence[Tensor]) -> Tensor:
        places, norms = before()
        norms = torch.as_tensor(norms)
        found = torch.full((2, len(after)), NOT_MEASURED, device=norms.device)
        found[:, places] = norms
        return found

    def _replacements(self, number: int, optimizer: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        yield from super()._replacements(number, optimizer)
        scale_loss = optimizer.scale_loss

        def note_loss(loss: Tensor) -> Tensor:
            self._loss = loss.detach()
            return scale_loss(loss)

        yield optimizer, "scale_loss", note_loss

    def _entry(self, number: int, optimizer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        # Outside of a compiled step's graph: inside it, the list of rows would count as part of the program.
        measure = torch.compiler.disable(self._measured)

        def apply(grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None) -> Any:
            new, skip = measure(number, optimizer, grads, trainable_variables)
            if skip:
                return None
            return original(new if self.rule.acts else grads, trainable_variables)

        return apply

    def _measured(
        self, number: int, optimizer: Any, grads: Sequence[Tensor | None], variables: Sequence[Any] | None
    ) -> tuple[Sequence[Tensor | None], bool]:
        return self.faults.call(
            "keras tap", self._looked_at, number, optimizer, grads, variables, default=(grads, False)
        )

    def _looked_at(
        self, number: int, optimizer: Any, given: Sequence[Tensor | None], named: Sequence[Any] | None
    ) -> tuple[Sequence[Tensor | None], bool]:
        grads, variables = list(given), optimizer._trainable_variables if named is None else list(named)
        if not grads or len(grads) != len(variables) or self.columns is None:
            return grads, False
        if self.on_step is not None:
            self.on_step(number)
        if not optimizer.built and (self.rule.acts or is_loss_scaled(optimizer)):
            optimizer.build(variables)
            optimizer.built = True
        return self._measure(number, optimizer, grads, variables)

    @torch.no_grad()
    def _measure(
        self, number: int, optimizer: Any, grads: list[Tensor | None], variables: Sequence[Any]
    ) -> tuple[list[Tensor | None], bool]:
        assert self.columns is not None
        gradients = gather(optimizer, grads, variables, self.columns.of, value_of=_value)
        if self.sampler is not None:
            outputs, self.sampler.outputs = self.sampler.outputs, {}
            if self._sampling:
                extremes = self._extremes(gradients)
                self._sample = self.sampler.measure(gradients, (), self.sizes(), outputs, extremes=extremes)
        loss, self._loss = self._loss, None
        state = self._state.get(number)
        if state is None:
            device = gradients.tensors[0].device if gradients.tensors else None
            state = [torch.from_numpy(np.array(value)).to(device) for value in self.rule.initial_state()]
        given: dict[str, Any] = {"grads": grads, "weights": [_value(v) for v in variables] if self.rule.acts else ()}
        given |= {"state": state, "lr": _value(self.learning_rate(optimizer)), "loss": loss}
        current, verdict, skip = self.measure(number, optimizer, gradients, **given)
        self._pending.append(current)
        if verdict is None:
            return grads, False
        self._state[number] = verdict.state
        if not self.rule.acts:
            return grads, False
        is_skipped = skip is not None and bool(skip)
        new = grads if is_skipped else verdict.edited
        if gradients.is_update is not None and bool(gradients.is_update):
            self._empty(optimizer, gradients.accumulators, is_skipped=is_skipped)
        return new, is_skipped

    @staticmethod
    def _empty(optimizer: Any, accumulators: Sequence[Any], *, is_skipped: bool) -> None:
        """Empty the accumulators at an update; when it is skipped, take the step count back to before them."""
        base = base_of(optimizer)
        for accumulator in accumulators:
            accumulator.value.zero_()
        if is_skipped:
            base._iterations.assign_sub(base.gradient_accumulation_steps - 1)


def _kinds(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _value(variable: Any) -> Tensor:
    value = getattr(variable, "value", variable)
    return value.detach() if isinstance(value, torch.Tensor) else value
