from __future__ import annotations

import json
from typing import Any

import pytest

from gradwatch.actions import (
    Action,
    Clip,
    DecayLR,
    Ladder,
    Reinitialize,
    ResetOptimizerState,
    Restructure,
    Rollback,
    SkipStep,
    Stop,
    ZClip,
)
from gradwatch.actions.policy import GIVE_UP, GIVE_UP_AFTER, Policy
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import ActionRecord, Finding


def sick(rule: str = "exploding", *, step: int = 10, severity: Any = "critical", **more: Any) -> Finding:
    return Finding(f"{rule}-{step}", rule, severity, step, step, **more)


def well(finding: Finding, step: int) -> Finding:
    return Finding(finding.id, finding.rule, finding.severity, finding.first_step, step, resolved_step=step)


def acts(policy: Policy, steps: range, findings: dict[int, Finding] | None = None, loss: float = 1.0) -> list[str]:
    """What the policy does when all that is due is applied: `step action`."""
    done = []
    for step in steps:
        found = [findings[step]] if findings and step in findings else []
        due = policy.decide(step, found, [loss])
        if due is not None:
            policy.applied(due, step)
            done.append(f"{step} {due.action.name}")
    return done


def outcomes(policy: Policy) -> dict[str, str]:
    return {record.id: record.outcome for record in policy.take_news()}


def test_skips_come_before_clips() -> None:
    assert [action.name for action in Policy([Clip(max_norm=1.0), SkipStep(), ZClip()]).in_step] == [
        "SkipStep",
        "Clip",
        "ZClip",
    ]


def test_a_list_is_ordered_by_how_much_its_actions_mend() -> None:
    actions: list[Action] = [Stop(), Restructure(), Reinitialize(), ResetOptimizerState(), DecayLR(), Rollback()]

    names = [action.name for action in Policy(actions).between]

    assert names == ["Rollback", "DecayLR", "ResetOptimizerState", "Reinitialize", "Restructure", "Stop"]


def test_a_ladder_keeps_its_own_order() -> None:
    assert [action.name for action in Policy(Ladder([DecayLR(), Rollback()])).between] == ["DecayLR", "Rollback"]


def test_one_action_a_boundary_and_none_while_one_is_on_trial() -> None:
    policy = Policy(Ladder([DecayLR(within=30), Rollback()]))

    assert acts(policy, range(11, 40), {11: sick()}) == ["11 DecayLR"]


def test_a_finding_that_resolves_means_that_it_helped() -> None:
    policy = Policy([DecayLR(within=30)])
    finding = sick()

    acts(policy, range(11, 20), {11: finding, 15: well(finding, 15)})

    assert outcomes(policy) == {"DecayLR-11-1": "helped"}


def test_a_finding_that_stays_means_no_effect() -> None:
    policy = Policy([DecayLR(within=30, tries=1)])

    acts(policy, range(11, 50), {11: sick()})

    assert outcomes(policy)["DecayLR-11-1"] == "no effect"


def test_a_loss_that_shoots_up_means_worse() -> None:
    policy = Policy([DecayLR(within=30, tries=1)])
    acts(policy, range(1, 13), {11: sick()})

    acts(policy, range(13, 25), loss=50.0)

    assert outcomes(policy)["DecayLR-11-1"] == "worse"


def test_what_did_not_help_is_not_repeated_and_the_next_remedy_follows() -> None:
    policy = Policy(Ladder([DecayLR(within=10, tries=1), Rollback(within=10, tries=1), Stop()]))

    done = acts(policy, range(11, 60), {11: sick(), 22: sick(step=21)})

    assert done == ["11 DecayLR", "21 Rollback", "22 Stop"]


def test_a_remedy_is_tried_as_often_as_it_may_against_what_stays() -> None:
    policy = Policy(Ladder([DecayLR(within=5, tries=2, cooldown=0), Rollback(within=5, tries=1)]))

    done = acts(policy, range(11, 60), {11: sick()})

    assert [entry.split()[1] for entry in done] == ["DecayLR", "DecayLR", "Rollback"]
    assert policy.state.failures["DecayLR:exploding"] == 2


def episodes(*firsts: int, lasting: int = 2, rule: str = "exploding") -> dict[int, Finding]:
    """A finding that opens at each of these steps and resolves soon after."""
    opened = {first: sick(rule, step=first) for first in firsts}
    return opened | {first + lasting: well(finding, first + lasting) for first, finding in opened.items()}


