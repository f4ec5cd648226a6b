from __future__ import annotations

from typing import Any

import pytest

from gradwatch.records import ActionRecord, Finding, Parameter, RunInfo
from gradwatch.reporters.story import chapters, trouble
from gradwatch.reporters.verdict import STATE_WORDS, Numbers, Verdict, judge

PARAMETERS = tuple(Parameter(f"l{i}.weight", depth=i) for i in range(4))
NUMBERS = Numbers(steps=1000, first=0, last=999, loss=(2.3, 0.1))
EXPLODING = Finding(
    "e", "exploding", "critical", 412, 999, layers=("l2",), message="The norm of l2 is 300 times its usual.",
    cause="the learning rate is too high", advice=("lower the learning rate", "clip", "a third"),
)  # fmt: skip


def verdict(
    *findings: Finding, actions: tuple[ActionRecord, ...] = (), numbers: Numbers = NUMBERS, **info: Any
) -> Verdict:
    told = chapters(findings)
    facts = RunInfo(PARAMETERS, **{"status": "finished", "config": {"detectors": ["exploding"]}, **info})
    return judge(facts, told, trouble(told), actions=actions, numbers=numbers)


def over(finding: Finding, step: int) -> Finding:
    return Finding.from_json({**finding.to_json(), "last_step": step - 1, "resolved_step": step})


def test_a_run_without_a_finding_is_healthy() -> None:
    told = verdict()

    assert (told.state, told.headline) == ("healthy", "Nothing is wrong: 1,000 steps without a finding.")


def test_a_run_without_a_finding_that_still_goes_on_is_healthy_so_far() -> None:
    assert verdict(status="running").headline == "Nothing is wrong so far: 1,000 steps without a finding."


def test_information_leaves_a_run_healthy_and_is_told() -> None:
    told = verdict(Finding("i", "imbalance", "info", 0, 999))

    assert (told.state, told.headline) == ("healthy", "Nothing is wrong: 1,000 steps without a warning.")
    assert dict(told.facts)["Also seen"] == "Layers learn at very unequal rates from step 0 on."


def test_an_open_critical_finding_makes_a_run_sick_and_says_what_where_and_since_when() -> None:
    told = verdict(EXPLODING)

    assert (told.state, told.headline) == ("sick", "Gradients explode in l2 from step 412 on.")


def test_the_questions_of_a_sick_run_are_answered_in_order() -> None:
    assert verdict(EXPLODING).facts == (
        ("What happened first", "The norm of l2 is 300 times its usual."),
        ("Where", "l2 (layer 3 of 4 from the input)."),
        ("Since when", "Step 412, and it still holds."),
        ("Why", "The learning rate is too high."),
        ("What was done", "Nothing."),
        ("What to do now", "Lower the learning rate. Or: clip."),
    )


def test_an_open_warning_asks_for_a_look() -> None:
    assert verdict(Finding("w", "imbalance", "warning", 3, 999, layers=("l0",))).state == "warning"


def test_a_trouble_that_is_over_has_been_recovered_from() -> None:
    told = verdict(over(EXPLODING, 500))

    assert (told.state, told.headline) == ("recovered", "Gradients explode in l2 from step 412 to 499.")
    assert dict(told.facts)["Did it help"] == "It went over by itself."


def test_an_explosion_that_ended_in_nan_is_not_recovered() -> None:
    told = verdict(over(EXPLODING, 500), Finding("n", "nonfinite", "critical", 500, 999))

    assert (told.state, told.headline) == ("sick", "Gradients explode in l2 from step 412 on.")
    assert dict(told.facts)["What followed"] == "Gradients become NaN or infinite from step 500 on."


def test_an_explosion_that_left_layers_dead_needs_a_look() -> None:
    told = verdict(over(EXPLODING, 500), Finding("d", "dead", "warning", 500, 999, layers=("l0", "l1")))

    assert (told.state, told.headline) == ("warning", "Gradients explode in l2 from step 412 on.")
    assert dict(told.facts)["What followed"] == "Gradients are exactly zero from step 500 on."


def test_a_crash_says_where_it_ended_and_what_was_wrong_before() -> None:
    told = verdict(EXPLODING, status="crashed")

    assert told.state == "crashed"
    assert told.headline == "The run crashed after step 999. Gradients explode in l2 from step 412 on."


def test_a_crash_without_a_finding_says_so() -> None:
    told = verdict(status="crashed", status_detail="RuntimeError: out of memory")

    assert told.headline == "The run crashed after step 999. No trouble with gradients was found before."
    assert dict(told.facts)["Why"] == "RuntimeError: out of memory."
    assert dict(told.facts)["What to do now"] == "Find out why the process ended."


