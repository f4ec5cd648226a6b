"""Draw the pictures of the README from the runs of `make demo`: `python docs/scripts/readme.py RUNS`.

The report is a photograph of its page, for which a chromium must be installed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

import gradwatch as gw
from tests.reporters.test_browser import EXECUTABLE, FLAGS
from tests.sizes import ROOT

IMAGES = ROOT / "docs" / "images"
#: Run of the demo to what its picture is called.
TITLES = {
    "1-healthy": "healthy", "2-sabotaged": "learning rate 30 times too high", "3-repaired": "the same, with actions",
}  # fmt: skip


def heatmaps(runs: Path) -> None:
    """The three runs side by side."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    for part, (name, title) in zip(figure.subfigures(1, 3, wspace=0.03), TITLES.items(), strict=True):
        part.suptitle(title, fontsize=12, fontweight="bold")
        gw.load(runs / name).plot.heatmap(fig=part)
    figure.savefig(IMAGES / "heatmaps.png", dpi=80)


def report(runs: Path) -> None:
    """The first screen of the sick run's page."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = gw.load(runs / "2-sabotaged").report(Path(folder) / "report.html")
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=list(FLAGS))
        opened = browser.new_page(viewport={"width": 1366, "height": 740})
        opened.goto(page.as_uri())
        opened.wait_for_selector("html.js #overview .plot-container")
        opened.screenshot(path=IMAGES / "report.png")
        browser.close()


if __name__ == "__main__":
    heatmaps(Path(sys.argv[1]))
    report(Path(sys.argv[1]))
