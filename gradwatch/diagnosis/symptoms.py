"""What the diagnosis looks at: a finding, the model's parameters, and the state of the run when it was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradwatch.records import Finding, Parameter

BOUNDED = ("Sigmoid", "Tanh", "Softsign", "Hardtanh", "Hardsigmoid", "LogSigmoid", "Softmax")
RELU = ("ReLU", "ReLU6", "relu")
RECURRENT = ("rnn", "lstm", "gru", "recur", "cell.", "_hh")
ATTENTION = ("attn", "attention", "qkv", "q_proj", "query")
HALF = ("float16", "half")


@dataclass(frozen=True)
class Symptoms:
    """The evidence for a diagnosis. Numbers are NaN where not known.

    Args:
        finding: What was found.
        parameters: Of the whole model, in column order.
        others: The latest state of the other findings of the run, by rule; at most one a rule.
        rate: Learning rate in force.
        rate_growth: Its growth per step, nats.
        rate_jump: Highest learning rate of the last 20 steps over their median.
        rate_base, rate_base_step: The scheduler's rate before it last began to rise, and the last step with it.
        earlier_rate: The last learning rate above 0.
        stable_rate: The learning rate that led to the best loss.
        update_ratio: ‖Δw‖/‖w‖ over all matrices at the last sample.
        update_spread: Largest over smallest layer's update ratio at the last sample.
        first_norm: Global gradient norm of the first step.
        first_matrix_norm: The same over parameters of two or more dimensions.
        usual_norm: Robust mean of the global norm now.
        norm_rise: How far the last global norm was above it, nats.
        steady_share: Share of the steps at which the global norm changed far less from batch to batch than the loss.
        norm_quantile: The norm that 95 % of the steps stayed below.
        below_one: Share of the steps whose global norm was below 1.
        first_drop: How far the first step's gradients fell from output to input along a straight line, nats; negative
            where they grew.
        first_fit: R squared of that line.
        first_input_ratio: Gradient norm of the first layer over the second's at the first step.
        first_loss: Loss at the start.
        least_loss: The least loss lately, over the loss at the start.
        odd_layer: The layer whose weights are out of scale; empty where none is.
        odd_factor: Their scale over that of its peers.
        usual_scale: The median scale of the layers' weights, as in `detectors.scales`; 1.41 after He initialisation.
        replaced: Parameters that changed from outside between two samples, taken after steps `replaced_at`.
        zero_weights: Layers whose weights were all zero.
        saturated, dead: Modules with mostly saturated, or never active units.
        step: The step of the diagnosis.
    """

    finding: Finding
    parameters: tuple[Parameter, ...]
    others: Mapping[str, Finding] = field(default_factory=dict)
    rate: float = math.nan
    rate_growth: float = 0.0
    rate_jump: float = 1.0
    rate_base: float = math.nan
    rate_base_step: int = 0
    earlier_rate: float = math.nan
    stable_rate: float = math.nan
    update_ratio: float = math.nan
    update_spread: float = math.nan
    first_norm: float = math.nan
    first_matrix_norm: float = math.nan
    usual_norm: float = math.nan
    norm_rise: float = math.nan
    steady_share: float = 0.0
    norm_quantile: float = math.nan
    below_one: float = math.nan
    first_drop: float = 0.0
    first_fit: float = 0.0
    first_input_ratio: float = math.nan
    first_loss: float = math.nan
    least_loss: float = math.nan
    odd_layer: str = ""
    odd_factor: float = 1.0
    usual_scale: float = math.nan
    replaced: tuple[str, ...] = ()
    replaced_at: tuple[int, int] = (0, 0)
    zero_weights: tuple[str, ...] = ()
    saturated: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    step: int = 0

    @property
    def evidence(self) -> Mapping[str, Any]:
        """The finding's own numbers."""
        return self.finding.evidence

    @property
    def sign(self) -> str:
        """Which of its rule's signs opened the finding."""
        return str(self.evidence.get("sign", ""))

    @cached_property
    def affected(self) -> tuple[Parameter, ...]:
        """Parameters of the finding's layers; all where it names none."""
        layers = set(self.finding.layers)
        chosen = tuple(p for p in self.parameters if p.layer in layers)
        return chosen or self.parameters

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The model's layers, by depth."""
        return tuple(dict.fromkeys(p.layer for p in sorted(self.parameters, key=lambda p: p.depth)))

    def following(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The affected layers that one of these activations follows."""
        return tuple(dict.fromkeys(p.layer for p in self.affected if p.activation in names))

    @property
    def at_start(self) -> bool:
        """The condition held from the first steps on."""
        return self.finding.first_step <= 2

    @property
    def deep(self) -> bool:
        """Eight layers or more."""
        return len(self.layers) >= 8

    @property
    def very_deep(self) -> bool:
        """Thirty layers or more."""
        return len(self.layers) >= 30

    @property
    def sudden(self) -> bool:
        """A spike of the gradient at the same step, with nothing before it."""
        spike = self.others.get("spike")
        near = spike is not None and spike.severity != "info" and abs(spike.first_step - self.finding.first_step) <= 12
        return near and not self.rate_rising

    @property
    def few_layers_jumped(self) -> bool:
        """The update was large in some layers and small over all."""
        update = self.finding if self.finding.rule == "update_ratio" else self.others.get("update_ratio")
        numbers = update.evidence if update is not None else {}
        return bool(numbers.get("largest_ratio", 0.0) > 10 * numbers.get("ratio", math.inf))

    @property
    def bounded(self) -> bool:
        """Most affected layers end in a sigmoid, tanh or the like."""
        known = [p for p in self.affected if p.activation]
        return bool(known) and sum(p.activation in BOUNDED for p in known) > 0.5 * len(known)

    @property
    def relu(self) -> bool:
        """ReLU follows some of the affected layers."""
        return bool(self.following(RELU))

    @property
    def exponential(self) -> bool:
        """An exponential serves as an activation."""
        return any(p.activation.lower() in ("exp", "exponential") for p in self.parameters)

    @property
    def recurrent(self) -> bool:
        """The model has a recurrence."""
        return any(mark in f"{p.kind} {p.name}".lower() for p in self.parameters for mark in RECURRENT)

    @property
    def attention(self) -> bool:
        """The model has attention."""
        return any("Attention" in p.kind or any(m in p.name.lower() for m in ATTENTION) for p in self.parameters)

    @property
    def attention_first(self) -> bool:
        """The gradient is worst in attention, or behind it in the direction of the gradient, from the start."""
        return self.attention and self.finding.first_step <= 20

    @property
    def normalised(self) -> bool:
        """The model has normalisation layers."""
        return any("Norm" in p.kind for p in self.parameters)

    @property
    def half(self) -> bool:
        """Affected parameters are float16."""
        return any(p.dtype in HALF for p in self.affected)

    @property
    def rounded(self) -> bool:
        """Updates of coarse data types are rounded away."""
        return bool(self.evidence.get("rounded"))

    @property
    def rate_rising(self) -> bool:
        """The learning rate rises, or has risen well above the one at which the loss was best."""
        return self.rate_growth > 0.002 or self.rate > 1.5 * self.stable_rate

    @property
    def jumped(self) -> bool:
        """Steps replaced a large part of the weights."""
        return "update_ratio" in self.others or self.finding.rule == "update_ratio" or self.update_ratio > 0.3

    @property
    def grew_before(self) -> bool:
        """The run was out of hand before this."""
        earlier = {"exploding", "divergence", "update_ratio", "oscillation"} & self.others.keys()
        return bool(earlier) or self.norm_rise > math.log(10)

    @property
    def large_first_gradient(self) -> bool:
        """The very first gradient is huge for the weights' size."""
        return self.first_norm > 100

    @property
    def everywhere(self) -> bool:
        """All layers are concerned."""
        return bool(self.finding.evidence.get("everywhere"))

    @property
    def tiny_rate(self) -> bool:
        """The learning rate is below all that is in use."""
        return 0 < self.rate < 1e-6

    @property
    def tiny_first_gradient(self) -> bool:
        """The very first gradient is next to nothing for the size of the loss."""
        return self.first_matrix_norm < 0.01 * abs(self.first_loss)

    @property
    def gradients_pile_up(self) -> bool:
        """The norm has grown, and mostly changed far less from step to step than the loss: gradients are summed."""
        return self.usual_norm > 2 * self.first_norm and self.steady_share > 0.5

    @property
    def drifted(self) -> bool:
        """One layer left the course of the others step by step."""
        return bool(self.evidence.get("drifted"))

    @property
    def grows_with_depth(self) -> bool:
        """At the first step gradients grew clearly from the output to the input, along a line."""
        return self.first_drop < -math.log(30) and self.first_fit > 0.7

    @property
    def shrinks_with_depth(self) -> bool:
        """At the first step gradients shrank clearly from the output to the input."""
        return self.first_drop > math.log(100)

    @property
    def inputs_unscaled(self) -> bool:
        """The first layer's gradient stands far above the next one's: its inputs are large."""
        return self.first_input_ratio > 8

    @property
    def huge_first_loss(self) -> bool:
        """The loss begins in the hundreds or above."""
        return abs(self.first_loss) > 100

    @property
    def loss_was_tiny(self) -> bool:
        """The loss had fallen to a hundredth or less."""
        return self.least_loss < 0.02

    @property
    def loss_not_finite(self) -> bool:
        """The loss itself is NaN or infinite."""
        return self.evidence.get("where") == "loss"

    @property
    def gradient_not_finite(self) -> bool:
        """The loss is finite but its gradient is not."""
        return self.evidence.get("where") == "gradient"

    @property
    def last_finite(self) -> str:
        """The layer after the first bad one, where its gradient was still finite; empty where there is none."""
        place = {name: i for i, name in enumerate(self.layers)}
        first_bad = place.get(str(self.evidence.get("first_bad_layer")), len(place))
        finite = [name for name in self.evidence.get("finite_layers", ()) if place.get(name, -1) > first_bad]
        return min(finite, key=place.__getitem__, default="")

    @property
    def begins_inside(self) -> bool:
        """The gradient is finite in layers after the first bad one."""
        return self.gradient_not_finite and bool(self.last_finite)

    @property
    def odd_scale(self) -> bool:
        """The weights of one layer are out of scale."""
        return bool(self.odd_layer)

    @property
    def odd_attention(self) -> bool:
        """The weights of attention are too large."""
        return self.odd_factor > 1 and any(mark in self.odd_layer.lower() for mark in ATTENTION)

    @property
    def ordinary_weights(self) -> bool:
        """Most layers' weights are no larger than an ordinary initialisation makes them."""
        return self.usual_scale < 1.8

    @property
    def replaced_weights(self) -> bool:
        """Weights changed far more than updates could."""
        return bool(self.replaced)

    @property
    def recurs(self) -> bool:
        """The same happened before."""
        return len(self.evidence.get("steps", ())) > 1

    @property
    def weights_move_alike(self) -> bool:
        """All layers are scaled by the same factor at each step: weight decay does that, gradients do not."""
        replaced = 0.9 < self.update_ratio < 1.1
        return self.update_spread < 1.03 and self.update_ratio > 0.01 and not replaced and len(self.layers) > 1

    @property
    def all_zero(self) -> bool:
        """Every gradient is exactly zero."""
        return bool(self.evidence.get("all_layers"))

    @property
    def zero_from_start(self) -> bool:
        """So since the first step."""
        return bool(self.evidence.get("from_start")) or (self.finding.rule == "dying_relu" and self.at_start)

    @property
    def reaches_first_layer(self) -> bool:
        """The first layer is among the affected: whatever stops the gradient stops it for all layers before."""
        return bool(self.layers) and self.layers[0] in self.finding.layers

    @property
    def output_relu(self) -> bool:
        """The last layer ends in a ReLU."""
        last = max(self.parameters, key=lambda p: p.depth, default=None)
        return last is not None and last.activation in RELU

    @property
    def diverges(self) -> bool:
        """The loss was found to diverge."""
        return "divergence" in self.others

    @property
    def rate_jumped(self) -> bool:
        """The learning rate leapt within the last 20 steps."""
        return self.rate_jump > 3

    @property
    def weights_zero(self) -> bool:
        """Weights begin at zero."""
        return bool(self.zero_weights)

    @property
    def one_output(self) -> bool:
        """The last layer has a single unit behind a softmax, whose output is always one."""
        last = max(self.parameters, key=lambda p: p.depth, default=None)
        if last is None or last.activation != "Softmax":
            return False
        return any(1 in (p.shape[0], p.shape[-1]) for p in self.parameters if p.layer == last.layer and p.shape)

    @property
    def saturates(self) -> bool:
        """Units were seen at the flat ends of their activation."""
        return bool(self.saturated) or self.finding.rule == "saturation"

    @property
    def output_bounded(self) -> bool:
        """The last layer ends in a sigmoid, tanh or softmax."""
        last = max(self.parameters, key=lambda p: p.depth, default=None)
        return last is not None and last.activation in BOUNDED

    @property
    def units_die(self) -> bool:
        """Units were seen that never fire."""
        return bool(self.dead) or self.finding.rule == "dying_relu"

    @property
    def clipped_by_scaler(self) -> bool:
        """A gradient scaler skips step after step."""
        return self.evidence.get("skipped") == "grad_scaler"

    def holds(self, test: str) -> bool:
        """Whether a test of the table holds: the name of a property, or `not` and the name."""
        return not getattr(self, test[4:]) if test.startswith("not ") else bool(getattr(self, test))

    def __iter__(self) -> Iterator[str]:
        """The names of all tests that hold, for people who wonder about a verdict."""
        return (n for n, v in vars(type(self)).items() if isinstance(v, property) and getattr(self, n) is True)
