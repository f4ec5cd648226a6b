"""Names of layers and metrics, as whoever wrote the model or the run directory chose them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gradwatch import alerts
from gradwatch.alerts import Message
from gradwatch.alerts.console import rendered
from gradwatch.alerts.message import Group
from gradwatch.cli import main
from gradwatch.reader import RunReader
from gradwatch.records import Finding, RunInfo
from gradwatch.testing import write_run
from gradwatch.writer import RunWriter
from tests.record.building import batch_of
from tests.reporters.conftest import HOSTILE, named_parameters

PATHS = ("../../escaped", "/absolute", "a/../../b", "nul\0byte", "con", "-rf", "~", "*", "${HOME}", "`id`", "'; rm x")


def test_names_never_become_names_of_files(run_dir: Path) -> None:
    parameters = named_parameters(PATHS)
    writer = RunWriter(run_dir, RunInfo(parameters))
    writer.write(batch_of(range(3), parameters=parameters, metrics=PATHS))
    writer.close()
    files = {path.relative_to(run_dir.parent).as_posix() for path in run_dir.parent.rglob("*") if path.is_file()}

    stem = "000000-000000000000"
    assert files == {
        "run/run.json", "run/events.jsonl", "run/writer.lock",
        f"run/steps/{stem}.parquet", f"run/rollups/{stem}.parquet",
    }  # fmt: skip
    assert RunReader(run_dir).names("grad_norm") == tuple(parameter.name for parameter in parameters)


@pytest.mark.parametrize("command", ["summary", "tail --once", "check", "list", "compare", "report"])
def test_no_command_lets_a_name_write_to_the_terminal(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Finding(f"f{i}", "exploding", "critical", 5, 9, layers=(name,), message=name, cause=name, advice=(name,))
        for i, name in enumerate(HOSTILE)
    ]
    path = write_run(tmp_path / "\x1b[2Jrun", steps=20, parameters=named_parameters(HOSTILE), findings=found)
    verb, *options = command.split()
    given = {"list": [path.parent], "compare": [path, path]}.get(verb, [path])
    main([verb, *map(str, given), *options])
    shown = "".join(capsys.readouterr())

    assert shown
    assert not {ch for ch in shown if not ch.isprintable()} - {"\n"}


def test_an_error_lets_no_name_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["summary", str(tmp_path / "\x1b[2Jnowhere")])

    assert "\\x1b[2Jnowhere does not exist" in capsys.readouterr().err


def test_a_message_on_the_console_carries_no_control_of_a_name() -> None:
    group = Group("exploding", "firing", "critical", 1, 5, 5, ("\x1b[31mfc",), 1, message="\x1b]0;title\x07")
    shown = rendered(Message("\x1b[2Jrun", "/runs/\x1b[2Jrun", groups=(group,)), colour=False)

    assert not {ch for ch in shown if not ch.isprintable()} - {"\n"}


def test_a_run_named_like_an_option_is_a_text_to_a_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"import sys, pathlib; pathlib.Path({str(out)!r}).write_text(repr(sys.argv[1:]))"
    channel = alerts.Command([sys.executable, "-c", program, "{text}", "--body={text}"])
    channel.send(Message("--exec=evil", groups=(Group("died", "firing", "critical", 1, 0, 0, run="--exec=evil"),)))

    first, second = eval(out.read_text())  # noqa: S307 -- what the test itself has just written
    assert first.startswith(" --exec=evil died")
    assert second.startswith("--body=--exec=evil died")


def test_a_command_is_given_texts_and_no_shell_reads_them(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    channel = alerts.Command([sys.executable, "-c", "pass", "{title}", "{text}"])
    channel.send(Message(f"$(touch {trace})`touch {trace}`; touch {trace} #", groups=(Group(
        "exploding", "firing", "critical", 1, 0, 0, (f"$(touch {trace})",), 1),)))  # fmt: skip

    assert not trace.exists()
