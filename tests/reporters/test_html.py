from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from gradwatch.records import ActionRecord
from gradwatch.reporters.html import report
from gradwatch.reporters.templating import script_json
from gradwatch.run import Run
from tests.reporters.conftest import HOSTILE, MakeRun, named_parameters


class Outline(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)

    @property
    def data(self) -> dict[str, Any]:
        places = [i for i, script in enumerate(self.all("script")) if script.get("id") == "data"]
        found: dict[str, Any] = json.loads(self.scripts[places[0]])
        return found


def floats(text: str) -> Any:
    return np.frombuffer(base64.b64decode(text), "<f4")


@pytest.fixture(scope="module")
def sick(made_runs: MakeRun) -> Outline:
    action = ActionRecord(
        "a", 300, "DecayLR", reason="exploding", before=1.0, after=0.5, outcome="helped", detail="cut it"
    )
    return Outline(report(made_runs("exploding", actions=(action,))))


@pytest.mark.parametrize("scenario", ["healthy", "exploding", "vanishing", "spike", "nan", "dead"])
def test_the_page_begins_with_the_verdict(made_runs: MakeRun, scenario: str) -> None:
    run = made_runs(scenario)
    page, verdict = Outline(report(run)), run.summary().verdict

    assert verdict.headline in page.text
    assert page.text.index(verdict.word) < page.text.index("What happened")


def test_the_page_answers_every_question_of_the_verdict(made_runs: MakeRun, sick: Outline) -> None:
    for question, answer in made_runs("exploding").summary().verdict.facts[:4]:
        assert question in sick.text
        assert answer in sick.text


def test_the_page_tells_actions_with_their_outcome(sick: Outline) -> None:
    assert "DecayLR because of exploding" in sick.text
    assert "Outcome: helped." in sick.text
    assert "cut it" in sick.text


def test_the_page_loads_nothing(sick: Outline) -> None:
    loaded = [
        v
        for _, attributes in sick.elements
        for k, v in attributes.items()
        if k in ("src", "href", "srcset", "action") and v
    ]

    assert all(value.startswith(("data:", "#")) for value in loaded)


def test_only_the_scripts_of_the_page_may_run(sick: Outline) -> None:
    policy = next(m["content"] or "" for m in sick.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    code = [s for s, attributes in zip(sick.scripts, sick.all("script"), strict=True) if "type" not in attributes]

    assert {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in code} == allowed
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


def test_no_element_has_a_handler_or_a_style_of_its_own_made_of_a_name(hostile: Run) -> None:
    page = Outline(report(hostile))
    attributes = {name for _, found in page.elements for name in found}

    assert not {name for name in attributes if name.startswith("on")}
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert "b" not in {tag for tag, _ in page.elements}


def test_hostile_names_are_in_the_page_as_letters(hostile: Run) -> None:
    page = Outline(report(hostile))

    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    assert page.data["layers"][0] == HOSTILE[0]


def test_the_chart_holds_the_norms_that_were_measured(made_runs: MakeRun) -> None:
    run = made_runs(steps=60)
    whole = Outline(report(run)).data["whole"]
    shown = floats(whole["norms"]).reshape(12, 60)

    np.testing.assert_allclose(shown, run.grad_norms(by="layer").to_numpy().T, rtol=1e-6)
    assert whole["first"] == list(range(60))


def test_the_chart_marks_what_is_not_finite(made_runs: MakeRun) -> None:
    whole = Outline(report(made_runs("nan", steps=60))).data["whole"]

    assert np.isnan(floats(whole["norms"]).reshape(12, 60)[:, -1]).all()


def test_a_long_run_has_a_close_up_of_every_step_around_the_onset(made_runs: MakeRun) -> None:
    run = made_runs("nan", steps=3000, parameters=4)
    data, root = Outline(report(run)).data, run.summary().root

    assert root is not None
    first = data["closeup"]["first"]
    assert first == data["closeup"]["last"]
    assert first[0] < root.first_step < first[-1]


def test_a_healthy_run_has_no_close_up(made_runs: MakeRun) -> None:
    assert Outline(report(made_runs(steps=3000, parameters=4))).data["closeup"] is None


@pytest.mark.parametrize(("layers", "steps"), [(12, 1500), (600, 1500), (3000, 200)])
def test_the_page_is_at_most_six_megabytes(made_runs: MakeRun, layers: int, steps: int) -> None:
    names = tuple(f"encoder.layers.{i}.self_attention.linear" for i in range(layers))
    page = report(made_runs("exploding", steps=steps, parameters=named_parameters(names)))

    assert len(page.encode()) <= 6_000_000


def test_an_empty_run_has_a_page_without_charts(made_runs: MakeRun) -> None:
    page = Outline(report(made_runs(steps=0)))

    assert "No step has been recorded." in page.text
    assert page.scripts == []


def test_a_crashed_run_says_so(made_runs: MakeRun) -> None:
    assert "The run crashed after step 399." in Outline(report(made_runs(status="crashed"))).text


def test_every_picture_has_a_text_in_its_place(sick: Outline) -> None:
    assert len(list(sick.all("img"))) == 3
    assert all(image["alt"] for image in sick.all("img"))


def test_headings_go_down_in_order(sick: Outline) -> None:
    levels = [int(tag[1]) for tag, _ in sick.elements if re.fullmatch(r"h[1-6]", tag)]

    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_layer_table_has_every_layer_with_its_findings(made_runs: MakeRun) -> None:
    run = made_runs("dead")
    page, root = Outline(report(run)), run.summary().root

    assert root is not None
    assert all(f"layers.{i}" in page.text for i in range(12))
    assert f"{root.severity}: dead" in page.text


def test_script_json_cannot_end_its_script() -> None:
    value = {"a": "</script><!--", "b": "\u2028"}

    assert "<" not in script_json(value)
    assert json.loads(script_json(value)) == value


def test_the_page_tells_what_preflight_found(made_runs: MakeRun) -> None:
    layers = [
        {"layer": "<b>0</b>", "kind": "Linear", "activation": "Sigmoid", "activation_std": 0.13, "grad_norm": 2e-11},
        {"layer": "1", "kind": "Linear", "activation": "", "activation_std": None, "grad_norm": "inf"},
    ]
    found = {"verdict": "vanishing", "where": "<b>0</b>", "cause": "Sigmoid", "advice": ["ReLU"], "layers": layers}
    page = Outline(report(made_runs(config={"preflight": found})))

    assert "Before training" in page.text
    assert "vanishing at <b>0</b>" in page.text
    assert "Linear+Sigmoid" in page.text
    assert "2e-11" in page.text


def test_a_page_of_a_run_without_preflight_does_not_speak_of_it(made_runs: MakeRun) -> None:
    assert "Before training" not in Outline(report(made_runs())).text
