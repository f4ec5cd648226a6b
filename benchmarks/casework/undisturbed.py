"""Would a policy do anything to a recorded run? Where it would not, the watched run is the recorded one bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.casework.case import Case
from benchmarks.casework.recording import load, record
from gradwatch.actions.base import Action, InStepAction
from gradwatch.actions.policy import Policy
from gradwatch.backends.torch_decide import Decider
from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine


def is_left_alone(case: Case, seed: int, actions: str | list[Action]) -> bool:
    """Whether nothing is clipped, skipped or due at any step of the recorded run.

    The norms are those that the run's own steps had. Runs of several optimizers are not looked at: each has norms of
    its own. Nor are actions that look at single weights.
    """
    policy = Policy(actions)
    if any(action.by_unit or action.clip_value for action in policy.in_step):
        return False
    training, batch = case.build(seed), load(record(case, seed)).batch
    if isinstance(training.optimizer, list) or len(batch) < training.steps:
        return False
    engine, decider = Engine("default", RunContext(batch.parameters, framework="torch")), Decider(policy.in_step)
    for row in batch.split(1):
        verdict = decider.decide(row.grad_norm[0], _nothing)
        if bool(verdict.skip) or float(verdict.coefficient) != 1.0 or not np.isfinite(float(verdict.norm)):
            return False
        if not policy.between:
            continue
        due = policy.decide(int(row.step[0]) + 1, engine.update(row), row.metric("loss"))
        if due is not None or policy.take_news():
            return False
    return True


def _nothing(action: InStepAction, norms: Any) -> Any:
    """There are no units in a record."""
    return norms
