"""Writes reports to files: whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.errors import ConfigurationError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gradwatch.reader import RunReader

FORMATS = ("html", "md", "json")


def format_of(path: Path | None, format_name: str | None) -> str:
    """The format that is asked for, by name or by the path's ending; HTML where neither says anything.

    Raises:
        UnknownNameError: Neither names a known format.
    """
    if format_name is None:
        ending = path.suffix.removeprefix(".").lower() if path else ""
        format_name = {"": "html", "htm": "html", "markdown": "md"}.get(ending, ending)
    if format_name not in FORMATS:
        raise UnknownNameError.among("report format", format_name, FORMATS)
    return format_name


def render(run: RunReader, format_name: str) -> str:
    """The report as text in a known format."""
    if format_name == "html":
        from gradwatch.reporters.html import report

        return report(run)
    from gradwatch.reporters import text
    from gradwatch.reporters.summary import summarize

    return text.markdown(summarize(run)) if format_name == "md" else text.to_json(summarize(run))


def write_report(run: RunReader, path: str | os.PathLike[str] | None = None, format_name: str | None = None) -> Path:
    """Write the report of a run and say where it is; see `Run.report`."""
    target = None if path is None else Path(path)
    kind = format_of(target, format_name)
    return write_text(target if target is not None else run.path / f"report.{kind}", render(run, kind))


def write_text(path: Path, text: str) -> Path:
    """Write the file so that a reader never sees half of it; see `write_bytes`."""
    return write_bytes(path, text.encode())


def write_figure(figure: Figure, path: Path, *, dpi: int) -> Path:
    """Write a figure in the format that the path ends in; see `write_bytes`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=dpi, facecolor=figure.get_facecolor())
    return write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, data: bytes) -> Path:
    """Write the file so that a reader never sees half of it, and a link that lies there is replaced, not followed.

    Raises:
        ConfigurationError: Nothing can be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path
