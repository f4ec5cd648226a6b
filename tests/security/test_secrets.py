"""Passwords, tokens and addresses of the configuration: nowhere but in memory and on the way to their receiver."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import gradwatch as gw
from gradwatch import alerts
from gradwatch.alerts.routing import RoutingOptions
from gradwatch.errors import GradwatchError, RunNotFoundError
from gradwatch.faults import Faults
from gradwatch.records import Parameter, RunInfo
from gradwatch.redaction import without_credentials
from gradwatch.sinks import Sink
from gradwatch.sinks.rows import Row
from gradwatch.watcher import Watcher

SECRET = "hunter2"  # noqa: S105 -- made up
NOBODY = "127.0.0.1:9"


class Tracker(Sink):
    """A sink whose tool complains with the address it was given, as HTTP clients do."""

    def begin(self, info: RunInfo, run_dir: Path) -> None: ...

    def write(self, rows: list[Row]) -> None:
        raise ConnectionError(f"Max retries exceeded: https://me:{SECRET}@tracker.example/api?token={SECRET}")

    def tell(self, news: object) -> None: ...

    def end(self, status: str) -> None: ...


def channels() -> list[alerts.Channel]:
    routing: RoutingOptions = {"group_seconds": 0.0, "close_seconds": 5.0}
    fails = "import sys; sys.exit('cannot: ' + ' '.join(sys.argv[1:]))"
    return [
        alerts.Webhook(f"http://me:{SECRET}@{NOBODY}/{SECRET}?token={SECRET}", secret=SECRET,
                       headers={"X-Key": SECRET}, **routing),
        alerts.Command([sys.executable, "-c", fails, f"--token={SECRET}"], **routing),
    ]  # fmt: skip


def texts_under(folder: Path) -> str:
    """Every file as text; of Parquet, whose pages are compressed, the metadata and words too."""
    found = ""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found += path.name + path.read_bytes().decode("utf-8", errors="replace")
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found += f"{table.schema} {table.schema.metadata} {table.to_pylist()}"
    return found


def test_no_secret_is_recorded_logged_reported_or_shown(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = channels()
    for variable in ("GRADWATCH_WEBHOOK_SECRET", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(variable, SECRET)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--password={SECRET}"])
    with caplog.at_level(logging.INFO):
        with Watcher([Parameter("fc.weight")], run_dir=run_dir, alerts=given, sinks=[Tracker(every=1)]) as watcher:
            for step in range(40):
                watcher.observe(grad_norm=np.array([np.nan if step > 20 else 1.0]), loss=1.0)
            shown = f"{watcher!r} {given!r} {watcher._repr_html_()}"
        run = gw.load(run_dir)
        run.report()
        run.report(run_dir / "report.json")
        shown += f"{run!r} {run.summary()} {run.info}"

    assert "cannot deliver" in caplog.text
    assert SECRET not in shown + caplog.text + "".join(capfd.readouterr()) + texts_under(run_dir.parent)


@pytest.mark.parametrize(
    "make",
    [
        lambda: alerts.Webhook(f"ftp://me:{SECRET}@host/{SECRET}"),
        lambda: alerts.Webhook(f"https://me:{SECRET}@host/", timeout=-1),
        lambda: alerts.Webhook(f"https://me:{SECRET}@host/", secret=SECRET, min_severity="loud"),  # type: ignore[arg-type]
        lambda: gw.load(f"nosuchscheme://me:{SECRET}@host/run?token={SECRET}"),
        lambda: gw.load(f"memory://me:{SECRET}@host/run?token={SECRET}"),
        lambda: Watcher([Parameter("w")], alerts=f"https://me:{SECRET}@host/"),
        lambda: Watcher([Parameter("w")], run_dir="never", alerts=[f"https://me:{SECRET}@host/", 7]),  # type: ignore[list-item]
    ],
)  # fmt: skip
def test_no_error_message_shows_a_secret(make: object) -> None:
    assert callable(make)
    with pytest.raises((GradwatchError, RunNotFoundError)) as caught:
        make()

    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


def test_a_fault_is_recorded_without_the_address_it_names() -> None:
    faults = Faults()
    faults.note("sinks", ConnectionError(f"https://me:{SECRET}@host/?key={SECRET} is down"))

    assert faults.messages == {"sinks": "ConnectionError: https://***@host/?*** is down"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("see https://docs.example/page", "see https://docs.example/page"),
        ("mail me@example.org", "mail me@example.org"),
        ("a://u:p@h/x b://v@i/y?z=1", "a://***@h/x b://***@i/y?***"),
        ("url='http://h/?k=v'", "url='http://h/?***'"),
    ],
)
def test_only_credentials_are_taken_out_of_addresses(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_what_the_training_itself_raised_is_recorded_as_it_is(run_dir: Path) -> None:
    """What the user's own code says is not ours to judge; the page says so."""
    watcher = Watcher([Parameter("w")], run_dir=run_dir)
    watcher.close("crashed", "RuntimeError: tries me@host")

    assert gw.load(run_dir).info.status_detail == "RuntimeError: tries me@host"
