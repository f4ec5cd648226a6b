"""The pages in a real browser: Debian's chromium (or another one that is found), driven by playwright."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradwatch.records import Finding, RunInfo
from gradwatch.reporters import words
from gradwatch.run import Run, compare
from gradwatch.testing import synthetic_batches, synthetic_parameters
from gradwatch.writer import RunWriter
from tests.reporters.conftest import HOSTILE, MakeRun, named_parameters

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
)  # fmt: skip
EXECUTABLE = os.environ.get("GRADWATCH_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None and not os.environ.get("CI"), reason="no browser: install chromium, or set GRADWATCH_BROWSER"
)

Open = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert EXECUTABLE is not None, "CI must have a browser: install chromium, or set GRADWATCH_BROWSER"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the report of a run; the test fails when the page says anything on the console, or asks for anything."""
    contexts, said = [], []

    def open_(run: Run, *, width: int = 1366, height: int = 900, scripts: bool = True, dark: bool = False) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height}, java_script_enabled=scripts,
            color_scheme="dark" if dark else "light",
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else said.append(r.url))
        path = run.report(tmp_path / f"{len(contexts)}.html")
        page.goto(path.as_uri())
        if scripts:
            page.wait_for_selector("html.js #overview .plot-container")
            page.wait_for_selector("#profile .plot-container")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []


def centre_of_cell(page: Any, layer: int, column: int) -> tuple[float, float]:
    """Where a cell of the heatmap lies on the screen."""
    place = page.evaluate(
        """([layer, column]) => {
            const chart = document.getElementById("overview"), {xaxis, yaxis, _size} = chart._fullLayout;
            const box = chart.getBoundingClientRect();
            const edges = chart.data[0].x;
            return [box.left + xaxis._offset + xaxis.l2p((edges[column] + edges[column + 1]) / 2),
                    box.top + yaxis._offset + yaxis.l2p(layer)];
        }""",
        [layer, column],
    )
    return place[0], place[1]


@pytest.mark.parametrize("scenario", ["healthy", "exploding", "dead"])
def test_the_page_opens_without_a_word_on_the_console(made_runs: MakeRun, open_page: Open, scenario: str) -> None:
    page = open_page(made_runs(scenario))

    assert page.locator("#overview .main-svg").count() > 0


@pytest.mark.parametrize(("layer", "column"), [(0, 3), (7, 200), (11, 399)])
def test_hovering_over_the_heatmap_names_layer_step_and_value(
    made_runs: MakeRun, open_page: Open, layer: int, column: int
) -> None:
    run = made_runs("healthy")
    page = open_page(run)
    page.mouse.move(*centre_of_cell(page, layer, column))
    page.wait_for_selector("#overview .hovertext")
    said = page.locator("#overview .hovertext").first.text_content()
    value = float(said.split("norm ")[1].split(" ")[0])

    assert f"layers.{layer}step {column}norm" in said
    assert value == pytest.approx(run.grad_norms(by="layer").iloc[column, layer], rel=6e-3)


def test_zooming_into_the_heatmap_zooms_into_every_panel(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs("exploding"))
    x0, y0 = centre_of_cell(page, 2, 100)
    x1, y1 = centre_of_cell(page, 9, 200)
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
    page.mouse.move(x1, y1)
    page.mouse.up()
    page.wait_for_function("() => document.getElementById('overview')._fullLayout.xaxis.range[0] > 50")
    layout = page.evaluate(
        """() => Object.fromEntries(Object.entries(document.getElementById("overview")._fullLayout)
            .filter(([key]) => /^[xy]axis/.test(key)).map(([key, axis]) => [key, [axis.range, axis.anchor]]))"""
    )
    range_ = layout.pop("xaxis")[0]

    assert range_ == pytest.approx([100, 200], abs=2)
    assert [anchor for _, anchor in layout.values()] == ["x"] * 4


def test_the_layer_table_filters(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs())
    page.fill("#filter", "layers.1")

    assert page.locator("#layer-table tbody tr:visible").count() == 3
    assert page.text_content("#filtered") == "3 of 12 layers"


def test_the_layer_table_sorts_by_number_and_tells_so(made_runs: MakeRun, open_page: Open) -> None:
    run = made_runs()
    page = open_page(run)
    head = page.locator("#layer-table th", has_text="largest")
    head.locator("button").click()
    order = page.locator("#layer-table tbody tr td:first-child").all_text_contents()

    assert head.get_attribute("aria-sort") == "ascending"
    assert order == list(run.grad_norms(by="layer").max().sort_values().index)


def test_the_close_up_shows_every_step_around_the_onset(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs("nan", steps=3000, parameters=4))
    page.click("#show-closeup")
    edges = page.evaluate("document.getElementById('overview').data[0].x")

    assert edges[0] < 2100 < edges[-1]
    assert np.diff(edges) == pytest.approx(1)
    assert page.get_attribute("#show-closeup", "aria-pressed") == "true"


