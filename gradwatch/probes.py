"""What one batch shows of a model before training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class LayerProbe:
    """What one batch shows of a layer, before training.

    Args:
        layer: Name.
        kind: Type of the module.
        activation: Type of the activation behind it; empty where none was seen.
        activation_mean: Mean of its output, behind the activation.
        activation_std: Standard deviation of the same.
        saturated_fraction: Share of outputs on the flat parts of a bounded activation.
        dead_fraction: Share of ReLU units that are zero on the whole batch.
        output_grad_rms: Root mean square of the loss gradient with respect to the layer's output.
        grad_norm: Norm of the gradient of its parameters.
    """

    layer: str
    kind: str = ""
    activation: str = ""
    activation_mean: float = math.nan
    activation_std: float = math.nan
    saturated_fraction: float = math.nan
    dead_fraction: float = math.nan
    output_grad_rms: float = math.nan
    grad_norm: float = math.nan
