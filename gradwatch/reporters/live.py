"""The verdict in a notebook, renewed in place while a cell runs."""

from __future__ import annotations

import importlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gradwatch.errors import ConfigurationError, GradwatchError, MissingDependencyError

if TYPE_CHECKING:
    from gradwatch.reader import RunReader


class Live:
    """Shows a run and renews it from a thread of its own, until the run ends or `stop` is called.

    As the last expression of a cell it starts by itself; around a training in the same notebook use
    `with run.live(): train()`.

    Args:
        run: The run; from now on only this object should refresh it.
        every: Seconds between two looks, above 0.

    Raises:
        ConfigurationError: `every` is not above 0.
    """

    def __init__(self, run: RunReader, *, every: float = 2.0) -> None:
        if not every > 0:
            raise ConfigurationError.of("every", "> 0", every)
        self._run, self._every = run, every
        self._enough = threading.Event()
        self._thread: threading.Thread | None = None
        self._shown: Any = None

    def start(self) -> Self:
        """Show the verdict now and renew it from here on."""
        display = _notebook()
        if self._thread is None:
            self._shown = display.display(display.HTML(self._html()), display_id=True)
            self._thread = threading.Thread(target=self._renew, name="gradwatch-live", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Renew a last time and end the thread."""
        self._enough.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _ipython_display_(self) -> None:
        self.start()

    def _renew(self) -> None:
        display = _notebook()
        is_over = False
        while True:
            # One look more once the run is over: a run that is just closing reads as crashed for a moment.
            last = self._enough.wait(self._every) or is_over
            try:
                self._run.refresh()
                html = self._html()
            except GradwatchError:
                continue
            if self._shown is not None:
                self._shown.update(display.HTML(html))
            if last:
                return
            is_over = self._run.info.status != "running"

    def _html(self) -> str:
        from gradwatch.reporters.summary import summarize

        return summarize(self._run)._repr_html_()


def _notebook() -> Any:
    """`IPython.display`, which is there in every notebook."""
    try:
        return importlib.import_module("IPython.display")
    except ImportError:
        raise MissingDependencyError("'IPython' is not installed: run.live() is for notebooks") from None