def test_a_click_on_the_heatmap_adds_the_step_to_the_depth_profile(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs())
    before = page.evaluate("document.getElementById('profile').data.length")
    page.mouse.click(*centre_of_cell(page, 3, 123))
    page.wait_for_function(f"() => document.getElementById('profile').data.length === {before + 1}")

    assert page.text_content("#picked") == "Added: step 123."


def test_hostile_names_are_letters_and_do_nothing(hostile: Run, open_page: Open) -> None:
    page = open_page(hostile)
    page.mouse.move(*centre_of_cell(page, 0, 10))
    page.wait_for_selector("#overview .hovertext")

    assert HOSTILE[0] in page.locator("#overview .hovertext").first.text_content()
    assert page.evaluate("document.images.length") == 3
    assert page.locator("#layer-table td.name").first.text_content() == HOSTILE[0]


def test_the_first_screen_holds_verdict_and_chart(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs("nan"), width=1366, height=768)

    assert page.locator("#verdict").bounding_box()["y"] < 200
    assert page.locator("#overview").bounding_box()["y"] < 200


@pytest.mark.parametrize("width", [360, 390, 768, 1366, 2560])
def test_nothing_is_wider_than_the_screen(made_runs: MakeRun, open_page: Open, width: int) -> None:
    page = open_page(made_runs("exploding"), width=width)

    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "dark"), [(1366, False), (1366, True), (390, False)])
def test_a_picture_of_the_page_has_colours_of_the_heatmap_and_of_the_verdict(
    made_runs: MakeRun, open_page: Open, width: int, dark: bool
) -> None:
    page = open_page(made_runs("nan"), width=width, dark=dark)
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")).astype(int)

    def share(colour: tuple[int, int, int]) -> float:
        return float((np.abs(picture - np.array(colour)).max(axis=-1) < 14).mean())

    assert share((255, 90, 60) if dark else (255, 61, 31)) > 0.005
    assert share((255, 107, 125) if dark else (196, 18, 47)) > 0.001
    assert share((18, 22, 29) if dark else (255, 255, 255)) > 0.2


def test_without_scripts_the_page_shows_still_pictures(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs("nan"), scripts=False)

    assert page.locator("img:visible").count() == 3
    assert not page.locator("#overview").is_visible()


def test_print_shows_still_pictures(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs("nan"))
    page.emulate_media(media="print")

    assert page.locator("img:visible").count() == 3
    assert not page.locator("#overview").is_visible()


def test_everything_can_be_reached_with_the_keyboard(made_runs: MakeRun, open_page: Open) -> None:
    page = open_page(made_runs("nan", steps=3000, parameters=4))
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))

    assert {"show-whole", "show-closeup", "filter", "SUMMARY", "BUTTON"} <= reached


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Starts `gradwatch serve` on a free port and says where."""
    started = []

    def start(root: Path) -> str:
        command = [sys.executable, "-m", "gradwatch", "serve", str(root), "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        return next(word for word in line.split() if word.startswith("http"))

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=30)
        if process.stdout:
            process.stdout.close()


def test_a_live_page_shows_a_finding_within_five_seconds_and_new_steps(
    browser: Any, served: Callable[[Path], str], tmp_path: Path
) -> None:
    parameters = synthetic_parameters(4)
    batches = next(synthetic_batches(steps=200, parameters=parameters)).split(100)
    writer = RunWriter(tmp_path / "root" / "run", RunInfo(parameters), flush_every=1)
    writer.write(next(batches))
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    try:
        page.goto(served(tmp_path / "root"))
        page.click("td.name a")
        page.wait_for_selector("#overview .plot-container")
        writer.event("finding", Finding("s", "spike", "warning", 50, 50, message="it jumped <b>").to_json(), sync=True)
        written = time.monotonic()
        page.wait_for_selector("#news >> text=it jumped <b>", timeout=5000)
        assert time.monotonic() - written < 5
        page.wait_for_selector(".story >> text=Gradients spike", timeout=15_000)
        writer.write(next(batches))
        page.wait_for_function("() => document.getElementById('overview').data[0].x.length === 201", timeout=30_000)
        writer.close()
        page.wait_for_selector("#pulse >> text=finished", timeout=15_000)
    finally:
        writer.close()
        context.close()

    assert said == []


def test_the_charts_of_a_comparison_name_run_layer_and_ratio(browser: Any, made_runs: MakeRun, tmp_path: Path) -> None:
    said: list[str] = []
    names = named_parameters(HOSTILE)
    held = compare([made_runs(parameters=names), made_runs("vanishing", name="<i>b", parameters=names)])
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(held.report(tmp_path / "c.html").as_uri())
    page.wait_for_selector("html.js #compared .plot-container")
    texts = page.evaluate("document.getElementById('compared').data.find(t => t.type === 'heatmap').text[0][0]")
    legend = page.locator("#compared .legendtext").all_text_contents()
    page.close()

    assert said == []
    assert legend == list(map(words.visible, held.names))
    assert texts.startswith("<b>&lt;script&gt;alert(1)&lt;/script&gt;</b>")
