"""The command `gradwatch`: each command is a door to one reporter.

Exit codes: 0 all well; 1 `check` found something; 2 bad input, or a run that cannot be read; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradwatch.cli_choices import By, Format, Framework, Level, TableFormat, Theme
from gradwatch.errors import ConfigurationError, GradwatchError, UnknownNameError

if TYPE_CHECKING:
    from gradwatch.alerts import Channel
    from gradwatch.run import Run

OK, FOUND, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="gradwatch", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Flight recorder and autopilot of a training run.", rich_markup_mode=None,
    epilog="Exit codes: 0 well; 1 'check' found something; 2 bad input or a run that cannot be read; 130 interrupted.",
)  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(sys.modules["gradwatch"].__version__)
        raise typer.Exit


@app.callback()
def _gradwatch(
    _: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Flight recorder and autopilot of a training run."""


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
To = Annotated[
    list[str] | None,
    typer.Option("--to", "-t", metavar="CHANNEL", help="log, console, command:PROGRAM, an https:// address or one of "
                 "apprise; again for more. By default those in the environment's GRADWATCH_ALERTS."),
]  # fmt: skip
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    command = typer.main.get_command(app)
    try:
        command.main(args=sys.argv[1:] if argv is None else argv, prog_name="gradwatch")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else BAD_INPUT if end.code else OK
    except GradwatchError as error:
        from gradwatch.reporters.words import visible

        typer.echo("\n".join(map(visible, f"gradwatch: {error}".splitlines())), err=True)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


@app.command()
def summary(run: RunPath, as_json: AsJson = False) -> None:
    """Say what happened in a run: verdict, where, since when, why, what was done, what to do now."""
    from gradwatch.reporters import terminal, text

    told = _open(run).summary()
    if as_json:
        typer.echo(text.to_json(told), nl=False)
    else:
        terminal.show(terminal.summary(told))


@app.command()
def report(
    run: RunPath,
    out: Out = None,
    format_: Annotated[
        Format | None, typer.Option("--format", "-f", help="By default what --out ends in, else html.")
    ] = None,
) -> None:
    """Write the report of a run: one self-contained file (by default report.html in the run's directory)."""
    with _busy("Writing the report"):
        path = _open(run).report(out, format=format_)
    typer.echo(path)


@app.command()
def plot(
    run: RunPath,
    kinds: Annotated[
        list[str] | None, typer.Argument(metavar="[FIGURE]...", help="Such as heatmap; all by default.")
    ] = None,
    out: Out = None,
    *,
    theme: Annotated[Theme, typer.Option(help="Colours.")] = Theme.light,
    dpi: Annotated[int, typer.Option(min=20, max=1200, help="Dots per inch.")] = 150,
    suffix: Annotated[str, typer.Option("--type", help="File type: png, svg or pdf.")] = "png",
) -> None:
    """Write figures of a run as files: heatmap, timeline, depth_profile, distribution, update_ratio, saturation."""
    from gradwatch.reporters.output import write_figure

    known = ("heatmap", "timeline", "depth_profile", "distribution", "update_ratio", "saturation")
    if suffix not in ("png", "svg", "pdf"):
        raise UnknownNameError.among("file type", suffix, ("png", "svg", "pdf"))
    opened = _open(run)
    folder = out if out is not None else run / "plots"
    if out is None and folder.is_symlink():
        raise ConfigurationError(f"{folder} is a symbolic link, which gradwatch does not follow: say --out")
    for kind in kinds or known:
        if kind not in known:
            raise UnknownNameError.among("figure", kind, known)
        with _busy(f"Drawing {kind}"):
            figure = getattr(opened.plot, kind)(theme=theme)
            path = write_figure(figure, folder / f"{kind}.{suffix}", dpi=dpi)
        typer.echo(path)


@app.command()
def tail(
    run: RunPath,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
) -> None:
    """Follow a run while it is being written: loss, rate, the worst layers, findings as they come."""
    from gradwatch.reporters.tail import follow

    follow(_open(run), every=every, once=once)


