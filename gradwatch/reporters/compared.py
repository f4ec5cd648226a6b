"""`Comparison`: aligned runs with everything that can be made from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.reporters.comparison import Alignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Comparison(Alignment):
    """Two or more runs, held against the first of them; made by `compare`."""

    def plot(self, *, theme: str = "light", fig: Any = None) -> Figure:
        """Loss and global norm of all runs, and how the layers of the second differ from the first's."""
        from gradwatch.reporters.figures.comparison import comparison

        return comparison(self, theme=theme, fig=fig)

    def report(self, path: str | os.PathLike[str], format: str | None = None) -> Path:  # noqa: A002
        """Write the comparison as one file: `html`, `md` or `json`, by default what the path ends in."""
        from gradwatch.reporters import comparison_page
        from gradwatch.reporters.output import format_of, write_text

        target = Path(path)
        return write_text(target, comparison_page.render(self, format_of(target, format)))

    def __str__(self) -> str:
        from gradwatch.reporters import comparison_page

        return comparison_page.markdown(self)

    def _repr_html_(self) -> str:
        from gradwatch.reporters import comparison_page

        return comparison_page.card(self)
