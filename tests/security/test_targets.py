"""Whom gradwatch talks to: the addresses that its user gave, and nobody else."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwatch as gw
from gradwatch import alerts
from gradwatch.alerts import Message
from gradwatch.alerts.message import Group
from gradwatch.errors import ConfigurationError
from gradwatch.records import Finding, Parameter
from gradwatch.testing import write_run
from gradwatch.watcher import Watcher
from tests.alerts.receivers import Receiver, receiver

LOCAL_FILE = "file:" + "///etc/passwd"
PLACES = ("http://169.254.169.254/latest/meta-data", LOCAL_FILE, "https://attacker.example/x.png")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Refuses every connection and every look-up of a name, and says which were tried."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    return tried


@pytest.fixture
def server() -> Iterator[Receiver]:
    with receiver() as made:
        yield made


def test_watching_and_reporting_talk_to_nobody(run_dir: Path, offline: list[Any]) -> None:
    with Watcher([Parameter("fc.weight")], run_dir=run_dir) as watcher:
        for step in range(60):
            watcher.observe(grad_norm=np.array([2.0**step]), loss=float(step))
    gw.load(run_dir).report()

    assert offline == []


def test_an_address_in_a_run_is_not_asked(run_dir: Path, offline: list[Any]) -> None:
    found = [
        Finding(f"f{i}", "exploding", "critical", 5, 9, layers=(p,), message=p, cause=p, advice=(p,), evidence={p: 1.0})
        for i, p in enumerate(PLACES)
    ]
    parameters = tuple(Parameter(place, layer=place, depth=i) for i, place in enumerate(PLACES))
    write_run(run_dir, steps=20, parameters=parameters, findings=found, config={"alerts": PLACES, "origin": PLACES[0]})
    run = gw.load(run_dir)
    run.report()
    run.summary()

    assert offline == []


@pytest.mark.parametrize("url", [LOCAL_FILE, "ftp://host/x", "gopher://host", "data:,x", "//host/x", "http://"])
def test_a_webhook_goes_to_http_only(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"'url' must be an https:// or http:// address with a host"):
        alerts.Webhook(url)


def test_a_webhook_follows_no_redirection(server: Receiver) -> None:
    server.behave = "redirect"
    [outcome] = alerts.alert_test([alerts.Webhook(f"http://me:hunter2@127.0.0.1:{server.port}/hook")])

    assert "answered 302" in outcome.error
    assert server.tried == 1


def test_a_name_in_a_message_cannot_choose_the_address_or_a_header(server: Receiver) -> None:
    channel = alerts.Webhook(f"http://me:pass@127.0.0.1:{server.port}/hook")
    group = Group("exploding", "firing", "critical", 1, 0, 0, layers=PLACES)
    channel.send(Message("x\r\nHost: attacker.example\r\nX-Evil: 1", run_dir=PLACES[0], groups=(group,)))
    [(headers, _)] = server.requests

    assert headers["Host"] == f"127.0.0.1:{server.port}"
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"me:pass").decode()
    assert "X-Evil" not in headers