@app.command()
def serve(
    root: Annotated[Path, typer.Argument(metavar="RUN_OR_ROOT", help="A run, or a directory with runs below it.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8378,
    token: Annotated[
        str | None, typer.Option(envvar="GRADWATCH_TOKEN", help="What a browser must know to be let in.")
    ] = None,
) -> None:
    """Show runs as live pages in the browser; read-only, on this machine alone unless told otherwise."""
    from gradwatch.reporters.serving import serve as start

    start(root, host=host, port=port, token=token)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more runs; the first is the reference.")],
    out: Out = None,
    by: Annotated[By, typer.Option(help="What they are aligned on.")] = By.step,
    as_json: AsJson = False,
) -> None:
    """Hold runs against each other: verdicts, where the first two part, how their layers differ."""
    from gradwatch.reporters import comparison_page
    from gradwatch.run import compare as held

    compared = held(runs, by=by)
    if as_json:
        typer.echo(comparison_page.to_json(compared), nl=False)
    else:
        from gradwatch.reporters import terminal

        terminal.show(terminal.comparison(*comparison_page.run_rows(compared), comparison_page.partings(compared)))
    if out is not None:
        typer.echo(compared.report(out), err=as_json)


@app.command()
def export(
    run: RunPath,
    what: Annotated[
        str, typer.Option(help="grad_norms, metrics, parameters, findings, actions, a statistic, or everything.")
    ] = "grad_norms",
    out: Out = None,
    format_: Annotated[
        TableFormat | None, typer.Option("--format", "-f", help="By default what --out ends in, else csv.")
    ] = None,
    by: Annotated[str, typer.Option(help="parameter or layer, for grad_norms.")] = "parameter",
    *,
    overwrite: Overwrite = False,
) -> None:
    """Write a table of the record as CSV, Parquet or JSON lines, to a file or to standard output.

    Everything, one row a step, goes to a file, or as TensorBoard event files to a directory.
    """
    if what == "everything" or format_ is TableFormat.tensorboard:
        from gradwatch.export import export_run

        if out is None:
            raise ConfigurationError.of("--out", "given for everything", None)
        typer.echo(export_run(_open(run), out, format=format_, overwrite=overwrite))
        return
    from gradwatch.reporters.tables import write_table

    path = write_table(_open(run), what, out, format_name=format_, by=by)
    if path is not None:
        typer.echo(path)


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(help="CSV file, or directory of TensorBoard event files.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory to write.")],
    step: Annotated[str | None, typer.Option(help="Column of a CSV file that counts the steps.")] = None,
    *,
    overwrite: Overwrite = False,
) -> None:
    """Make a run out of what another tool logged, so that the same detectors and reports work on it."""
    from gradwatch.imports import import_run

    with _busy("Reading the table"):
        path = import_run(source, run, step=step, overwrite=overwrite)
    typer.echo(path)


@app.command()
def check(
    run: RunPath,
    rules: Annotated[Path | None, typer.Option(help="TOML file with thresholds, one table per rule.")] = None,
    fail_on: Annotated[Level, typer.Option(help="The least severity that fails the check.")] = Level.warning,
    as_json: AsJson = False,
) -> None:
    """Run the detectors over the record again; exit 1 when a finding at or above --fail-on exists."""
    from gradwatch.records import SEVERITIES
    from gradwatch.reporters import terminal
    from gradwatch.reporters.checking import findings_of

    with _busy("Replaying the record"):
        found = findings_of(_open(run), rules)
    failing = [f for f in found if SEVERITIES.index(f.severity) >= SEVERITIES.index(fail_on.value)]
    if as_json:
        value = {
            "run": str(run),
            "fail_on": fail_on.value,
            "failed": bool(failing),
            "findings": [f.to_json() for f in found],
        }
        typer.echo(json.dumps(value, indent=2))
    else:
        terminal.show(terminal.findings(found, failing=len(failing), level=fail_on.value))
    raise typer.Exit(FOUND if failing else OK)