def test_help_that_does_not_last_is_followed_by_the_next_remedy() -> None:
    policy = Policy(Ladder([DecayLR(within=40, tries=2, cooldown=0), Rollback(within=9)]))

    assert acts(policy, range(11, 90), episodes(11, 40, 70)) == ["11 DecayLR", "40 DecayLR", "70 Rollback"]


def test_help_that_lasts_makes_a_remedy_worth_another_try() -> None:
    policy = Policy(Ladder([DecayLR(within=9, tries=2, cooldown=0), Rollback(within=9)]))

    done = acts(policy, range(11, 700), episodes(11, 40, 300, 600))

    assert done == ["11 DecayLR", "40 DecayLR", "300 DecayLR", "600 DecayLR"]


def test_what_keeps_coming_back_needs_no_further_confirmation() -> None:
    policy = Policy(Ladder([DecayLR(within=60, tries=1, cooldown=0), Reinitialize(confirm=90)]))

    assert acts(policy, range(11, 90), episodes(11, 60)) == ["11 DecayLR", "60 Reinitialize"]


def test_new_weights_come_a_second_time_only_after_what_was_not_tried() -> None:
    policy = Policy(Ladder([Reinitialize(confirm=0, within=9, cooldown=0), Restructure(confirm=0)]))

    done = acts(policy, range(11, 700), episodes(11, 300, rule="vanishing"))

    assert done == ["11 Reinitialize", "300 Restructure"]


def test_after_new_weights_learning_is_judged_from_their_own_first_loss() -> None:
    policy = Policy([Reinitialize(confirm=0, within=9)])
    acts(policy, range(12), {11: sick("vanishing")}, loss=9.0)

    acts(policy, range(12, 80), loss=1.0)

    assert (policy.state.first_loss, policy.state.learns) == (1.0, False)


def test_a_rule_that_was_given_up_gets_a_new_chance_much_later() -> None:
    policy = Policy([DecayLR(within=5, tries=1, cooldown=0)])

    done = acts(policy, range(11, 1500), episodes(11, 1400, lasting=1200))

    assert done == ["11 DecayLR", "1400 DecayLR"]


def test_nothing_is_given_up_for_a_finding_that_no_action_answers() -> None:
    policy = Policy([DecayLR(within=5, tries=2)])
    acts(policy, range(11, 30), episodes(11, lasting=9))

    acts(policy, range(30, 60), {30: sick(step=30, severity="info")})

    assert not any(record.action == GIVE_UP for record in policy.take_news())


def test_a_run_without_a_stop_is_handed_back_in_words() -> None:
    policy = Policy([DecayLR(within=10, tries=1)])

    acts(policy, range(11, 60), {11: sick()})

    [record] = [record for record in policy.take_news() if record.action == GIVE_UP]
    assert record.detail == "gave up on exploding: no remedy is left (tried: DecayLR)"
    assert acts(policy, range(60, 300)) == []


def test_the_policy_gives_up_after_a_number_of_failures_in_a_row() -> None:
    policy = Policy([DecayLR(within=5, tries=100, cooldown=0, min_factor=1e-12)])

    done = acts(policy, range(11, 200), {11: sick()})

    assert len(done) == GIVE_UP_AFTER


def test_cooldown_and_max_times_hold() -> None:
    policy = Policy([DecayLR(within=5, tries=9, cooldown=20, max_times=2)])

    assert acts(policy, range(11, 200), {11: sick()}) == ["11 DecayLR", "31 DecayLR"]


def test_the_known_cause_chooses_the_remedy() -> None:
    policy = Policy(Ladder([DecayLR(), Reinitialize(confirm=0)]))
    finding = sick(evidence={"cause_id": "init_large"})

    assert acts(policy, range(11, 20), {11: finding}) == ["11 Reinitialize"]


def test_nothing_that_learns_is_initialised_again() -> None:
    policy = Policy([Reinitialize(confirm=0)])
    finding = sick("vanishing", step=60, severity="warning")
    for step in range(60):
        policy.decide(step, [], [2.0 * 0.98**step])

    assert policy.decide(60, [finding], [0.5]) is None


