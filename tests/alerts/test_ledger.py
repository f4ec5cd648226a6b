"""When what is told: no thread and no clock."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.alerts import Group, Routing
from gradwatch.alerts.ledger import MOST_URGENT, Ledger
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import SEVERITIES
from tests.alerts.receivers import finding

#: Ten in the morning, local time.
MORNING = time.mktime((2026, 3, 2, 10, 0, 0, 0, 0, -1))


class Clock:
    """A ledger and the time it is told."""

    def __init__(self, **routing: object) -> None:
        self.now = 1000.0
        self.ledger = Ledger(Routing.of(routing))

    def add(self, name: str = "exploding@5", **fields: object) -> None:
        self.ledger.add(finding(name, **fields), now=self.now, wall=MORNING + self.now)  # type: ignore[arg-type]

    def take(self, after: float = 0.0, *, final: bool = False) -> tuple[Group, ...]:
        self.now += after
        return self.ledger.take(now=self.now, wall=MORNING + self.now, final=final)

    def due_in(self) -> float:
        return self.ledger.next_due(now=self.now, wall=MORNING + self.now) - self.now


def test_findings_that_come_together_make_one_group() -> None:
    clock = Clock(group_seconds=5)
    for i in range(40):
        clock.add(f"exploding@5#{i}", layers=(f"conv{i}",))

    assert clock.take() == ()
    [group] = clock.take(after=5)
    assert (group.rule, group.count, group.layer_count, group.state) == ("exploding", 40, 40, "firing")


def test_rules_that_come_together_make_one_message_with_the_worst_first() -> None:
    clock = Clock()
    clock.add("plateau@1", severity="warning")
    clock.add("nonfinite@2")

    assert [group.rule for group in clock.take(after=5)] == ["nonfinite", "plateau"]


def test_what_only_waits_for_company_travels_with_what_is_due() -> None:
    clock = Clock(group_seconds=5)
    clock.add("nonfinite@2")
    clock.take(after=4)
    clock.add("spike@3")

    assert {group.rule for group in clock.take(after=1)} == {"nonfinite", "spike"}


def test_a_finding_is_told_once() -> None:
    clock = Clock(reminder=None)
    clock.add()
    assert clock.take(after=5)
    clock.add()
    clock.add(value=9.0)

    assert clock.take(after=10_000) == ()
    assert clock.take(final=True) == ()


def test_a_second_finding_of_a_rule_waits_for_the_cooldown_and_says_so() -> None:
    clock = Clock(cooldown=900)
    clock.add("spike@5")
    clock.take(after=5)
    clock.add("spike@9")
    clock.add("spike@10")

    assert clock.take(after=800) == ()
    [group] = clock.take(after=100)
    assert (group.count, group.waiting_since is not None) == (2, True)
    assert "Held back since" in group.text


def test_a_rise_in_severity_does_not_wait() -> None:
    clock = Clock(cooldown=900)
    clock.add("spike@5", severity="warning")
    clock.take(after=5)
    clock.add("spike@5", severity="critical")

    [group] = clock.take(after=5)
    assert group.severity == "critical"


def test_it_is_over_when_all_that_was_told_is_resolved() -> None:
    clock = Clock()
    clock.add("spike@5")
    clock.add("spike@6")
    clock.take(after=5)
    clock.add("spike@5", resolved=20)
    assert clock.take(after=60) == ()
    clock.add("spike@6", resolved=30)

    [group] = clock.take(after=5)
    assert (group.state, group.last_step, group.count) == ("resolved", 30, 2)


def test_what_is_over_before_it_could_be_told_is_told_as_passed() -> None:
    clock = Clock()
    clock.add("spike@5")
    clock.add("spike@5", resolved=8)

    [group] = clock.take(after=5)
    assert (group.state, group.severity) == ("passed", "critical")
    assert clock.take(after=100) == ()


def test_flapping_is_held_by_the_cooldown() -> None:
    clock = Clock(cooldown=900, per_hour=1000)
    told = 0
    for i in range(360):
        clock.add(f"spike@{i}")
        told += bool(clock.take(after=5))
        clock.add(f"spike@{i}", resolved=i)
        told += bool(clock.take(after=5))

    assert told <= 3600 / 900 * 2 + 2


def test_more_than_the_rate_limit_waits_and_comes_as_one() -> None:
    clock = Clock(per_hour=3, cooldown=0)
    sent = []
    for i in range(50):
        clock.add(f"rule{i}@1", severity="warning")
        sent.append(clock.take(after=10))

    assert sum(map(bool, sent)) == 3
    later = clock.take(after=3600)
    assert len(later) == 47


def test_the_first_critical_message_about_a_rule_passes_the_rate_limit() -> None:
    clock = Clock(per_hour=1)
    clock.add("plateau@1", severity="warning")
    clock.take(after=5)
    clock.add("nonfinite@2")

    assert [group.rule for group in clock.take(after=5)] == ["nonfinite"]


def test_an_open_critical_finding_is_told_again() -> None:
    clock = Clock(reminder=3600)
    clock.add("nonfinite@2")
    clock.take(after=5)

    assert clock.take(after=3599) == ()
    assert [group.state for group in clock.take(after=1)] == ["reminder"]
    clock.add("nonfinite@2", resolved=9)
    clock.take(after=5)
    assert clock.take(after=100_000) == ()


def test_quiet_hours_hold_what_is_not_critical() -> None:
    clock = Clock(quiet_hours=("09:00", "12:00"))
    clock.add("plateau@1", severity="warning")
    assert clock.take(after=600) == ()
    clock.add("nonfinite@2")

    assert [group.rule for group in clock.take(after=5)] == ["nonfinite"]
    [held] = clock.take(after=2 * 3600)
    assert held.rule == "plateau"


def test_quiet_hours_may_span_midnight() -> None:
    routing = Routing(quiet_hours=("22:00", "07:00"))

    assert routing.quiet_left(MORNING) == 0
    assert routing.quiet_left(MORNING + 13 * 3600) == 8 * 3600
    assert routing.quiet_left(MORNING - 4 * 3600) == 3600


def test_the_end_of_the_run_tells_what_waits() -> None:
    clock = Clock(cooldown=900)
    clock.add("spike@5")
    clock.take(after=5)
    clock.add("spike@9")

    [group] = clock.take(final=True)
    assert group.count == 1


def test_runs_of_a_watchdog_have_a_cooldown_each() -> None:
    clock = Clock()
    clock.add("died@1", evidence={"run": "a", "run_name": "a"})
    clock.take(after=5)
    clock.add("died@2", evidence={"run": "b", "run_name": "b"})

    [group] = clock.take(after=5)
    assert group.headline.startswith("b died")


def test_nothing_is_due_while_nothing_waits() -> None:
    assert Clock().due_in() == float("inf")


def test_a_storm_takes_a_bounded_place_and_keeps_the_first_and_the_worst() -> None:
    clock = Clock(cooldown=900, reminder=None)
    messages = []
    for i in range(20_000):
        clock.add(f"spike@{i}", severity="warning")
        if i == 10_000:
            clock.add("spike@worst", severity="critical")
            clock.add("nonfinite@first")
        messages.append(clock.take(after=0.01))

    told = [group for groups in messages for group in groups]
    assert len(told) <= 3
    assert told[0].first_step == 5
    assert {"nonfinite", "spike"} == {group.rule for group in told}
    assert any(group.severity == "critical" for group in told if group.rule == "spike")
    [topic] = [t for t in clock.ledger._topics.values() if t.rule == "spike"]
    assert len(topic.fresh) + len(topic.open) <= 1103


def test_a_storm_of_rules_takes_a_bounded_place() -> None:
    clock = Clock()
    for i in range(5000):
        clock.add(f"rule{i}@1")

    assert len(clock.ledger._topics) <= 201
    assert len(clock.take(after=5)) <= 201


events = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 5),
        st.sampled_from(SEVERITIES),
        st.booleans(),
        st.floats(0, 400),
    ),
    max_size=60,
)


@given(events, st.integers(1, 5), st.sampled_from([0.0, 60.0, 900.0]))
def test_every_rule_is_heard_of_and_messages_are_bounded(
    events: list[tuple[str, int, str, bool, float]], per_hour: int, cooldown: float
) -> None:
    clock = Clock(min_severity="info", per_hour=per_hour, cooldown=cooldown, reminder=None)
    sent: list[float] = []
    heard: set[str] = set()
    firing: set[str] = set()
    for rule, number, severity, resolves, gap in events:
        clock.add(f"{rule}@{number}", severity=severity, resolved=number if resolves else None)
        for group in (groups := clock.take(after=gap)):
            assert group.state != "resolved" or group.rule in firing
            firing = firing - {group.rule} if group.state == "resolved" else firing | {group.rule}
            heard.add(group.rule)
        sent += [clock.now] * bool(groups)
    heard |= {group.rule for group in clock.take(after=10, final=True)}

    assert heard == {rule for rule, *_ in events}
    for end in sent:
        assert sum(end - 3600 < moment <= end for moment in sent) <= per_hour + MOST_URGENT


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_severity": "loud"}, "unknown severity 'loud'"),
        ({"cooldwn": 3}, "unknown setting of a channel 'cooldwn'; did you mean 'cooldown'"),
        ({"rules": "spike"}, "'rules' must be a list of rules: 'spike'"),
        ({"cooldown": -1}, "'cooldown' must be >= 0: -1"),
        ({"group_seconds": "5"}, "'group_seconds' must be a number >= 0: '5'"),
        ({"reminder": 0}, "'reminder' must be > 0: 0"),
        ({"per_hour": 0}, "'per_hour' must be an integer >= 1: 0"),
        ({"quiet_hours": ("22:00",)}, "'quiet_hours' must be two times of day"),
        ({"quiet_hours": ("25:00", "07:00")}, "'quiet_hours' must be two times of day"),
        ({"quiet_hours": ("07:00", "07:00")}, "'quiet_hours' must be two different times of day"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_named(given: dict[str, object], words: str) -> None:
    with pytest.raises((ConfigurationError, UnknownNameError), match=words.replace("(", r"\(")):
        Routing.of(given)
