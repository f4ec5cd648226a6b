"""Before training: one batch tells whether gradients vanish or explode, where, why, and what to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.errors import ModelError
from gradwatch.probes import LayerProbe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: Gradients that change by more than this factor between the first and the last layer are called vanishing or
#: exploding: AUTOTRAINER's bound for vanishing (Zhang et al. 2021, ICSE, section III-B), used in both directions.
MOST_CHANGE = 1e3
#: Above this share of saturated outputs, or of dead units, the activation is named as the cause (DeepDiagnosis, 2022).
MOST_SATURATED = 0.5
MOST_DEAD = 0.7
_SATURATING = ("Sigmoid", "Tanh", "Hardtanh", "Softsign", "Hardsigmoid")
_RELU = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU")


@dataclass(frozen=True)
class Preflight:
    """What `gradwatch.preflight` found.

    Args:
        verdict: `healthy`, `vanishing`, `exploding`, `dead` or `nonfinite`.
        loss: Of the batch.
        layers: In order of first use.
        slope: Change of log gradient per layer towards the output, in nats: positive where gradients shrink on their
            way back to the input. Schoenholz et al. 2017 (Deep information propagation, section 3) show that it is
            constant over depth in a randomly initialised network, with critical initialisation at 0.
        where: The layer that shows it most.
        cause: Why; empty for a healthy model.
        advice: What to do, the best first.
        unused: Parameters that got no gradient from this batch.
    """

    verdict: str
    loss: float
    layers: tuple[LayerProbe, ...]
    slope: float
    where: str = ""
    cause: str = ""
    advice: tuple[str, ...] = ()
    unused: tuple[str, ...] = field(default=())

    @property
    def is_healthy(self) -> bool:
        """Whether nothing speaks against starting the training."""
        return self.verdict == "healthy"

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: its probe, and the gains of the forward and of the backward signal."""
        import pandas as pd

        names = [f.name for f in fields(LayerProbe)]
        frame = pd.DataFrame({name: [getattr(layer, name) for layer in self.layers] for name in names}).set_index(
            "layer"
        )
        frame["forward_gain"] = frame["activation_std"] / frame["activation_std"].shift(1)
        frame["backward_gain"] = frame["output_grad_rms"] / frame["output_grad_rms"].shift(-1)
        return frame

    def to_json(self) -> dict[str, Any]:
        """The result as JSON types, for `watch(preflight=...)`; None for what was not measured."""
        rows = self.to_frame().reset_index().to_dict("records")
        told = {name: getattr(self, name) for name in ("verdict", "loss", "slope", "where", "cause")}
        return {
            **{name: _finite_or_word(value) for name, value in told.items()},
            "advice": list(self.advice),
            "unused": list(self.unused),
            "layers": [{str(name): _finite_or_word(value) for name, value in row.items()} for row in rows],
        }

    def show(self) -> None:
        """Print the verdict and a table of the layers."""
        from gradwatch.reporters.preflight import print_preflight

        print_preflight(self)

    def plot(self) -> Figure:
        """Forward and backward signal over depth."""
        from gradwatch.reporters.preflight import plot_preflight

        return plot_preflight(self)


def _finite_or_word(value: Any) -> Any:
    if isinstance(value, str) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def preflight(model: Any, inputs: Any, targets: Any, loss_fn: Callable[..., Any]) -> Preflight:
    """Check a model with one batch before training it; parameters, buffers, gradients, mode and random state stay.

    Args:
        model: A `torch.nn.Module`, in the mode it is to be checked in, or a built Keras model.
        inputs: One batch: a tensor, or a tuple or mapping of the model's arguments.
        targets: Second argument of `loss_fn`.
        loss_fn: `loss_fn(outputs, targets)`, giving a scalar tensor; or a `keras.losses.Loss`.

    Raises:
        ModelError: The model cannot be checked.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> deep = nn.Sequential(*[part for _ in range(12) for part in (nn.Linear(16, 16), nn.Sigmoid())])
        >>> check = preflight(deep, torch.randn(32, 16), torch.randn(32, 16), nn.functional.mse_loss)
        >>> check.verdict, check.where
        ('vanishing', '0')
    """
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    probe: Callable[..., Any]
    if keras is not None and isinstance(model, keras.Model):
        from gradwatch.backends.keras_probe import probe
    elif torch is not None and isinstance(model, torch.nn.Module):
        from gradwatch.backends.torch_probe import probe
    else:
        raise ModelError(f"'model' must be a torch.nn.Module or a Keras model: {type(model).__name__}")
    loss, layers, norms, names = probe(model, inputs, targets, loss_fn)
    return judge(loss, layers, unused=[name for name in names if name not in norms])


