"""Measures a run into one `StepBatch` by the plainest code that can, to hold the watcher's record against."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.records import NOT_MEASURED, Parameter, Samples, StepBatch

ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.Softplus,
)  # fmt: skip
#: |output| of tanh or |2 output - 1| of a sigmoid above this: the derivative is below 1 % of its maximum.
SATURATED = 0.995


class Recorder:
    """Norms of every parameter at every step; weights, updates and activations at every tenth.

    Call `log` after each step, then `batch`.
    """

    def __init__(self, model: nn.Module, optimizer: Any, *, every: int = 10) -> None:
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        self._model, self._every = model, every
        self._optimizers = optimizers
        self._names, self._parameters = zip(*model.named_parameters(), strict=True)
        self._trainable = [parameter.requires_grad for parameter in self._parameters]
        self._column = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        self._order: list[nn.Module] = []
        self._modules = [(name, module) for name, module in model.named_modules() if isinstance(module, ACTIVATIONS)]
        self._outputs: dict[int, Tensor] = {}
        self._norms: list[Tensor] = []
        self._before: dict[int, Tensor] = {}
        self._steps: list[np.ndarray[Any, Any]] = []
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._samples: dict[str, list[np.ndarray[Any, Any]]] = defaultdict(list)
        self._sampled: list[int] = []
        self._row = np.full(len(self._parameters), NOT_MEASURED)
        self._watch()

    def _watch(self) -> None:
        for optimizer in self._optimizers:
            optimizer.register_step_pre_hook(self._before_update)
        for module in self._model.modules():
            if next(module.parameters(recurse=False), None) is not None or isinstance(module, ACTIVATIONS):
                module.register_forward_pre_hook(self._note_order)
        for index, (_, module) in enumerate(self._modules):
            module.register_forward_hook(lambda m, i, output, index=index: self._note_output(index, output))

    @property
    def _sampling(self) -> bool:
        return len(self._steps) % self._every == 0

    def _note_order(self, module: nn.Module, inputs: Any) -> None:
        if not self._steps and module not in self._order:
            self._order.append(module)

    def _note_output(self, index: int, output: Tensor) -> None:
        if self._sampling and self._model.training:
            self._outputs[index] = output.detach()

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        columns = [self._column[id(p)] for p in parameters]
        gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters]
        self._row[columns] = torch.stack([gradient.float().norm() for gradient in gradients]).numpy()
        if self._sampling:
            for column, p, gradient in zip(columns, parameters, gradients, strict=True):
                self._before[column] = p.detach().clone()
                self._zeros[column] = float((gradient == 0).float().mean())

    @property
    def _zeros(self) -> np.ndarray[Any, Any]:
        if len(self._samples["zero_fraction"]) == len(self._sampled):
            self._samples["zero_fraction"].append(np.full(len(self._parameters), NOT_MEASURED))
        return self._samples["zero_fraction"][-1]

    def log(self, loss: float) -> None:
        """End the step."""
        if self._sampling:
            self._sample()
        known = self._row[self._row != NOT_MEASURED].astype(float)
        self._metrics["loss"].append(loss)
        self._metrics["lr"].append(float(self._optimizers[0].param_groups[0]["lr"]))
        self._metrics["global_norm"].append(math.sqrt(np.square(known).sum()) if known.size else 0.0)
        self._steps.append(self._row)
        self._row = np.full(len(self._parameters), NOT_MEASURED)

    def _sample(self) -> None:
        _ = self._zeros
        weights, ratios = np.empty(len(self._parameters)), np.full(len(self._parameters), NOT_MEASURED)
        for column, parameter in enumerate(self._parameters):
            weights[column] = float(parameter.detach().norm())
            if column in self._before and weights[column] > 0:
                ratios[column] = float((parameter.detach() - self._before[column]).norm()) / weights[column]
        self._samples["weight_norm"].append(weights)
        self._samples["update_ratio"].append(ratios)
        for name, values in self._module_statistics().items():
            self._samples[name].append(values)
        self._sampled.append(len(self._steps))
        self._before.clear()
        self._outputs.clear()

    def _module_statistics(self) -> dict[str, np.ndarray[Any, Any]]:
        names = ("activation_mean", "activation_std", "saturated_fraction", "dead_fraction")
        found = {name: np.full(len(self._modules), NOT_MEASURED) for name in names}
        for index, output in self._outputs.items():
            module, values = self._modules[index][1], output.float()
            found["activation_mean"][index] = float(values.mean())
            found["activation_std"][index] = float(values.std(correction=0))
            if isinstance(module, (nn.Tanh, nn.Sigmoid)):
                distance = values.abs() if isinstance(module, nn.Tanh) else (2 * values - 1).abs()
                found["saturated_fraction"][index] = float((distance > SATURATED).float().mean())
            if isinstance(module, nn.ReLU):
                units = values.transpose(0, 1).flatten(1) if values.ndim > 1 else values[None]
                found["dead_fraction"][index] = float((units == 0).all(1).float().mean())
        return found

    def batch(self) -> StepBatch:
        """All steps so far."""
        rows = np.array(self._sampled, dtype=np.int64)
        return StepBatch(
            parameters=self.parameters(),
            step=np.arange(len(self._steps)),
            grad_norm=np.array(self._steps, dtype=np.float32),
            metrics={name: np.array(values) for name, values in self._metrics.items()},
            statistics={
                name: Samples(rows, np.array(values, dtype=np.float32)) for name, values in self._samples.items()
            },
            modules=tuple(name for name, _ in self._modules),
        )

    def parameters(self) -> tuple[Parameter, ...]:
        """The columns, layers in order of first use, each with the activation that was called right after it."""
        owner: dict[str, tuple[str, nn.Module]] = {}
        aliases: dict[int, list[str]] = defaultdict(list)
        for module_name, module in self._model.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                owner[f"{module_name}.{name}" if module_name else name] = (module_name, module)
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            aliases[id(parameter)].append(name)
        order = self._order + [module for module in self._model.modules() if module not in self._order]
        depths = {id(m): depth for depth, m in enumerate(m for m in order if not isinstance(m, ACTIVATIONS))}
        following = {id(a): b for a, b in zip(self._order, self._order[1:], strict=False) if isinstance(b, ACTIVATIONS)}
        found = []
        for name, parameter, trainable in zip(self._names, self._parameters, self._trainable, strict=True):
            layer, module = owner[name]
            after = following.get(id(module))
            found.append(
                Parameter(
                    name,
                    shape=tuple(parameter.shape),
                    layer=layer or name,
                    depth=depths[id(module)],
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    kind=type(module).__name__,
                    activation=type(after).__name__ if after is not None else "",
                    aliases=tuple(other for other in aliases[id(parameter)] if other != name),
                    trainable=trainable,
                )
            )
        return tuple(found)
