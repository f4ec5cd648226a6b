"""`run.plot`: every figure of a run, with the choices a person makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigurationError
from gradwatch.records import ActionRecord
from gradwatch.reporters import figures
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.figures.remedy import AROUND
from gradwatch.reporters.summary import Summary, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradwatch.reader import RunReader

Layers = str | Sequence[str] | None
#: Columns of a picture: more than a print of this size can tell apart.
COLUMNS = 600
MOST_PANELS = 6


class Plots:
    """The figures of a run.

    Every method returns a matplotlib Figure that needs no pyplot and shows itself in a notebook. All take `theme`
    (`light` or `dark`) and `fig` (a Figure or SubFigure to draw on); those with one panel also take `ax`.

    Args:
        run: The run.

    Examples:
        >>> run.plot.heatmap(layers="encoder.*").savefig("heatmap.png")  # doctest: +SKIP
    """

    def __init__(self, run: RunReader) -> None:
        self._run = run

    def heatmap(
        self,
        *,
        layers: Layers = None,
        steps: slice | None = None,
        theme: str = "light",
        fig: Any = None,
        ax: Axes | None = None,
    ) -> Figure:
        """Layers by depth against steps, coloured by the gradient norm; findings outlined, actions marked.

        Args:
            layers: Only these: a name, a pattern such as `encoder.*`, or a list of them.
            steps: Only these steps, such as `slice(1000, 2000)`.
            theme: `light` or `dark`.
            fig: Figure to draw on.
            ax: Axes to draw on.
        """
        digest, told = self._digest(steps).only(layers), self._told()
        return figures.heatmap(digest, told.chapters, told.actions, root=told.root, theme=theme, fig=fig, ax=ax)

    def timeline(self, *, steps: slice | None = None, theme: str = "light", fig: Any = None) -> Figure:
        """Loss, global norm before and after clipping, learning rate and skipped steps; findings as spans."""
        told = self._told()
        return figures.timeline(self._digest(steps), told.chapters, told.actions, root=told.root, theme=theme, fig=fig)

    def depth_profile(
        self,
        steps: Sequence[int] | None = None,
        *,
        layers: Layers = None,
        theme: str = "light",
        fig: Any = None,
        ax: Axes | None = None,
    ) -> Figure:
        """The norm over depth at chosen steps, with the line that fits best: its slope is vanishing or exploding."""
        window = None if steps is None or len(steps) == 0 else slice(min(steps), max(steps) + 1)
        digest = self._digest(window).only(layers)
        return figures.depth_profile(digest, steps=steps, root=self._told().root, theme=theme, fig=fig, ax=ax)

    def distribution(
        self, *, layers: Layers = None, steps: slice | None = None, theme: str = "light", fig: Any = None
    ) -> Figure:
        """Quantile bands of the norm over time, a panel per layer; by default the worst and some over the depth."""
        chosen = self._telling_layers() if layers is None else layers
        norms = self._run.grad_norms(by="layer", layers=chosen, steps=steps)
        return figures.distribution(norms, theme=theme, fig=fig)

    def update_ratio(
        self,
        *,
        layers: Layers = None,
        steps: slice | None = None,
        theme: str = "light",
        fig: Any = None,
        ax: Axes | None = None,
    ) -> Figure:
        """The updates' size relative to the weights' against the usual band."""
        ratios = self._run.statistic("update_ratio", layers=layers, steps=steps)
        return figures.update_ratio(ratios, theme=theme, fig=fig, ax=ax)

    def saturation(self, *, layers: Layers = None, theme: str = "light", fig: Any = None) -> Figure:
        """The saturated and the dead share of each module's output over steps."""
        names = ("saturated_fraction", "dead_fraction")
        return figures.saturation({n: self._run.statistic(n, layers=layers) for n in names}, theme=theme, fig=fig)

    def before_after(self, action: ActionRecord | str | int = 0, *, theme: str = "light", fig: Any = None) -> Figure:
        """The norms around an action.

        Args:
            action: An ActionRecord, its id, or its place among the run's actions.
            theme: `light` or `dark`.
            fig: Figure to draw on.

        Raises:
            ConfigurationError: There is no such action.
        """
        record = action if isinstance(action, ActionRecord) else self._action(action)
        window = slice(max(0, record.step - AROUND), record.step + AROUND)
        return figures.before_after(self._digest(window), record, theme=theme, fig=fig)

    def _action(self, wanted: str | int) -> ActionRecord:
        actions = self._run.action_list()
        if isinstance(wanted, int) and -len(actions) <= wanted < len(actions):
            return actions[wanted]
        found = [a for a in actions if a.id == wanted]
        if not found:
            raise ConfigurationError.of("action", f"the id or place of one of the run's {len(actions)} actions", wanted)
        return found[0]

    def _digest(self, steps: slice | None = None) -> Digest:
        return Digest.of(self._run, COLUMNS, steps=steps)

    def _told(self) -> Summary:
        return summarize(self._run)

    def _telling_layers(self) -> list[str]:
        """The layers of the trouble, the first, the last, and some between; as names, not as patterns."""
        parameters = self._run.info.parameters
        order = list(dict.fromkeys(p.layer for p in sorted(parameters, key=lambda p: p.depth)))
        root = self._told().root
        worst = [name for name in (root.layers[:2] if root else ()) if name in order]
        spread = [order[round(i * (len(order) - 1) / 5)] for i in range(6)] if order else []
        chosen = set(list(dict.fromkeys([*worst, *spread]))[:MOST_PANELS])
        return [name for name in order if name in chosen]