def test_a_rollback_needs_a_state_that_was_ever_finite() -> None:
    policy = Policy([Rollback()])

    assert policy.decide(1, [sick("nonfinite", step=0)]) is None
    assert policy.decide(9, [sick("nonfinite", step=8)]) is not None


def test_a_dry_run_records_and_changes_nothing() -> None:
    policy = Policy([DecayLR()], dry_run=True)
    due = policy.decide(11, [sick()])
    assert due is not None

    record = policy.applied(due, 11)

    assert (record.dry_run, record.after, policy.state.lr_factor) == (True, 0.5, 1.0)


def test_the_rate_comes_back_once_and_a_relapse_keeps_it_down() -> None:
    policy = Policy([DecayLR(factor=0.5, recover=10, hold=20, within=5)])
    finding, again = sick(), sick(step=60)

    done = acts(policy, range(11, 300), {11: finding, 12: well(finding, 12), 61: again, 62: well(again, 62)})

    assert done == ["11 DecayLR", "32 DecayLR", "42 DecayLR", "61 DecayLR"]
    assert policy.state.lr_factor == 0.5


@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_the_way_back_rises_steadily_to_one(shape: str) -> None:
    policy = Policy([DecayLR(factor=0.1, recover=20, hold=5, shape=shape)])
    finding = sick()
    acts(policy, range(11, 13), {11: finding, 12: well(finding, 12)})

    factors = []
    for step in range(13, 50):
        acts(policy, range(step, step + 1))
        factors.append(policy.state.lr_factor)

    assert factors == sorted(factors)
    assert (factors[0], factors[-1]) == (0.1, 1.0)


def test_the_same_findings_give_the_same_actions() -> None:
    findings = {11: sick(), 90: sick("nonfinite", step=90), 150: sick("divergence", step=149)}

    assert acts(Policy("repair"), range(300), findings) == acts(Policy("repair"), range(300), findings)


def test_a_policy_goes_on_from_its_saved_state() -> None:
    findings = {11: sick(), 90: sick("nonfinite", step=90)}
    whole, first = Policy("repair"), Policy("repair")
    expected = acts(whole, range(200), findings)
    done = acts(first, range(60), findings)
    second = Policy("repair")

    second.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert done + acts(second, range(60, 200), findings) == expected


def test_presets_have_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown preset of actions 'repiar'; did you mean 'repair'"):
        Policy("repiar")


def test_something_that_is_no_action_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'actions' must be a list of gradwatch actions: 3"):
        Policy([3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DecayLR(factor=1.0), "'factor' must be < 1: 1.0"),
        (lambda: DecayLR(on="explodng"), "unknown rule 'explodng'; did you mean 'exploding'"),
        (lambda: DecayLR(shape="linear"), "unknown shape 'linear'"),
        (lambda: DecayLR(recover=0), "'recover' must be an integer >= 1: 0"),
        (lambda: DecayLR(cooldown=-1), "'cooldown' must be an integer >= 0: -1"),
        (lambda: Rollback(where="cloud"), "unknown where 'cloud'"),
        (lambda: Rollback(every=0), "'every' must be an integer >= 1: 0"),
        (lambda: Rollback(factor=2.0), "'factor' must be <= 1: 2.0"),
        (lambda: Reinitialize(scheme="he"), "unknown scheme 'he'"),
        (lambda: Restructure(changes=("depth",)), "unknown change 'depth'"),
        (lambda: Stop(min_severity="bad"), "unknown severity 'bad'"),
        (lambda: SkipStep(factor=0.5), "'factor' must be > 1: 0.5"),
    ],
)
def test_nonsense_is_refused_by_name(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


ALL = [Clip(max_norm=1.0), SkipStep(), SkipStep(3.0), ZClip(), DecayLR(recover=9), Rollback(), Reinitialize()]
ALL += [ResetOptimizerState(), Restructure(), Stop()]


@pytest.mark.parametrize("action", ALL, ids=lambda action: action.name)
def test_the_configuration_of_an_action_builds_an_equal_one(action: Action) -> None:
    config = json.loads(json.dumps(action.config()))

    assert type(action)(**config).config() == action.config()


def test_records_of_a_trial_keep_their_id() -> None:
    policy = Policy([DecayLR(within=5, tries=1)])
    due = policy.decide(11, [sick()])
    assert due is not None
    record: ActionRecord = policy.applied(due, 11)

    policy.decide(30, [])

    assert policy.take_news()[0].id == record.id
