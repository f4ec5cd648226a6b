"""`gradwatch watchdog` and `gradwatch alert-test`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.cli import main
from tests.alerts.receivers import Receiver, receiver, wait_until
from tests.alerts.test_watchdog import has_steps, training


def test_alert_test_sends_one_message_to_each_channel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as server:
        monkeypatch.setenv("GRADWATCH_ALERTS", f"log http://127.0.0.1:{server.port}/hunter2")
        code = main(["alert-test"])

        assert (code, len(server.messages)) == (0, 1)
    assert (
        capsys.readouterr().out == f"Log('gradwatch.alerts'): sent\nWebhook('http://127.0.0.1:{server.port}'): sent\n"
    )


def test_alert_test_says_which_channel_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alert-test", "--to", "log", "--to", "command:false"]) == 1
    assert "Command('false'): RuntimeError: false ended with status 1" in capsys.readouterr().out


def test_without_a_channel_both_say_how_to_name_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADWATCH_ALERTS", raising=False)
    for command in (["alert-test"], ["watchdog", str(tmp_path)]):
        assert main(command) == 2
        assert "no channel: name one with --to, or in the environment's GRADWATCH_ALERTS" in capsys.readouterr().err


def test_the_watchdog_command_tells_of_a_killed_training_and_ends_when_interrupted(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script that tests in the background ignores it
    with receiver() as server, training(tmp_path / "mnist") as process:
        wait_until(has_steps(tmp_path / "mnist"))
        command = [sys.executable, "-m", "gradwatch", "watchdog", str(tmp_path), "--every", "0.2"]
        with subprocess.Popen(command, env=os.environ | {"GRADWATCH_ALERTS": address(server)}) as watchdog:
            try:
                process.kill()
                wait_until(lambda: server.messages, seconds=40)
                watchdog.send_signal(signal.SIGINT)
                assert watchdog.wait(20) == 130
            finally:
                watchdog.kill()

        assert server.messages[0]["groups"][0]["run"] == "mnist"
        assert server.messages[0]["groups"][0]["rule"] == "died"


def address(server: Receiver) -> str:
    return f"http://127.0.0.1:{server.port}/"
