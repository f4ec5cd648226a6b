from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import Parameter
from gradwatch.reporters import comparison_page
from gradwatch.reporters.compared import Comparison
from gradwatch.reporters.comparison_data import CELLS, charts
from gradwatch.run import compare, load
from tests.reporters.conftest import MakeRun, named_parameters
from tests.reporters.test_html import Outline


@pytest.fixture(scope="module")
def pair(made_runs: MakeRun) -> Comparison:
    """A healthy run and one that is equal until NaN begins in one layer at 70 %."""
    return compare([made_runs("healthy"), made_runs("nan")])


def test_the_first_difference_names_step_and_layer(pair: Comparison) -> None:
    parting = pair.first_difference()

    assert parting is not None
    assert (parting.step, parting.layer) == (280, "layers.4")
    assert np.isnan(parting.values[1])


def test_equal_runs_have_no_difference(made_runs: MakeRun) -> None:
    same = compare([made_runs("healthy"), made_runs("healthy", name="again")])

    assert same.first_difference() is None
    assert comparison_page.partings(same) == [
        "healthy and again have the same gradient norms at all their common steps."
    ]


def test_a_larger_tolerance_finds_a_later_difference(made_runs: MakeRun) -> None:
    held = compare([made_runs("healthy"), made_runs("vanishing")])
    small, large = held.first_difference(), held.first_difference(0.5)

    assert small is not None
    assert large is not None
    assert small.step < large.step


def test_runs_of_different_length_are_held_against_each_other_at_their_common_steps(made_runs: MakeRun) -> None:
    held = compare([made_runs(steps=400), made_runs(steps=50, name="short")])

    assert list(held.metric("loss").index) == list(range(400))
    assert held.metric("loss")["short"].notna().sum() == 50


def test_runs_can_be_aligned_on_time(made_runs: MakeRun) -> None:
    held = compare([made_runs(steps=400), made_runs(steps=50, name="short")], by="time")
    frame = held.metric("loss")

    assert frame.index[0] == 0.0
    assert frame["short"].dropna().index[1] == pytest.approx(3600 / 50)


def test_medians_of_layers_are_held_against_the_first_run(made_runs: MakeRun) -> None:
    held = compare([made_runs("healthy"), made_runs("vanishing")])
    layers = held.layers()
    ratio = layers["vanishing / healthy"]

    assert list(layers.index) == [f"layers.{i}" for i in range(12)]
    assert ratio["layers.0"] < 1e-3
    assert ratio["layers.11"] > 0.1


def test_runs_without_a_common_layer_say_so(made_runs: MakeRun, tmp_path: Path) -> None:
    other = made_runs(name="other", parameters=(Parameter("else.weight"),))
    held = compare([made_runs(), other])

    assert held.first_difference() is None
    held.report(tmp_path / "c.html")


def test_runs_of_the_same_name_are_told_apart(made_runs: MakeRun) -> None:
    held = compare([made_runs(), made_runs(steps=50)])

    assert len(set(held.names)) == 2


@pytest.mark.parametrize("scenario", ["healthy", "spike"])
def test_the_page_shows_verdicts_and_parting(made_runs: MakeRun, tmp_path: Path, scenario: str) -> None:
    held = compare([made_runs("nan"), made_runs(scenario, name="b")])
    page = Outline(held.report(tmp_path / "c.html").read_text(encoding="utf-8"))

    assert all(s.verdict.headline in page.text for s in held.summaries)
    assert "first differ at step" in page.text
    assert [trace["name"] for trace in page.data["traces"] if trace.get("showlegend")] == list(held.names)


def test_a_run_whose_layers_were_smaller_is_below_one_in_the_heatmap(made_runs: MakeRun) -> None:
    drawn = charts(compare([made_runs(), made_runs("vanishing", name="b")]))
    heatmap = next(trace for trace in drawn["traces"] if trace["type"] == "heatmap")

    assert heatmap["z"][0][-1] < -3
    assert abs(heatmap["z"][-1][-1]) < 1


def test_a_comparison_of_many_layers_keeps_its_page_small(made_runs: MakeRun) -> None:
    names = named_parameters(tuple(f"encoder.layers.{i}" for i in range(900)))
    drawn = charts(compare([made_runs(parameters=names, steps=150), made_runs("spike", parameters=names, steps=150)]))
    (heatmap,) = (trace for trace in drawn["traces"] if trace["type"] == "heatmap")

    assert sum(map(len, heatmap["z"])) <= CELLS
    assert len(heatmap["x"]) == len(heatmap["z"][0]) + 1
    assert heatmap["x"][-1] == 149.5


def test_the_charts_of_a_comparison_are_one_below_the_other(made_runs: MakeRun) -> None:
    layout = charts(compare([made_runs(), made_runs("nan", name="b"), made_runs("dead", name="c")]))["layout"]
    places = [axis["domain"] for name, axis in layout.items() if name.startswith("yaxis")]

    assert len(places) == 4
    assert all(upper[0] > lower[1] for upper, lower in itertools.pairwise(places))


def test_json_tells_where_runs_part(pair: Comparison) -> None:
    told = json.loads(comparison_page.to_json(pair))

    assert told["partings"][0]["first_difference"] == {
        "step": 280,
        "layer": "layers.4",
        "values": [pytest.approx(0.0, abs=10), "nan"],
    }
    assert [run["name"] for run in told["runs"]] == ["healthy", "nan"]


def test_the_picture_has_a_line_for_each_run(pair: Comparison) -> None:
    assert [len(ax.lines) for ax in pair.plot().axes[:2]] == [2, 2]


def test_one_run_is_not_compared(made_runs: MakeRun) -> None:
    with pytest.raises(ConfigurationError, match="'runs' must be two or more runs"):
        compare([made_runs()])


def test_an_unknown_alignment_is_an_error(made_runs: MakeRun) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown alignment 'epoch'. Known: step, time"):
        compare([made_runs(), made_runs()], by="epoch")


def test_paths_are_opened(made_runs: MakeRun) -> None:
    assert compare([made_runs().path, str(made_runs("nan").path)]).names == ("healthy", "nan")


def test_a_negative_tolerance_is_an_error(pair: Comparison) -> None:
    with pytest.raises(ConfigurationError, match="'tolerance' must be >= 0: -1"):
        pair.first_difference(-1)


def test_hostile_names_stay_letters(made_runs: MakeRun, tmp_path: Path) -> None:
    evil = made_runs(name="<b>x", parameters=(Parameter("<script>a.weight"),))
    page = compare([evil, made_runs(name="<i>y", parameters=(Parameter("<script>a.weight"),))]).report(
        tmp_path / "c.html"
    )

    assert "<script>a" not in page.read_text(encoding="utf-8")
    assert load(evil.path)
