"""What is timed: the plain loop, what people write by hand, and gradwatch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

import gradwatch as gw
from benchmarks.overhead_training import Step, Training, Variant

#: Larger than any norm: clipping is computed and multiplies by one, as in most steps of a healthy run.
LIMIT = 1e9
#: Steps whose norms fit into the buffer of the bare norms.
RING = 1000


def plain(training: Training, stack: ExitStack) -> Step:
    """The loop without anything."""

    def step() -> None:
        training.backward()
        training.optimizer.step()

    return step


def foreach(training: Training, stack: ExitStack) -> Step:
    """The least that per-parameter norms cost with torch alone: into a buffer, never looked at."""
    parameters = [parameter for _, parameter in training.trained()]
    buffer, count = torch.empty(RING, len(parameters)), iter(range(10**9))

    def step() -> None:
        training.backward()
        norms = torch._foreach_norm([p.grad for p in parameters])  # noqa: SLF001 -- torch has no public name
        buffer[next(count) % RING] = torch.stack(norms)
        training.optimizer.step()

    return step


def items(training: Training, stack: ExitStack) -> Step:
    """The loop that people write: `.item()` per parameter, kept in memory."""
    kept: list[dict[str, float]] = []

    def step() -> None:
        training.backward()
        named = training.model.named_parameters()
        kept.append({name: p.grad.norm().item() for name, p in named if p.grad is not None})
        training.optimizer.step()

    return step


def clip(training: Training, stack: ExitStack) -> Step:
    """`clip_grad_norm_`, which knows one norm only."""

    def step() -> None:
        training.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), LIMIT)
        training.optimizer.step()

    return step


def watched(*, sink: bool = False, **settings: Any) -> Variant:
    """A variant under gradwatch.

    Args:
        sink: Mirror the numbers into TensorBoard as well.
        settings: Of `gradwatch.watch`.
    """

    def variant(training: Training, stack: ExitStack) -> Step:
        sinks = [gw.sinks.TensorBoard(training.folder / "tensorboard")] if sink else []
        run_dir = training.folder / "run"
        watcher = gw.watch(training.model, training.optimizer, run_dir=run_dir, sinks=sinks, **settings)
        stack.callback(watcher.close)

        def step() -> None:
            loss = training.backward()
            training.optimizer.step()
            watcher.log(loss=loss)

        return step

    return variant


#: The plain loop is what the others are divided by; a second one shows the noise.
PLAIN = "plain"
VARIANTS: dict[str, Variant] = {
    PLAIN: plain,
    "plain again": plain,
    "foreach norms": foreach,
    "item loop": items,
    "clip_grad_norm_": clip,
    "gradwatch, record": watched(detectors=[]),
    "gradwatch, record + detect": watched(),
    "gradwatch, record + detect + Clip": watched(actions=[gw.Clip(max_norm=LIMIT)]),
    "gradwatch, all statistics every step": watched(stats_every=1),
    "gradwatch, with activations": watched(activations=True),
    "gradwatch, with TensorBoard": watched(sink=True),
}
