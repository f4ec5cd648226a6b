"""Draw the pictures of rules and actions from the runs that their pages train: `python docs/scripts/pictures.py`."""

from __future__ import annotations

import os
import re
import sys
import tempfile

import gradwatch as gw
from tests.docs.blocks import run_page
from tests.sizes import ROOT

_PICTURE = re.compile(r"^!\[([\w ]+) of this run\]\(\.\./images/(\w+)/(\w+)\.png\)", re.MULTILINE)


def main(wanted: list[str]) -> None:
    """Run each page and draw the figure that its picture is called after."""
    for page in sorted([*(ROOT / "docs" / "rules").glob("*.md"), *(ROOT / "docs" / "actions").glob("*.md")]):
        picture = _PICTURE.search(page.read_text(encoding="utf-8"))
        if picture is None or (wanted and page.stem not in wanted):
            continue
        target = ROOT / "docs" / "images" / picture[2] / f"{picture[3]}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run_page(page)
            figure = getattr(gw.load(f"runs/{page.stem}").plot, picture[1].replace(" ", "_"))()
            figure.savefig(target, dpi=70)
            os.chdir(ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
