"""What all pages are made of: templates that escape everything, files beside them, pictures, the policy."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gradwatch.reporters import words
from gradwatch.reporters.verdict import STATE_WORDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 90


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates' surroundings: everything is escaped, an unknown name is an error."""
    env = Environment(loader=PackageLoader("gradwatch.reporters"), autoescape=True, undefined=StrictUndefined)
    env.globals.update(
        step=words.step, number=words.number, moment=words.moment, plural=words.plural, visible=words.visible,
        listing=words.listing, percent=words.percent, states=STATE_WORDS, version=version(),
    )  # fmt: skip
    return env


def asset(name: str) -> Markup:
    """A file beside the templates, as it is."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))  # noqa: S704 -- our own file  # nosec B704


def plotly_js() -> Markup:
    """The library that draws the charts, from the plotly package."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # noqa: S704 -- a file of a package  # nosec B704


def script_json(value: Any) -> Markup:
    r"""JSON that can stand in a script element, whatever strings are in it.

    Examples:
        >>> print(script_json({"layer": "</script><b>"}))
        {"layer":"\u003c/script\u003e\u003cb\u003e"}
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 -- no sign of markup is left  # nosec B704


def policy(scripts: Sequence[str] = ()) -> str:
    """A content-security policy that lets these scripts run, told by their hash, and nothing be loaded."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def image(figure: Figure, alt: str) -> dict[str, Any]:
    """A figure as the attributes of an `img` element, with few enough colours to stay small."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    # This method keeps rare colours: a legend's thin line must not take the colour of its neighbour.
    reduced = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    reduced.save(small, format="png", optimize=True)
    width, height = figure.get_size_inches() * DPI
    data = base64.b64encode(small.getvalue()).decode()
    return {"src": f"data:image/png;base64,{data}", "alt": alt, "width": int(width), "height": int(height)}


def version() -> str:
    """The version of gradwatch."""
    try:
        return importlib.metadata.version("gradwatch")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
