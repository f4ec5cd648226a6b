"""Messages on the terminal, above whatever progress bar is running there."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gradwatch.alerts.channel import Channel
from gradwatch.alerts.message import Group, Message, visible

if TYPE_CHECKING:
    from rich.text import Text

_COLOURS = {"info": "blue", "warning": "yellow", "critical": "red"}


class Console(Channel):
    """Shows messages on standard error, above a running tqdm or rich progress bar, in colour where it is a terminal.

    Args:
        routing: Keyword arguments of `Routing`.

    Examples:
        >>> Console(min_severity="critical")
        Console()
    """

    defaults: ClassVar[Mapping[str, Any]] = {"group_seconds": 0.2, "cooldown": 30.0, "per_hour": 600, "reminder": None}

    def send(self, message: Message) -> None:
        text = rendered(message, colour=bool(getattr(sys.stderr, "isatty", bool)()), width=_width())
        tqdm = sys.modules.get("tqdm")
        if tqdm is not None and hasattr(tqdm, "tqdm"):  # clears its bars, writes, draws them again
            tqdm.tqdm.write(text, file=sys.stderr, end="")
        else:  # while a bar of rich runs, sys.stderr is rich's own and prints above it
            sys.stderr.write(text)
        sys.stderr.flush()


def _width() -> int:
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def rendered(message: Message, *, colour: bool, width: int = 100) -> str:
    """The message as text for a terminal.

    Args:
        message: What to show.
        colour: With colour codes.
        width: Columns.
    """
    from rich import box
    from rich import console as rich_console
    from rich.panel import Panel
    from rich.text import Text

    file = io.StringIO()
    terminal = rich_console.Console(
        file=file, width=width, force_terminal=colour, no_color=not colour, color_system="standard" if colour else None,
        highlight=False, legacy_windows=False,
    )  # fmt: skip
    style = "green" if message.is_resolved else _COLOURS[message.severity]
    body = Text("\n").join(_paragraph(group) for group in message.groups)
    footer = f"{visible(message.run_dir or message.run)}  step {message.step}"
    frame = box.ROUNDED if colour else box.ASCII
    terminal.print(
        Panel(body, title=Text(message.title, f"bold {style}"), title_align="left", subtitle=Text(footer, "dim"),
              subtitle_align="right", border_style=style, box=frame)
    )  # fmt: skip
    return file.getvalue()


def _paragraph(group: Group) -> Text:
    from rich.text import Text

    first, *rest = group.text.split("\n")
    text = Text(first, style="bold")
    for line in rest:
        label, colon, words = line.strip().partition(": ")
        known = colon and label in ("Layers", "Cause", "Advice", "Done")
        text.append("\n")
        text.append(f"{label}: " if known else "", style="not bold dim")
        text.append(words if known else line.strip(), style="not bold")
    return text
