"""Causes of sick gradients: how each is worded, and its remedies in the terms of the framework, the best first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One cause.

    Args:
        words: What is wrong; may hold the fields of `gradwatch.diagnosis.phrases`.
        advice: What to do, the best first; the same fields, and words of the framework. A line is left out when a field
            in it is not known.
    """

    words: str
    advice: tuple[str, ...]


CAUSES: dict[str, Cause] = {
    "learning_rate": Cause(
        "the learning rate is too high{rate_now}{ratio}",
        (
            "use a learning rate of at most {safe_rate}: the loss was at its best with {stable_rate}",
            "lower the learning rate tenfold (gw.DecayLR does it in the running training)",
            "clip to a global norm of {clip}: {below} of your steps are below it ({clip_call})",
            "warm the learning rate up over the first steps and let it decay (cosine or exponential)",
        ),
    ),
    "learning_rate_small": Cause(
        "the learning rate is too low{rate_now}: updates are lost against the size of the weights",
        (
            "raise the learning rate tenfold at a time until an update changes the weights by about 0.1 %",
            "check the scheduler and its warm-up: the rate in force may not be the one you set",
            "use an optimizer with steps of its own scale, such as Adam",
        ),
    ),
    "rate_zero": Cause(
        "the learning rate is exactly 0{earlier_rate}: no update changes a weight",
        (
            "look at the scheduler: its number of steps, its end value, whether it counts epochs or steps",
            "look for code that writes 0 into the optimizer's parameter groups",
            "stop the run here: the steps from then on changed nothing",
        ),
    ),
    "gradients_not_cleared": Cause(
        "gradients are never cleared: since the first step each is added to all before it, so the norm grows and "
        "hardly differs between batches",
        (
            "{zero}",
            "if you accumulate on purpose: clear after every update, and divide the loss by the number of batches",
        ),
    ),
    "weight_decay": Cause(
        "weight decay rules the weights: every layer is scaled by the same factor at each step",
        (
            "reduce weight decay: learning rate times decay should be far below 0.01",
            "exempt biases and norms from decay",
        ),
    ),
    "init_large": Cause(
        "the initial weights are too large: the gain of the layers enlarges the signal{gain}",
        (
            "initialise for the activation: {kaiming} for ReLU layers, {xavier} for tanh and sigmoid",
            "put {norm} between the layers",
            "clip to a global norm of 1.0 while it settles ({clip_call})",
            "try gw.preflight on one batch: it shows the gain of every layer",
        ),
    ),
    "init_small": Cause(
        "the initial weights are too small: the gain of the layers shrinks the signal{gain}",
        (
            "initialise {layers} with {kaiming}",
            "put {norm} between the layers, or add shortcuts around them",
            "try gw.preflight on one batch: it shows the gain of every layer",
        ),
    ),
    "layer_scale": Cause(
        "{odd} was initialised, loaded or scaled unlike the other layers: its weights are {odd_times} than theirs",
        (
            "initialise {odd} like the other layers, with {kaiming}; look for code that scales or loads its weights",
            "put {norm} after it",
            "try gw.preflight on one batch: it shows the gain of every layer",
        ),
    ),
    "saturating_activation": Cause(
        "a saturating activation{activation} in {depth}: its slope is at most {slope} and nearly 0 at its ends",
        (
            "replace {activation_name} in {layers} by {leaky}, with {kaiming}",
            "put {norm} before each {activation_name}",
            "scale inputs to mean 0 and variance 1",
            "use {logits} instead of a saturated output",
        ),
    ),
    "activation": Cause(
        "an exponential activation overflows",
        (
            "replace it by ReLU with {kaiming}, or by softplus where outputs must be positive",
            "clamp its input, at 20 say",
        ),
    ),
    "dying_relu": Cause(
        "ReLU units are negative for every input and get no gradient",
        (
            "replace ReLU in {layers} by {leaky}",
            "lower the learning rate{rate_now}: one large step is enough to kill units",
            "initialise with {kaiming} and small positive or zero biases",
            "reset the dead layers: gw.Reinitialize does it in the running training",
        ),
    ),
    "weights_replaced": Cause(
        "{replaced} changed from outside {between}, far more than the optimizer's updates could",
        (
            "look for what writes to it there: a loaded checkpoint, weights set by hand, an average swapped in",
            "go back to weights from before: gw.Rollback, or the last checkpoint",
            "reset the dead layers: gw.Reinitialize does it in the running training",
        ),
    ),
    "killed_units": Cause(
        "the learning rate is too high{rate_now}: large steps pushed ReLU units below zero, where they get no gradient",
        (
            "use a learning rate of at most {safe_rate}: the loss was at its best with {stable_rate}",
            "lower the learning rate tenfold and clip to a global norm of {clip} ({clip_call})",
            "replace ReLU in {layers} by {leaky}",
            "reset the dead layers: gw.Reinitialize does it in the running training",
        ),
    ),
    "recurrence": Cause(
        "the recurrent matrix multiplies the gradient at every time step: its spectral radius is not near 1",
        (
            "initialise the recurrent matrix orthogonal (scaled by 1 for tanh, the identity for ReLU)",
            "use an LSTM or GRU",
            "clip to a global norm of 1.0 ({clip_call})",
            "shorten the sequences or truncate backpropagation through time",
        ),
    ),
    "missing_normalisation": Cause(
        "without normalisation the signal grows from block to block",
        ("put {norm} in every block", "start the last layer of every residual branch at zero", "{clip_call}"),
    ),
    "attention_logits": Cause(
        "attention logits are too large: the softmax is all but one-hot, and its gradient vanishes or leaps",
        (
            "scale logits by 1/sqrt(head size) and normalise queries and keys",
            "initialise query and key weights smaller (standard deviation 0.02)",
            "clip to a global norm of 1.0 and warm the learning rate up ({clip_call})",
        ),
    ),
    "bad_batch": Cause(
        "a bad batch at step {steps}: nothing led up to it",
        (
            "look at the samples of {steps_of}: NaN, missing values coded as numbers, wrong scale",
            "leave such steps out: gw.SkipStep() keeps the weights as they were",
            "clip to a global norm of {clip}: {below} of your steps are below it ({clip_call})",
            "{recurrence}",
        ),
    ),
    "half_overflow": Cause(
        "float16 overflow: numbers above 65504 become infinite",
        (
            "use bfloat16, which has the range of float32",
            "let a gradient scaler choose the loss scale (torch.amp.GradScaler, keras LossScaleOptimizer)",
            "keep softmax, norms and the loss in float32",
        ),
    ),
    "half_underflow": Cause(
        "half precision is too coarse: small numbers flush to zero, or updates round to nothing",
        (
            "keep the weights in float32 and only compute in half precision (autocast)",
            "scale the loss (torch.amp.GradScaler, keras LossScaleOptimizer)",
            "use stochastic rounding or a larger learning rate for weights that must stay in half precision",
        ),
    ),
    "loss_domain": Cause(
        "log(0), a root or a division by zero in the loss",
        (
            "use {logits}: it never takes the logarithm of a rounded probability",
            "add an epsilon inside log, sqrt and divisions, or clamp their arguments",
            "find the operation: torch.autograd.detect_anomaly() for one step",
        ),
    ),
    "inner_gradient": Cause(
        "an operation inside the network has no finite slope: the gradient is finite down to {last_finite}, and NaN or "
        "infinite from {first_bad} on",
        (
            "look at what follows {first_bad} in forward: sqrt, norm or log of 0, a division by 0, exp that overflows",
            "add an epsilon inside it or clamp its input (torch.where does not help: its other branch is computed)",
            "find the operation: torch.autograd.detect_anomaly() for one step",
        ),
    ),
    "unused_layers": Cause(
        "unused layers: nothing of {layers} reaches the loss",
        (
            "call them in forward, or remove them from the optimizer",
            "look for {detach} between them and the loss",
            "set requires_grad=False if they are frozen on purpose",
        ),
    ),
    "output_layer": Cause(
        "the output layer is constant, zero, or does not pass a gradient (such as a softmax over one unit, or a ReLU)",
        (
            "use a sigmoid for one output, a softmax only for two or more",
            "use {logits}",
            "check that the activation of the last layer can reach the targets (ReLU cannot be negative)",
        ),
    ),
    "data_scale": Cause(
        "the learning rate is too high for the scale of the gradient (first loss {first_loss}, first gradient norm "
        "{first_norm}): inputs or targets are not scaled, or the loss is a sum",
        (
            "scale inputs and targets to mean 0 and variance 1",
            "put a normalisation layer first",
            "take the mean of the loss over the batch, not the sum",
            "lower the learning rate in proportion to the gradient",
        ),
    ),
    "drift": Cause(
        "one part of the network leaves the course of the others, step by step",
        (
            "look at {layers}: its learning rate, its loss term, its inputs over time",
            "clip by layer ({clip_call}) until the reason is found",
            "put {norm} before it",
        ),
    ),
    "plateau": Cause(
        "nothing in the gradients explains it: the model may have reached what it can learn, or the labels hold no "
        "signal",
        (
            "lower or raise the learning rate threefold",
            "check that labels and inputs belong together",
            "try a larger model",
        ),
    ),
}