def judge(loss: float, layers: Sequence[LayerProbe], *, unused: Sequence[str] = ()) -> Preflight:
    """The verdict over what a probe measured."""
    measured = [layer for layer in layers if not math.isnan(layer.output_grad_rms)]
    slope = depth_slope([layer.output_grad_rms for layer in measured])
    verdict, where = _verdict(loss, layers, measured, slope)
    cause, advice = _explain(verdict, layers)
    return Preflight(verdict, loss, tuple(layers), slope, where, cause, advice, tuple(unused))


def depth_slope(signal: Sequence[float]) -> float:
    """Least-squares slope of the logarithm over the position, in nats per layer; 0 for fewer than three values.

    Examples:
        >>> round(depth_slope([1e-4, 1e-3, 1e-2, 1e-1]), 3)
        2.303
    """
    values = np.asarray(signal, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(usable) < 3:
        return 0.0
    return float(np.polyfit(usable, np.log(values[usable]), 1)[0])


def _verdict(loss: float, every: Sequence[LayerProbe], layers: Sequence[LayerProbe], slope: float) -> tuple[str, str]:
    broken = [layer for layer in every if not math.isfinite(layer.activation_std) or math.isinf(layer.output_grad_rms)]
    if broken or not math.isfinite(loss):
        return "nonfinite", broken[0].layer if broken else ""
    silent = [layer for layer in layers if layer.output_grad_rms == 0.0]
    if silent:
        return "dead", silent[-1].layer
    change = math.exp(min(abs(slope) * (len(layers) - 1), 700.0))
    if change <= MOST_CHANGE:
        return "healthy", ""
    key = [layer.output_grad_rms for layer in layers]
    return (
        ("vanishing", layers[int(np.argmin(key))].layer)
        if slope > 0
        else ("exploding", layers[int(np.argmax(key))].layer)
    )


def _explain(verdict: str, layers: Sequence[LayerProbe]) -> tuple[str, tuple[str, ...]]:
    """The cause behind a verdict and what to do about it."""
    if verdict == "healthy":
        return "", ()
    saturated = [layer for layer in layers if layer.saturated_fraction > MOST_SATURATED]
    dead = [layer for layer in layers if layer.dead_fraction > MOST_DEAD]
    sigmoid = [layer for layer in layers if layer.activation == "Sigmoid"]
    kaiming = "Kaiming initialisation for the layers before ReLU (torch.nn.init.kaiming_normal_)"
    xavier = "Xavier initialisation with gain 5/3 for the layers before Tanh (torch.nn.init.xavier_normal_)"
    fitting = kaiming if any(layer.activation in _RELU for layer in layers) else xavier
    if verdict == "nonfinite":
        first = next((layer for layer in layers if not math.isfinite(layer.activation_std)), None)
        where = f"the output of {first.layer!r} overflows" if first else "the loss or its gradient is not finite"
        return f"{where} in the first forward pass", (f"{fitting}", "scale the inputs to zero mean and unit variance")
    if verdict == "dead" or dead:
        named = ", ".join(layer.layer for layer in dead[:4]) or "a layer"
        return f"units of {named} are zero on the whole batch, so no gradient passes", (
            "LeakyReLU or PReLU in place of ReLU",
            kaiming,
            "check that no layer is detached and that the loss depends on the whole output",
        )
    if saturated:
        share = max(layer.saturated_fraction for layer in saturated)
        named = _span(saturated)
        return f"activations saturate in {named}: up to {share:.0%} of the outputs are on the flat part", (
            xavier,
            f"ReLU with Kaiming initialisation in place of {saturated[0].activation}",
            "scale the inputs to zero mean and unit variance",
        )
    if verdict == "vanishing" and len(sigmoid) >= 2:
        return f"each of {len(sigmoid)} Sigmoid layers passes on at most a quarter of the gradient", (
            f"LeakyReLU or PReLU in place of Sigmoid in {_span(sigmoid)}",
            "BatchNorm or LayerNorm between the layers",
        )
    size = "small" if verdict == "vanishing" else "large"
    gain = math.exp(-depth_slope([layer.output_grad_rms for layer in layers]))
    return f"the initial weights are too {size}: each layer multiplies the gradient by {gain:.2g} on its way back", (
        fitting,
        "BatchNorm or LayerNorm between the layers",
    )


def _span(layers: Sequence[LayerProbe]) -> str:
    return repr(layers[0].layer) if len(layers) == 1 else f"{layers[0].layer!r} to {layers[-1].layer!r}"
