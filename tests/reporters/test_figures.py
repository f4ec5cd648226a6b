from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import matplotlib.colors
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import ActionRecord
from gradwatch.reporters import figures, style
from gradwatch.reporters.binning import Band
from gradwatch.reporters.figures.depth import slope
from gradwatch.reporters.figures.heatmap import spans
from gradwatch.reporters.figures.timeline import reads_logarithmic
from gradwatch.run import Run
from tests.reporters.conftest import HOSTILE, MakeRun, named_parameters

Pixels = npt.NDArray[np.int64]
DRAWN: dict[str, Callable[[Run], Any]] = {
    "heatmap": lambda run: run.plot.heatmap(),
    "timeline": lambda run: run.plot.timeline(),
    "depth_profile": lambda run: run.plot.depth_profile(),
    "distribution": lambda run: run.plot.distribution(),
    "update_ratio": lambda run: run.plot.update_ratio(),
    "saturation": lambda run: run.plot.saturation(),
}
LIGHT, DARK = style.THEMES["light"], style.THEMES["dark"]


def pixels(figure: Figure) -> Pixels:
    """The picture as integers of shape (height, width, 3)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor=figure.get_facecolor())
    return np.asarray(Image.open(buffer).convert("RGB")).astype(np.int64)


def share(picture: Pixels, colour: str, *, tolerance: int = 12) -> float:
    """How much of a picture has a colour."""
    wanted = np.array(matplotlib.colors.to_rgb(colour)) * 255
    return float((np.abs(picture - wanted).max(axis=-1) <= tolerance).mean())


def texts(figure: Figure) -> list[str]:
    """All words in a figure that are seen."""
    figure.draw_without_rendering()
    titles = [ax.get_title(loc) for ax in figure.axes for loc in ("left", "center", "right")]
    found = [t for ax in figure.axes for t in (*ax.texts, ax.xaxis.label, ax.yaxis.label)]
    labels = [t for ax in figure.axes for t in (*ax.get_yticklabels(), *ax.get_xticklabels())]
    legends = [t for ax in figure.axes if (legend := ax.get_legend()) for t in legend.get_texts()]
    return [text for text in (*titles, *(t.get_text() for t in (*found, *labels, *legends, *figure.texts))) if text]


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("scenario", ["healthy", "nan"])
def test_every_figure_of_every_scenario_has_a_picture(made_runs: MakeRun, kind: str, scenario: str) -> None:
    run = made_runs(scenario, statistics=("update_ratio",))
    picture = pixels(DRAWN[kind](run))

    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5


@pytest.mark.parametrize("kind", DRAWN)
def test_an_empty_run_says_so_in_every_figure(made_runs: MakeRun, kind: str) -> None:
    said = " ".join(texts(DRAWN[kind](made_runs(steps=0))))

    assert "No " in said


@pytest.mark.parametrize("kind", DRAWN)
def test_hostile_names_are_drawn_as_they_are(hostile: Run, kind: str) -> None:
    assert pixels(DRAWN[kind](hostile)).size


@pytest.mark.parametrize("kind", DRAWN)
def test_a_figure_leaves_the_state_of_pyplot_alone(made_runs: MakeRun, kind: str) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    pixels(DRAWN[kind](made_runs()))

    assert dict(mpl.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_the_figures_need_no_pyplot(made_runs: MakeRun) -> None:
    code = (
        "import sys; from gradwatch.run import load; run = load(sys.argv[1]); run.plot.heatmap().png();"
        "run.plot.timeline().png(); assert 'matplotlib.pyplot' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code, str(made_runs().path)], check=True)


@pytest.mark.parametrize(("theme", "look"), [("light", LIGHT), ("dark", DARK)])
def test_a_figure_has_the_paper_of_its_theme(made_runs: MakeRun, theme: str, look: style.Theme) -> None:
    assert share(pixels(made_runs().plot.timeline(theme=theme)), look.paper) > 0.4


def test_an_unknown_theme_is_an_error_that_lists_the_known_ones(made_runs: MakeRun) -> None:
    with pytest.raises(UnknownNameError, match="unknown theme 'drak'; did you mean 'dark'"):
        made_runs().plot.heatmap(theme="drak")


def test_a_figure_can_be_drawn_on_axes_of_ones_own(made_runs: MakeRun) -> None:
    own = Figure()
    left, right = own.subplots(1, 2)

    assert made_runs().plot.heatmap(ax=left) is own
    assert made_runs().plot.depth_profile(ax=right) is own
    assert left.collections
    assert right.lines


def test_the_heatmap_shows_what_is_not_finite_in_its_own_colour(made_runs: MakeRun) -> None:
    assert share(pixels(made_runs("nan").plot.heatmap()), LIGHT.nonfinite) > 0.1
    assert share(pixels(made_runs("healthy").plot.heatmap()), LIGHT.nonfinite) == 0


def test_the_heatmap_shows_an_exact_zero_in_its_own_colour(made_runs: MakeRun) -> None:
    figure = made_runs("dead").plot.heatmap()

    assert any("exactly zero" in text for text in texts(figure))
    assert share(pixels(figure), LIGHT.zero, tolerance=2) > 0.01


def test_the_heatmap_of_a_sick_run_outlines_the_layers_and_names_the_step(made_runs: MakeRun) -> None:
    run = made_runs("dead")
    figure, root = run.plot.heatmap(), run.summary().root

    assert root is not None
    assert any(f"step {root.first_step}" in text for text in texts(figure))
    assert share(pixels(figure), LIGHT.severity[root.severity]) > 0.002
    bold = [label.get_text() for label in figure.axes[0].get_yticklabels() if label.get_fontweight() == "bold"]
    assert set(bold) == set(root.layers)


def test_the_heatmap_of_a_healthy_run_has_no_mark(made_runs: MakeRun) -> None:
    picture = pixels(made_runs().plot.heatmap())

    assert share(picture, LIGHT.severity["critical"]) == share(picture, LIGHT.severity["warning"]) == 0


def test_a_single_spike_in_a_long_run_is_seen(made_runs: MakeRun) -> None:
    run = made_runs("spike", steps=20_000, parameters=6, findings=())
    mesh: Any = run.plot.heatmap().axes[0].collections[0]
    norms = run.grad_norms(by="layer").to_numpy()

    assert mesh.get_array().max() == pytest.approx(norms.max())
    assert mesh.norm.vmax == pytest.approx(norms.max())


@pytest.mark.parametrize("layers", [1, 3, 12, 600])
def test_labels_of_layers_never_overlap(made_runs: MakeRun, layers: int) -> None:
    run = made_runs(
        "exploding",
        steps=30,
        parameters=named_parameters(tuple(f"block.{i}.linear" for i in range(layers))),
        findings=(),
    )
    figure = run.plot.heatmap()
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels() if label.get_text()]
    heights = sorted((box.y0, box.y1) for box in boxes)

    assert len(boxes) == min(layers, len(boxes)) > 0
    assert all(below[1] <= above[0] + 0.5 for below, above in itertools.pairwise(heights))


def test_actions_are_marked(made_runs: MakeRun) -> None:
    action = ActionRecord("a", 200, "DecayLR", reason="exploding", before=1.0, after=0.5)
    run = made_runs("healthy", actions=(action,))

    assert any("action" in text for text in texts(run.plot.heatmap()))
    assert any("DecayLR" in text for text in texts(run.plot.timeline()))
    assert share(pixels(run.plot.timeline()), LIGHT.action, tolerance=40) > 0


def test_an_action_of_a_dry_run_is_not_marked(made_runs: MakeRun) -> None:
    run = made_runs("healthy", actions=(ActionRecord("a", 200, "DecayLR", dry_run=True),))

    assert not any("action" in text for text in texts(run.plot.heatmap()))


def test_before_and_after_an_action_names_it_and_its_outcome(made_runs: MakeRun) -> None:
    run = made_runs("healthy", actions=(ActionRecord("a", 200, "DecayLR", outcome="helped"),))
    said = texts(run.plot.before_after("a"))

    assert any("DecayLR at step 200: helped" in text for text in said)
    assert {"20 steps before", "20 steps after"} <= {text.strip() for text in said}


def test_an_action_that_does_not_exist_is_an_error(made_runs: MakeRun) -> None:
    with pytest.raises(ConfigurationError, match="'action' must be the id or place of one of the run's 0 actions"):
        made_runs().plot.before_after("nope")


def test_the_depth_profile_of_the_asked_for_steps(made_runs: MakeRun) -> None:
    said = texts(made_runs().plot.depth_profile([5, 50]))

    assert {"step 5", "step 50"} <= {text.strip() for text in said}


def test_the_fit_over_depth_finds_the_factor_of_a_geometric_profile() -> None:
    fit = slope(0.5 ** np.arange(10.0))

    assert fit is not None
    assert fit[0] == pytest.approx(0.5)


def test_there_is_no_fit_over_two_layers() -> None:
    assert slope(np.array([1.0, 2.0])) is None


def test_axes_name_units_and_stage(made_runs: MakeRun) -> None:
    said = " ".join(texts(made_runs().plot.heatmap()) + texts(made_runs().plot.depth_profile()))

    assert "step" in said
    assert "gradient norm (L2, pre-clip)" in said


def test_update_ratios_outside_of_the_usual_band_are_named(made_runs: MakeRun) -> None:
    run = made_runs("vanishing", statistics=("update_ratio",))

    assert any("layers.0" in text for text in texts(run.plot.update_ratio()))


def test_saturation_shows_only_the_modules_that_can_saturate() -> None:
    shares = pd.DataFrame({"tanh": [0.2, 0.9], "relu": [np.nan, np.nan]}, index=[0, 10])
    (panel, _) = figures.saturation({"saturated_fraction": shares}).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["tanh"]


def test_a_remedy_is_shown_over_the_names_of_the_layers(made_runs: MakeRun) -> None:
    action = ActionRecord("a", 200, "DecayLR")
    picture = made_runs("exploding", parameters=6, actions=[action]).plot.before_after()
    picture.draw_without_rendering()
    names = {label.get_text() for label in picture.axes[1].get_xticklabels()} - {""}
    assert names == {"layers.0", "layers.1", "layers.2"}


@pytest.mark.parametrize("decays", [True, False], ids=["decay-to-zero", "a-leap-at-the-end"])
def test_a_learning_rate_is_logarithmic_where_a_linear_axis_hides_it(decays: bool) -> None:
    rate = np.linspace(0.1, 1e-9, 50) if decays else np.where(np.arange(50) < 40, 0.01, 6.0)
    assert reads_logarithmic("lr", Band(rate, rate, rate)) is not decays


@given(st.integers(1, 800), st.integers(1, 60), st.lists(st.integers(0, 900), max_size=5))
def test_thinned_labels_keep_their_distance_and_the_first_important_one(n: int, room: int, must: list[int]) -> None:
    rows = style.thin(n, room, must)

    assert rows == sorted(set(rows))
    assert all(0 <= row < n for row in rows)
    if n > room:
        assert all(b - a >= n / room for a, b in itertools.pairwise(rows))
    if must and must[0] < n:
        assert must[0] in rows


@given(st.lists(st.integers(0, 30)))
def test_spans_cover_the_rows_and_nothing_else(rows: list[int]) -> None:
    covered = [row for first, last in spans(rows) for row in range(first, last + 1)]

    assert covered == sorted(set(rows))


def test_hostile_names_are_all_in_the_heatmap(hostile: Run) -> None:
    labels = [label.get_text() for label in hostile.plot.heatmap().axes[0].get_yticklabels()]

    assert len(labels) == len(HOSTILE)
    assert not any("\x1b" in label or "\u202e" in label or "\n" in label for label in labels)


def test_a_picture_shows_itself_in_a_notebook(made_runs: MakeRun) -> None:
    assert made_runs().plot.heatmap()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
