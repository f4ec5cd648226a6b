"""The preflight check as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gradwatch.preflight import Preflight

_COLUMNS = (
    ("activation_std", "out std"),
    ("forward_gain", "× fwd"),
    ("output_grad_rms", "grad rms"),
    ("backward_gain", "× back"),
    ("grad_norm", "‖∂W‖"),
    ("saturated_fraction", "flat"),
    ("dead_fraction", "dead"),
)


def print_preflight(check: Preflight, *, console: Console | None = None) -> None:
    """Print the verdict, the cause, the advice and one row per layer."""
    console = console or Console()
    mark = "[bold green]healthy[/]" if check.is_healthy else f"[bold red]{check.verdict}[/]"
    where = f" at layer [bold]{check.where}[/]" if check.where else ""
    console.print(
        f"Preflight: {mark}{where}   loss {check.loss:.4g}   log gradient {check.slope:+.2f} per layer of depth"
    )
    if check.cause:
        console.print(f"  Why: {check.cause}.")
    for number, advice in enumerate(check.advice, 1):
        console.print(f"  {number}. {advice}")
    if check.unused:
        console.print(f"  No gradient reaches {', '.join(check.unused[:6])}.")
    head, rows = layer_cells(check.to_json())
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(head[0])
    table.add_column(head[1], no_wrap=True, min_width=13)
    for title in head[2:]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="red" if row[0] == check.where else None)
    console.print(table)


def layer_cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of layers, without the columns in which nothing was measured.

    Args:
        found: `Preflight.to_json()`, as it stands in the configuration of a run.
    """
    layers = found.get("layers", ())
    shown = [(name, title) for name, title in _COLUMNS if any(layer.get(name) is not None for layer in layers)]
    rows = [
        [str(layer.get("layer", "")), _kind(layer), *(_cell(name, layer.get(name)) for name, _ in shown)]
        for layer in layers
    ]
    return ["layer", "kind", *(title for _, title in shown)], rows


def _kind(layer: Mapping[str, Any]) -> str:
    return "+".join(str(layer[name]) for name in ("kind", "activation") if layer.get(name))


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0%}" if name.endswith("fraction") else f"{value:.2g}"


def plot_preflight(check: Preflight) -> Figure:
    """Forward and backward signal over depth, log scale."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    names = [layer.layer for layer in check.layers]
    depth = range(len(names))
    axes.plot(depth, [layer.activation_std for layer in check.layers], "o-", color="#0072B2", label="output, std")
    axes.plot(
        depth,
        [layer.output_grad_rms for layer in check.layers],
        "s-",
        color="#D55E00",
        label="loss gradient of the output, rms",
    )
    axes.set_yscale("log")
    every = max(1, math.ceil(len(names) / 16))
    axes.set_xticks(
        list(depth)[::every],
        names[::every],
        rotation=45 if len(names) > 8 else 0,
        ha="right" if len(names) > 8 else "center",
    )
    axes.set_xlabel("layer, from input to output")
    axes.set_ylabel("signal per element")
    axes.set_title(f"preflight: {check.verdict}, log gradient {check.slope:+.2f} per layer")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