@pytest.mark.parametrize(("status", "state"), [("finished", "empty"), ("running", "empty"), ("crashed", "crashed")])
def test_a_run_without_steps_is_no_healthy_run(status: str, state: str) -> None:
    assert verdict(numbers=Numbers(steps=0), status=status).state == state


@pytest.mark.parametrize("config", [{}, {"detectors": []}, {"detectors": {"detectors": []}}])
def test_a_run_that_no_detector_looked_at_is_not_called_healthy(config: dict[str, Any]) -> None:
    told = verdict(config=config)

    assert told.state == "unjudged"
    assert "nothing was judged" in told.headline


def test_what_was_done_counts_actions_clips_and_skips() -> None:
    actions = tuple(ActionRecord(str(i), 420 + i, "DecayLR", before=0.5**i, after=0.5 ** (i + 1)) for i in range(3))
    numbers = Numbers(steps=1000, first=0, last=999, clipped=250, hardest_clip=0.01, skipped=2)

    assert dict(verdict(EXPLODING, actions=actions, numbers=numbers).facts)["What was done"] == (
        "DecayLR 3 times from step 420 on (1 → 0.125). Gradients were clipped at 250 steps (25 %), at most to ×0.01. "
        "2 steps skipped."
    )


def test_an_action_of_a_dry_run_was_not_done() -> None:
    told = verdict(EXPLODING, actions=(ActionRecord("a", 420, "DecayLR", dry_run=True),))

    assert dict(told.facts)["What was done"] == "1 action only noted (dry run)."
    assert "Did it help" not in dict(told.facts)


def test_whether_it_helped_is_told_from_the_outcomes_and_the_finding() -> None:
    actions = (
        ActionRecord("a", 420, "DecayLR", outcome="no effect"),
        ActionRecord("b", 450, "DecayLR", outcome="helped"),
    )

    assert dict(verdict(over(EXPLODING, 500), actions=actions).facts)["Did it help"] == (
        "No effect; helped; it was over at step 500."
    )


def test_an_action_after_which_the_trouble_goes_on_is_told_so() -> None:
    assert (
        dict(verdict(EXPLODING, actions=(ActionRecord("a", 420, "DecayLR"),)).facts)["Did it help"]
        == "The trouble goes on."
    )


def test_a_first_sign_before_the_trouble_is_named() -> None:
    sign = Finding("s", "spike", "warning", 300, 300, layers=("l1",), resolved_step=301)

    assert dict(verdict(sign, EXPLODING).facts)["What happened first"].endswith(
        "First sign at step 300: gradients spike."
    )


def test_every_state_has_a_word_and_a_sign() -> None:
    assert all(word and sign for word, sign in STATE_WORDS.values())
    assert len({word for word, _ in STATE_WORDS.values()}) == len(STATE_WORDS)


def test_a_run_whose_detectors_failed_is_not_called_healthy() -> None:
    told = verdict(overhead={"errors": {"detector exploding": "ValueError: 1"}})

    assert told.state == "unjudged"
    assert "detectors failed" in told.headline


def test_a_run_with_another_failed_part_of_gradwatch_is_still_judged() -> None:
    assert verdict(overhead={"errors": {"alert mail": "OSError: no"}}).state == "healthy"


def test_a_trouble_that_ended_with_a_clipped_step_did_not_go_over_by_itself() -> None:
    numbers = Numbers(steps=1000, first=0, last=999, clipped=1, hardest_clip=0.01)

    assert dict(verdict(over(EXPLODING, 500), numbers=numbers).facts)["Did it help"] == "It was over at step 500."


def test_a_loss_that_was_not_finite_sits_in_no_layer() -> None:
    told = verdict(
        Finding("n", "nonfinite", "critical", 500, 999, layers=("l3", "l2", "l1", "l0"), evidence={"where": "loss"})
    )

    assert told.headline == "Gradients become NaN or infinite in all 4 layers from step 500 on."
    assert dict(told.facts)["Where"] == "The whole model."


def test_a_sign_with_words_of_its_own_is_told_in_them() -> None:
    told = verdict(Finding("s", "stall", "warning", 300, 999, evidence={"sign": "rate"}))

    assert told.headline == "The learning rate is 0 from step 300 on."


def test_a_crash_in_trouble_says_how_it_ended_too() -> None:
    told = verdict(EXPLODING, status="crashed", status_detail="KeyboardInterrupt")

    assert dict(told.facts)["How it ended"] == "KeyboardInterrupt."


def test_a_cause_that_sits_in_no_layer_is_told_of_the_whole_model() -> None:
    told = verdict(Finding.from_json({**EXPLODING.to_json(), "evidence": {"cause_id": "learning_rate"}}))

    assert dict(told.facts)["Where"] == "The whole model, most in l2 (layer 3 of 4 from the input)."
