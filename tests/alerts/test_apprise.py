"""Through apprise: mail over SMTP, JSON over HTTP, several addresses of which some fail."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message as Mail
from pathlib import Path
from typing import Any

import pytest

from gradwatch.alerts import Apprise, alert_test, courier
from gradwatch.errors import ConfigurationError
from tests.alerts.receivers import INFO, finding, receiver, wait_until
from tests.alerts.test_delivery import batch

pytestmark = pytest.mark.needs("alerts")
SECRET = "hunter2"  # noqa: S105 -- made up
FAST: dict[str, Any] = {"group_seconds": 0.0, "cooldown": 0.0, "reminder": None, "stall": None}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "FIRST_RETRY", 0.02)
    monkeypatch.setattr(courier, "LAST_RETRY", 0.1)


class Mailbox:
    """A mail server on loopback, and what it got."""

    def __init__(self) -> None:
        from aiosmtpd.controller import Controller

        self.mails: list[Mail] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port)
        self._controller.start()

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 -- the library's name
        self.mails.append(message_from_bytes(envelope.content))
        return "250 OK"

    def close(self) -> None:
        self._controller.stop()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    box = Mailbox()
    yield box
    box.close()


def test_mail_arrives_with_subject_text_and_picture(mailbox: Mailbox, tmp_path: Path) -> None:
    channel = Apprise(f"mailto://127.0.0.1:{mailbox.port}?from=a@example.org&to=b@example.org&mode=insecure", **FAST)
    channel.open(INFO, tmp_path / "mnist")
    for step in range(30):
        channel.steps(batch(step, norm=2.0**step))
    channel.finding(finding())
    wait_until(lambda: mailbox.mails)
    channel.close()

    [mail] = mailbox.mails
    assert mail["Subject"] == "[CRITICAL] mnist: exploding in conv1"
    parts: dict[str, Any] = {part.get_content_type(): part.get_payload(decode=True) for part in mail.walk()}
    text = next(content for kind, content in parts.items() if kind.startswith("text/"))
    assert b"Cause: a rate too high" in text
    assert parts["image/png"][:4] == b"\x89PNG"


def test_only_the_address_that_failed_is_tried_again(tmp_path: Path) -> None:
    with receiver() as good, receiver() as bad:
        bad.behave = "refuse"
        channel = Apprise([f"json://127.0.0.1:{good.port}", f"json://127.0.0.1:{bad.port}"], **FAST)
        channel.open(INFO, tmp_path)
        channel.finding(finding())
        wait_until(lambda: bad.tried >= 2)
        bad.behave = "ok"
        wait_until(lambda: bad.messages)
        channel.close()

        assert (len(good.messages), len(bad.messages)) == (1, 1)


@pytest.mark.parametrize("behave", ["refuse", "hang", "cut", "nobody"])
def test_no_failure_shows_a_secret(behave: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with receiver() as server:
        server.behave = behave
        port = server.port
        if behave == "nobody":
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        channel = Apprise(f"json://me:{SECRET}@127.0.0.1:{port}/{SECRET}?cto=0.5&rto=0.5", **FAST)
        with caplog.at_level(logging.INFO):
            [outcome] = alert_test([channel])
        server.released.set()

    assert outcome.error == "ConnectionError: apprise could not deliver to json; its log says why"
    assert outcome.channel == "Apprise(json)"
    assert SECRET not in caplog.text


def test_addresses_may_stand_in_a_file(tmp_path: Path) -> None:
    config = tmp_path / "apprise.yml"
    config.write_text("urls:\n  - json://localhost\n  - slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ\n")

    assert repr(Apprise(str(config))) == "Apprise(json, slack)"


def test_an_address_that_is_none_is_named_by_its_place() -> None:
    with pytest.raises(
        ConfigurationError, match=r"'urls\[1\]' must be an address that apprise understands: slak$"
    ) as caught:
        Apprise(["json://localhost", f"slak://{SECRET}"])
    assert SECRET not in str(caught.value)


def test_no_address_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="'urls' must be at least one address"):
        Apprise([])
