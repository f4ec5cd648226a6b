from __future__ import annotations

from typing import Any

import pytest

from gradwatch.records import ActionRecord, Finding, Parameter, RunInfo
from gradwatch.reporters.story import chapters, events, trouble

INFO = RunInfo(tuple(Parameter(f"l{i}.weight", depth=i) for i in range(4)), status="finished")


def found(
    rule: str, first: int, last: int, *, severity: Any = "critical", layers: tuple[str, ...] = (), over: bool = False
) -> Finding:
    return Finding(
        f"{rule}-{first}", rule, severity, first, last, layers=layers, resolved_step=last + 1 if over else None
    )


def test_findings_of_a_rule_that_overlap_make_one_chapter() -> None:
    told = chapters([found("exploding", 10, 50, layers=("l1",)), found("exploding", 40, 90, layers=("l0",))])

    assert [(c.first_step, c.last_step, c.layers) for c in told] == [(10, 90, ("l1", "l0"))]


def test_findings_of_a_rule_that_lie_far_apart_make_two_chapters() -> None:
    told = chapters([found("spike", 10, 10, over=True), found("spike", 500, 500, over=True)], gap=20)

    assert [c.first_step for c in told] == [10, 500]


def test_different_rules_are_never_one_chapter() -> None:
    told = chapters([found("exploding", 10, 50), found("divergence", 12, 50)])

    assert [c.rule for c in told] == ["exploding", "divergence"]


def test_a_chapter_is_as_grave_as_its_gravest_finding() -> None:
    told = chapters([found("spike", 1, 1, severity="warning"), found("spike", 5, 5, severity="critical")])

    assert told[0].severity == "critical"


def test_an_explosion_that_ends_in_nan_is_told_as_an_explosion_that_goes_on() -> None:
    main = trouble(chapters([found("exploding", 10, 49, layers=("l2",), over=True), found("nonfinite", 50, 99)]))

    assert main is not None
    assert (main.root.rule, main.is_open, main.over_at) == ("exploding", True, None)
    assert [c.rule for c in main.followed] == ["nonfinite"]


def test_an_old_trouble_that_is_over_is_not_the_cause_of_a_new_one() -> None:
    main = trouble(chapters([found("exploding", 10, 20, over=True), found("nonfinite", 500, 600)]))

    assert main is not None
    assert main.root.rule == "nonfinite"


def test_a_diverging_loss_yields_to_gradients_that_explode_about_the_same_time() -> None:
    main = trouble(chapters([found("divergence", 100, 300), found("exploding", 108, 300, layers=("l1",))]))

    assert main is not None
    assert (main.root.rule, [c.rule for c in main.followed]) == ("exploding", ["divergence"])


def test_a_diverging_loss_long_before_the_gradients_keeps_its_place() -> None:
    main = trouble(chapters([found("divergence", 100, 300), found("exploding", 250, 300)]))

    assert main is not None
    assert main.root.rule == "divergence"


def test_an_open_trouble_comes_before_an_equally_grave_one_that_is_over() -> None:
    main = trouble(chapters([found("nonfinite", 5, 6, over=True), found("exploding", 700, 900)]))

    assert main is not None
    assert main.root.rule == "exploding"


def test_a_critical_trouble_comes_before_an_earlier_warning() -> None:
    main = trouble(chapters([found("imbalance", 0, 900, severity="warning"), found("exploding", 700, 900)]))

    assert main is not None
    assert (main.root.rule, main.severity) == ("exploding", "critical")


def test_a_warning_that_still_holds_comes_before_a_critical_trouble_that_is_over() -> None:
    main = trouble(chapters([found("exploding", 10, 20, over=True), found("dead", 500, 900, severity="warning")]))

    assert main is not None
    assert (main.root.rule, main.severity, main.is_open) == ("dead", "warning", True)


def test_an_explosion_that_left_layers_dead_is_told_as_an_explosion_that_is_not_over() -> None:
    main = trouble(chapters([found("exploding", 10, 20, over=True), found("dead", 22, 900, severity="warning")]))

    assert main is not None
    assert (main.root.rule, main.severity, main.is_open) == ("exploding", "warning", True)


def test_troubles_between_which_dead_layers_lasted_are_one() -> None:
    told = [
        found("exploding", 10, 12, over=True),
        found("dead", 14, 900, severity="warning"),
        found("divergence", 90, 900),
    ]
    main = trouble(chapters(told))

    assert main is not None
    assert (main.root.rule, main.severity) == ("exploding", "critical")


def test_mere_information_is_no_trouble() -> None:
    assert trouble(chapters([found("imbalance", 0, 900, severity="info")])) is None


def test_the_story_is_told_in_order_of_time_and_ends_with_the_run() -> None:
    told = events(
        INFO,
        chapters([found("nonfinite", 50, 60, over=True), found("exploding", 10, 90, layers=("l1",))]),
        [ActionRecord("a", 30, "DecayLR", reason="exploding", before=1.0, after=0.5, outcome="helped")],
        [{"step": 20, "text": "resumed"}],
        span=(0, 99),
    )

    assert [(e.step, e.kind) for e in told] == [
        (10, "finding"), (20, "mark"), (30, "action"), (50, "finding"), (61, "resolved"), (99, "end"),
    ]  # fmt: skip


def test_a_row_of_equal_actions_is_one_event() -> None:
    actions = [ActionRecord(str(i), 10 + i, "SkipStep", reason="nonfinite") for i in range(300)]
    told = events(INFO, [], actions, span=(0, 500))

    assert [e.title for e in told[:-1]] == ["SkipStep because of nonfinite, 300 times up to step 309"]


def test_an_action_tells_what_it_changed_and_what_came_of_it() -> None:
    action = ActionRecord("a", 30, "DecayLR", reason="exploding", before=1.0, after=0.5, outcome="helped")

    assert events(INFO, [], [action], span=(0, 99))[0].text == "1 → 0.5. Outcome: helped."


def test_while_the_trouble_goes_on_no_part_of_it_is_told_to_be_over() -> None:
    gathered = chapters([found("exploding", 10, 49, over=True), found("nonfinite", 50, 99)])
    told = events(INFO, gathered, [], span=(0, 99), main=trouble(gathered))

    assert [e.kind for e in told] == ["finding", "finding", "end"]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((), ""),
        (("l2",), "in l2"),
        (("l2", "l0"), "in l2 and l0"),
        (("l2", "l0", "l1"), "in 3 layers, worst in l2"),
        (("l2", "l0", "l1", "l3"), "in all 4 layers, worst in l2"),
    ],
)
def test_a_chapter_says_where(layers: tuple[str, ...], said: str) -> None:
    assert chapters([found("exploding", 1, 2, layers=layers)])[0].where(4) == said


def test_layers_that_fall_ill_one_after_another_are_told_from_the_first() -> None:
    told = chapters([found("exploding", i, 99, layers=(f"l{3 - i}",)) for i in range(4)])

    assert told[0].where(4) == "in all 4 layers, first in l3"


def test_a_finding_that_knows_where_it_began_is_told_from_there() -> None:
    evidence = {"first_bad_layer": "l0"}
    told = chapters([Finding("n", "nonfinite", "critical", 5, 9, layers=("l3", "l2", "l0"), evidence=evidence)])

    assert told[0].layers == ("l0", "l3", "l2")
    assert told[0].where(4) == "in 3 layers, first in l0"
