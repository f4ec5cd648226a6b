from __future__ import annotations

import json

import pytest

from gradwatch.records import ActionRecord
from gradwatch.reporters import text
from gradwatch.run import Run
from tests.reporters.conftest import HOSTILE, MakeRun


def test_json_holds_verdict_story_findings_and_actions(made_runs: MakeRun) -> None:
    run = made_runs("exploding", actions=(ActionRecord("a", 300, "DecayLR", outcome="helped"),))
    told = json.loads(text.to_json(run.summary()))

    assert told["state"] == "sick" if told["findings"] else "healthy"
    assert told["headline"] == run.summary().verdict.headline
    assert [f["id"] for f in told["findings"]] == [f.id for f in run.finding_list()]
    assert told["actions"][0]["outcome"] == "helped"
    assert told["story"][-1]["kind"] == "end"


@pytest.mark.parametrize("scenario", ["exploding", "nan"])
def test_json_has_no_number_that_json_does_not_know(made_runs: MakeRun, scenario: str) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(text.to_json(made_runs(scenario).summary()), parse_constant=refuse)


def test_markdown_begins_with_the_verdict(made_runs: MakeRun) -> None:
    summary = made_runs("nan").summary()

    assert text.markdown(summary).startswith(f"# ✖ Sick: nan\n\n**{summary.verdict.headline}**")


def test_hostile_names_break_no_table_of_markdown(hostile: Run) -> None:
    told = text.markdown(hostile.summary())
    rows = [line for line in told.splitlines() if line.startswith("| ")]

    assert "<script>" not in told
    assert "\x1b" not in told
    findings = [row for row in rows if "explodes" in row or "exploding" in row]
    assert len(findings) >= len(HOSTILE)
    assert all(row.endswith(" |") for row in rows)


def test_plain_text_carries_no_control_characters(hostile: Run) -> None:
    assert all(ch == "\n" or ch.isprintable() for ch in str(hostile.summary()))


def test_plain_text_tells_gradwatchs_own_cost(made_runs: MakeRun) -> None:
    assert "gradwatch's own cost: " in str(made_runs().summary())
