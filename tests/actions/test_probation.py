"""Remedies that did worse than what they replaced are taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch as gw
from gradwatch.actions import Ladder, RaiseLR, Reinitialize, Restructure, Rollback
from gradwatch.actions.policy import Policy
from gradwatch.records import Finding, StepBatch
from tests.actions.test_between_steps import rings
from tests.actions.test_policy import acts, outcomes, sick

STALL = {"cause_id": "learning_rate_small", "ratio": 1e-8, "everywhere": True}


def renewed(loss: float, *, within: int = 20) -> tuple[Policy, list[str]]:
    """A network of loss 1 gets new weights at step 11, whose loss is this one."""
    policy = Policy([Reinitialize(confirm=0, within=within)])
    done = acts(policy, range(1, 12), {11: sick("dead")}, loss=1.0)
    return policy, done + acts(policy, range(12, 200), {150: sick("dead", step=150)}, loss=loss)


def test_new_weights_that_stay_worse_are_taken_back_and_not_drawn_again() -> None:
    policy, done = renewed(2.0)

    assert done == ["11 Reinitialize", "31 Reinitialize"]
    assert outcomes(policy)["Reinitialize-11-1"] == "worse"
    assert policy.state.undone == ["Reinitialize"]


def test_new_weights_as_good_as_the_old_stay() -> None:
    policy, done = renewed(1.2)

    assert (done[0], policy.state.undone) == ("11 Reinitialize", [])
    assert "31 Reinitialize" not in done


def test_new_weights_that_learn_get_time() -> None:
    policy = Policy([Reinitialize(confirm=0, within=40)])
    acts(policy, range(1, 12), {11: sick("dead")}, loss=1.0)

    done = [policy.decide(step, [], [9.0 * 0.99 ** (step - 12)]) for step in range(12, 200)]

    assert [due for due in done if due is not None] == []


def test_second_new_weights_are_held_against_the_first_old_ones() -> None:
    policy = Policy([Reinitialize(confirm=0, within=20, cooldown=0)])
    done = acts(policy, range(1, 12), {11: sick("dead")}, loss=1.0)

    done += acts(policy, range(12, 60), {13: sick("dead", step=13)}, loss=1.45)
    done += acts(policy, range(60, 61), loss=1.45)

    assert [step.split()[1] for step in done] == ["Reinitialize"] * 2
    assert policy.state.undone == []


def test_another_architecture_ends_the_probation() -> None:
    policy = Policy(Ladder([Reinitialize(confirm=0, tries=1, within=10), Restructure(confirm=0)]))
    acts(policy, range(1, 12), {11: sick("dead")}, loss=1.0)

    done = acts(policy, range(12, 90), {13: sick("dead", step=13)}, loss=1.6)

    assert done == ["13 Restructure"]
    assert policy.state.undone == []


def test_a_raised_rate_is_taken_back_as_soon_as_things_are_worse() -> None:
    policy = Policy([RaiseLR(confirm=0)])
    done = acts(policy, range(1, 12), {11: sick("stall", severity="warning", evidence=STALL)}, loss=1.0)
    raised = policy.state.lr_factor

    done += acts(policy, range(12, 40), loss=9.0)

    assert raised == pytest.approx(1e5)
    assert policy.state.lr_factor == 1.0
    assert len(done) == 2


def test_a_policy_goes_on_with_its_probation_after_a_restart() -> None:
    policy = Policy([Reinitialize(confirm=0, within=20)])
    acts(policy, range(1, 12), {11: sick("dead")}, loss=1.0)
    later = Policy([Reinitialize(confirm=0, within=20)])

    later.load_state_dict(json.loads(json.dumps(policy.state_dict())))

    assert acts(later, range(12, 40), loss=2.0) == ["31 Reinitialize"]


def false_alarm(batch: StepBatch) -> list[Finding]:
    """Says at step 10 that every layer is dead."""
    return [Finding("dead-10", "dead", "critical", 10, 10, message="False.") for step in batch.step if step == 10]


def test_a_false_alarm_does_not_cost_a_trained_network_its_weights(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, y = rings()

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for _ in range(2000):
        trained = step()
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    actions = [Reinitialize(confirm=0, within=30), Rollback()]
    with gw.watch(model, optimizer, run_dir=run_dir, actions=actions, detectors=[false_alarm]) as watcher:
        losses = []
        for _ in range(60):
            losses.append(step())
            watcher.log(loss=losses[-1])

    assert trained < 0.1
    assert max(losses) > 0.5
    assert losses[-1] == pytest.approx(trained, rel=0.01)
    table = gw.load(run_dir).actions()
    assert table["outcome"].tolist()[0] == "worse"
    assert "taken back" in table["detail"].tolist()[-1]
