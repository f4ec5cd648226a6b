"""One copy of a model in training, which every variant of the overhead benchmark gets for itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.overhead_models import CASES, Case

Step = Callable[[], None]
#: Makes the step of a variant; what is to be closed afterwards goes on the stack.
Variant = Callable[["Training", ExitStack], Step]


@dataclass
class Training:
    """One copy of a model with its optimizer and batch.

    Args:
        case: Which model.
        model: Its copy.
        optimizer: AdamW over what is trained.
        inputs: The batch, the same at every step.
        targets: Its targets.
        folder: Where a variant may write; whoever made the training removes it.
    """

    case: Case
    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    folder: Path

    @classmethod
    def of(cls, name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Training:
        """The same for every variant.

        Args:
            name: Of `CASES`.
            folder: For files.
            dtype: Type of parameters and floating-point inputs.
        """
        torch.manual_seed(0)
        case = CASES[name]
        model = case.build().to(dtype)
        inputs, targets = (t.to(dtype) if t.is_floating_point() else t for t in case.batch())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(case, model, torch.optim.AdamW(trained, lr=1e-5), inputs, targets, folder)

    def backward(self) -> Tensor:
        """The loss, its gradients in place."""
        self.optimizer.zero_grad()
        loss = self.case.loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, with their names."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