@app.command(name="list")
def list_(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Directory with runs below it.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """List the runs under a directory: verdict, status, steps, worst finding, last sign of life."""
    from gradwatch.reporters import terminal
    from gradwatch.reporters.listing import describe, find_runs

    if not root.is_dir():
        raise ConfigurationError.of("ROOT", "a directory", str(root))
    with _busy("Looking for runs"):
        rows = [describe(path, root) for path in find_runs(root)]
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows], indent=2))
    elif rows:
        terminal.show(terminal.runs(rows))
    else:
        typer.echo(f"No run under {root}.")


@app.command()
def compact(
    run: RunPath,
    keep_last: Annotated[
        int | None, typer.Option(min=0, help="Keep the last so many steps in full; all by default.")
    ] = None,
    around: Annotated[int, typer.Option(min=0, help="With --keep-last: also so many around each finding.")] = 500,
    first: Annotated[int, typer.Option(min=0, help="With --keep-last: also the first so many.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Put a record in order after a crash, and thin out old steps if asked to; the rollups keep every extreme."""
    from gradwatch.compact import Keep, compact_run
    from gradwatch.reporters import words

    with _busy("Compacting"):
        sizes = compact_run(run, keep=None if keep_last is None else Keep(keep_last, around=around, first=first))
    if as_json:
        typer.echo(json.dumps(sizes))
        return
    for what, said in (("bytes", words.size), ("steps", words.step)):
        typer.echo(f"{what}: {said(sizes[f'{what}_before'])} → {said(sizes[f'{what}_after'])}")


@app.command()
def watchdog(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="A run, or a directory with runs below it.")],
    to: To = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 10.0,
    silence: Annotated[float, typer.Option(min=1.0, help="Seconds without a sign of life that are too long.")] = 60.0,
) -> None:
    """Tell people when a training dies, freezes or stands still, until interrupted."""
    from gradwatch.watchdog import Limits, watch_root

    watch_root(root, _channels(to), every=every, limits=Limits(silence=silence))


@app.command(name="alert-test")
def alert_test(to: To = None) -> None:
    """Send a test message to each channel; exit 1 when one fails."""
    from gradwatch.alerts import alert_test as send

    outcomes = send(_channels(to))
    for outcome in outcomes:
        typer.echo(f"{outcome.channel}: {outcome.error or 'sent'}")
    raise typer.Exit(OK if all(outcome.is_sent for outcome in outcomes) else FOUND)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the three runs.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the digits.")] = 0,
    framework: Annotated[
        Framework, typer.Option(help="keras: on the backend that KERAS_BACKEND names.")
    ] = Framework.torch,
) -> None:
    """Train a small network on real digits three times: healthy, sabotaged, sabotaged and helped. About two minutes."""
    from rich.progress import Progress

    from gradwatch import demo, demo_keras
    from gradwatch.reporters import terminal

    run_demo = demo_keras.run_demo if framework is Framework.keras else demo.run_demo
    with Progress(transient=not sys.stdout.isatty()) as progress:
        outcomes = run_demo(out, progress=progress, seed=seed)
    rows = [[o.act.title, f"{o.accuracy:.1%}", f"{o.final_loss:.3g}", f"{o.seconds:.0f} s"] for o in outcomes]
    terminal.show(terminal.grid(["training", "test accuracy", "final loss", "took"], rows))
    runs = [_open(o.run_dir) for o in outcomes]
    for opened in runs:
        terminal.show(terminal.brief(opened.summary()))
    _reports(runs, out)


def _reports(runs: list[Run], out: Path) -> None:
    from gradwatch.run import compare as held

    with _busy("Writing the reports"):
        paths = [opened.report() for opened in runs]
        overview = held(runs).report(out / "comparison.html")
    for path in paths:
        typer.echo(f"report: {path}")
    typer.echo(f"comparison: {overview}")


def _channels(names: list[str] | None) -> list[Channel]:
    from gradwatch.alerts import channel_named, channels_from_environment

    channels = [channel_named(name) for name in names] if names else channels_from_environment()
    if not channels:
        raise ConfigurationError("no channel: name one with --to, or in the environment's GRADWATCH_ALERTS")
    return channels


def _open(path: Path) -> Run:
    from gradwatch.run import load

    return load(path)


def _busy(words: str) -> AbstractContextManager[Any]:
    """A spinner on standard error while something takes long; nothing in a pipe."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(f"{words} …")
