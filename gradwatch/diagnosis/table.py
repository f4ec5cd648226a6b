"""The decision table: the first row whose rule and tests fit names the cause."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gradwatch.diagnosis.causes import CAUSES
from gradwatch.diagnosis.phrases import advice_for, wording_of
from gradwatch.diagnosis.symptoms import Symptoms
from gradwatch.records import Finding

BLOW_UP = ("exploding", "divergence", "update_ratio", "spike", "oscillation", "imbalance")
SILENCE = ("vanishing", "dead", "stall", "plateau", "saturation", "dying_relu", "imbalance")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        cause: Key of `CAUSES`.
        rules: The finding's rule is one of these.
        when: All of these tests of `Symptoms` hold; `not` before a name negates it.
        sign: The finding's sign is one of these; empty for any.
        why: What makes these symptoms mean this cause.
    """

    cause: str
    rules: tuple[str, ...]
    when: tuple[str, ...] = ()
    sign: tuple[str, ...] = ()
    why: str = ""


TABLE: tuple[Row, ...] = (
    # Numbers that are not numbers.
    Row("half_overflow", ("nonfinite",), ("clipped_by_scaler",), why="no loss scale gives finite gradients"),
    Row("half_overflow", ("nonfinite",), ("half",), why="float16 ends at 65504"),
    Row("activation", ("nonfinite",), ("at_start", "exponential"), why="exp overflows above 88 in float32"),
    Row("recurrence", ("nonfinite",), ("at_start", "recurrent"), why="powers of the recurrent matrix overflow"),
    Row("output_layer", ("nonfinite",), ("at_start", "output_relu", "loss_not_finite"), why="all outputs 0: log(0)"),
    Row("init_large", ("nonfinite",), ("at_start", "deep"), why="the forward signal overflows before any update"),
    Row("data_scale", ("nonfinite",), ("at_start", "huge_first_loss"), why="a loss that starts high"),
    Row("init_large", ("nonfinite",), ("at_start", "not grew_before"), why="no update was made yet"),
    Row("attention_logits", ("nonfinite",), ("attention", "grew_before", "not jumped"), why="logits grow unchecked"),
    Row("weight_decay", ("nonfinite",), ("weights_move_alike",), why="only decay scales all layers alike"),
    Row("gradients_not_cleared", ("nonfinite",), ("grew_before", "gradients_pile_up")),
    Row("data_scale", ("nonfinite",), ("grew_before", "inputs_unscaled", "large_first_gradient")),
    Row("data_scale", ("nonfinite",), ("grew_before", "large_first_gradient", "huge_first_loss", "ordinary_weights")),
    Row("init_large", ("nonfinite",), ("grew_before", "large_first_gradient", "deep")),
    Row("recurrence", ("nonfinite",), ("grew_before", "large_first_gradient", "recurrent")),
    Row("data_scale", ("nonfinite",), ("grew_before", "large_first_gradient", "huge_first_loss")),
    Row("learning_rate", ("nonfinite",), ("grew_before",), why="it grew before it overflowed"),
    Row("inner_gradient", ("nonfinite",), ("begins_inside",), why="the layers after it have finite gradients"),
    Row("loss_domain", ("nonfinite",), ("loss_was_tiny",), why="a probability has rounded to 0 or 1: log(0)"),
    Row("loss_domain", ("nonfinite",), ("gradient_not_finite",), why="a finite loss with an infinite slope"),
    Row("bad_batch", ("nonfinite",), (), why="nothing led up to it"),
    # Gradients or the loss out of hand.
    Row("attention_logits", BLOW_UP, ("odd_attention",), why="queries and keys out of scale: a one-hot softmax"),
    Row("layer_scale", (*BLOW_UP, "vanishing", "stall"), ("odd_scale",), why="one layer unlike its peers"),
    Row("gradients_not_cleared", BLOW_UP, ("gradients_pile_up",), why="batches differ but their gradients do not"),
    Row("weight_decay", (*BLOW_UP, *SILENCE), ("weights_move_alike",), why="only decay scales all layers alike"),
    Row("learning_rate", BLOW_UP, ("rate_jumped", "not at_start"), why="the rate leapt just before"),
    Row("bad_batch", ("spike",), (), why="one step, before and after which all is usual"),
    Row(
        "bad_batch", ("exploding", "divergence", "update_ratio"), ("not at_start", "sudden"), why="a spike at that step"
    ),
    Row("init_large", ("imbalance", "exploding"), ("grows_with_depth", "not recurrent"), why="each layer enlarges it"),
    Row("learning_rate", BLOW_UP, ("rate_rising", "not at_start"), why="trouble came with a rising rate"),
    Row("recurrence", BLOW_UP, ("recurrent", "at_start", "large_first_gradient"), why="powers of the recurrent matrix"),
    Row("data_scale", BLOW_UP, ("large_first_gradient", "inputs_unscaled"), why="large inputs enter the first layer"),
    Row("missing_normalisation", BLOW_UP, ("large_first_gradient", "very_deep", "not normalised")),
    Row("data_scale", BLOW_UP, ("large_first_gradient", "huge_first_loss", "ordinary_weights")),
    Row("init_large", BLOW_UP, ("large_first_gradient", "deep"), why="a huge first gradient in a deep network"),
    Row("data_scale", BLOW_UP, ("large_first_gradient", "huge_first_loss"), why="targets far from the outputs"),
    Row("attention_logits", BLOW_UP, ("attention_first", "few_layers_jumped"), why="a one-hot softmax"),
    Row("init_large", BLOW_UP, ("at_start", "grows_with_depth"), why="each layer enlarges it"),
    Row(
        "drift",
        ("exploding", "vanishing"),
        ("drifted", "not diverges"),
        why="one layer leaves the course of the others",
    ),
    Row("learning_rate", (*BLOW_UP, "oscillation"), ("jumped",), why="steps of the size of the weights"),
    Row("learning_rate", ("imbalance",), ("not shrinks_with_depth",), why="nothing else explains it"),
    Row("learning_rate", tuple(rule for rule in BLOW_UP if rule != "imbalance"), (), why="nothing else explains it"),
    # Gradients that are too small or absent.
    Row("unused_layers", ("unused",), ()),
    Row("rate_zero", ("stall",), (), ("rate",), why="nothing times a gradient is nothing"),
    Row("weights_replaced", ("dead", "dying_relu"), ("replaced_weights", "not sudden"), why="no update is so large"),
    Row("half_overflow", ("underflow",), (), ("scale",), why="only a loss scale below 1 gives finite gradients"),
    Row("half_underflow", ("underflow",), ()),
    Row("init_small", ("stall",), ("tiny_first_gradient", "deep"), why="the signal was gone before the first step"),
    Row("half_underflow", ("stall",), ("rounded",), why="updates below the resolution of the weights"),
    Row("learning_rate_small", ("stall",), ("everywhere", "tiny_rate"), why="nothing moves at such a rate"),
    Row("output_layer", ("dead", "vanishing", "plateau"), ("one_output",), why="a softmax over one unit is 1"),
    Row("init_small", SILENCE, ("weights_zero", "zero_from_start"), why="zero weights pass no signal"),
    Row("data_scale", SILENCE, ("inputs_unscaled", "jumped", "not bounded"), why="large inputs, then dead units"),
    Row("learning_rate", SILENCE, ("jumped", "not zero_from_start", "not shrinks_with_depth"), why="a step too far"),
    Row("saturating_activation", ("dead",), ("all_zero", "zero_from_start", "output_bounded"), why="a flat output"),
    Row(
        "unused_layers", ("dead",), ("zero_from_start", "not all_zero", "not reaches_first_layer"), why="a side branch"
    ),
    Row(
        "dying_relu", ("dead", "dying_relu", "vanishing"), ("relu", "zero_from_start"), why="units negative from birth"
    ),
    Row("dying_relu", ("dead", "dying_relu"), ("output_relu",), why="an output that cannot reach its targets"),
    Row("killed_units", ("dead", "dying_relu"), ("relu",), why="units die of steps that are too large"),
    Row("unused_layers", ("dead",), ("zero_from_start", "not all_zero"), why="multiplied by zero somewhere"),
    Row("killed_units", ("dying_relu",), ("not zero_from_start",), why="units die of steps that are too large"),
    Row("dying_relu", ("dying_relu",)),
    Row("saturating_activation", ("saturation",), ()),
    Row("saturating_activation", SILENCE, ("bounded",), why="a sigmoid passes on at most a quarter"),
    Row("saturating_activation", SILENCE, ("saturates",), why="flat ends of the activation"),
    Row("recurrence", ("vanishing",), ("recurrent", "at_start"), why="powers of the recurrent matrix"),
    Row("init_small", ("vanishing", "imbalance"), ("shrinks_with_depth",), why="every layer shrinks the signal"),
    Row("dying_relu", SILENCE, ("units_die",), why="units that never fire"),
    Row("learning_rate_small", ("stall",), (), why="a gradient is there, updates are not"),
    Row("saturating_activation", ("vanishing",), ("output_bounded",), ("collapse",), why="a saturated output"),
    Row("output_layer", ("dead", "vanishing"), (), ("", "collapse"), why="nothing reaches the weights"),
    Row("init_small", ("vanishing",), ("deep",), ("depth",), why="every layer shrinks the signal"),
    Row("plateau", ("plateau",), ()),
)


def cause_of(symptoms: Symptoms) -> str:
    """Key of `CAUSES` of the likely cause; empty when no row fits."""
    for row in TABLE:
        fits = symptoms.finding.rule in row.rules and (not row.sign or symptoms.sign in row.sign)
        if fits and all(symptoms.holds(test) for test in row.when):
            return row.cause
    return ""


def diagnosed(symptoms: Symptoms, *, framework: str = "") -> Finding:
    """The finding with its cause and ranked advice; unchanged where it has a cause already or none fits."""
    finding = symptoms.finding
    key = "" if finding.cause else cause_of(symptoms)
    if key not in CAUSES:
        return finding
    cause = wording_of(CAUSES[key], symptoms)
    advice = advice_for(CAUSES[key], symptoms, framework=framework)
    return dataclasses.replace(finding, cause=cause, advice=advice, evidence={**finding.evidence, "cause_id": key})
