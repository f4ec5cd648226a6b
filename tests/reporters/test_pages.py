from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from gradwatch.errors import ConfigurationError
from gradwatch.reporters.access import is_local, token_for
from gradwatch.reporters.pages import MOST_OPEN, Library, live_app
from gradwatch.reporters.serving import serve
from gradwatch.testing import write_run
from tests.reporters.conftest import ENGINE, HOSTILE, MakeRun, named_parameters
from tests.reporters.test_html import Outline

EVERYWHERE = "0.0.0.0"  # noqa: S104 -- nothing listens there, the application is only told


@pytest.fixture(autouse=True)
def workers_have_ended() -> Iterator[None]:
    """The test client's server is told to end its threads, but not waited for."""
    yield
    for thread in threading.enumerate():
        if thread.name == "AnyIO worker thread":
            thread.join(timeout=30)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path / "root" / "a", steps=30, parameters=4, config={"detectors": ENGINE.config()})
    write_run(tmp_path / "root" / "deep" / "b", steps=30, parameters=4, scenario="nan")
    write_run(tmp_path / "secret", steps=30, parameters=4)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    return tmp_path / "root"


@pytest.fixture
def client(root: Path) -> Iterator[TestClient]:
    with TestClient(live_app(root), base_url="http://127.0.0.1") as client:
        yield client


def test_the_list_names_every_run(client: TestClient) -> None:
    page = Outline(client.get("/").text)

    assert {a["href"] for a in page.all("a")} == {"run?name=a", "run?name=deep/b"}
    assert "Healthy" in page.text


def test_a_root_that_is_a_run_leads_to_its_page(root: Path) -> None:
    with TestClient(live_app(root / "a"), base_url="http://127.0.0.1") as client:
        answer = client.get("/")

    assert answer.url.params["name"] == "."
    assert "Nothing is wrong" in answer.text


def test_a_run_has_a_page_that_loads_only_from_the_server(client: TestClient) -> None:
    answer = client.get("/run", params={"name": "deep/b"})
    page = Outline(answer.text)

    assert answer.status_code == 200
    assert [s["src"] for s in page.all("script") if s.get("src")] == [
        "static/plotly.js",
        "static/page.js",
        "static/live.js",
    ]
    assert "script-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["page.css", "page.js", "live.js", "plotly.js"])
def test_what_a_page_loads_is_there(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 200


@pytest.mark.parametrize(
    "name", ["../secret", "link", "/etc", "a/../../secret", "..", "", "a/steps", "deep", "a\x00", "%2e%2e/secret"]
)
@pytest.mark.parametrize("path", ["/run", "/state"])
def test_nothing_outside_of_the_root_and_nothing_that_is_no_run_is_served(
    client: TestClient, path: str, name: str
) -> None:
    assert client.get(path, params={"name": name}).status_code == 404


@pytest.mark.parametrize("name", ["report.html", "../pages.py", "..%2fpages.py", "%2e%2e/%2e%2e/pages.py", ""])
def test_only_the_files_of_the_pages_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(client: TestClient, method: str) -> None:
    assert client.request(method, "/run", params={"name": "a"}).status_code == 405


def test_the_state_is_small_and_names_findings(made_runs: MakeRun) -> None:
    with TestClient(live_app(made_runs("nan").path), base_url="http://127.0.0.1") as client:
        answer = client.get("/state", params={"name": "."})

    state = answer.json()
    assert len(answer.content) < 2000
    assert (state["step"], state["status"]) == (399, "finished")
    assert any(news["severity"] == "critical" for news in state["news"])


def test_hostile_names_stay_letters(tmp_path: Path) -> None:
    write_run(tmp_path / "root" / "<img src=x onerror=alert(1)>", steps=30, parameters=named_parameters(HOSTILE))
    with TestClient(live_app(tmp_path / "root"), base_url="http://127.0.0.1") as client:
        listed = Outline(client.get("/").text)
        page = Outline(client.get("/run", params={"name": "<img src=x onerror=alert(1)>"}).text)

    for shown in (listed, page):
        assert "img" not in {tag for tag, _ in shown.elements}
        assert not any(name.startswith("on") for _, found in shown.elements for name in found)


def test_a_name_of_another_host_is_refused(root: Path) -> None:
    with TestClient(live_app(root), base_url="http://evil.example") as client:
        assert client.get("/").status_code == 400


def test_without_the_token_nothing_is_served(root: Path) -> None:
    with TestClient(live_app(root, host=EVERYWHERE, token="s3cret")) as client:  # noqa: S106
        assert client.get("/").status_code == 401
        assert client.get("/", params={"token": "wrong"}).status_code == 401
        assert client.get("/static/page.css").status_code == 401


def test_with_the_token_a_browser_gets_a_cookie_and_the_token_leaves_the_address(root: Path) -> None:
    with TestClient(live_app(root, host=EVERYWHERE, token="s3cret")) as client:  # noqa: S106
        answer = client.get("/", params={"token": "s3cret"})

        assert answer.status_code == 200
        assert "token" not in str(answer.url)
        assert client.get("/run", params={"name": "a"}).status_code == 200


def test_a_program_may_bear_the_token(root: Path) -> None:
    with TestClient(live_app(root, host=EVERYWHERE, token="s3cret")) as client:  # noqa: S106
        assert client.get("/", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_only_so_many_runs_are_kept_open(tmp_path: Path) -> None:
    for i in range(MOST_OPEN + 3):
        write_run(tmp_path / str(i), steps=2, parameters=2)
    library = Library(tmp_path)
    for i in range(MOST_OPEN + 3):
        assert library.page(str(i)) is not None

    assert len(library._pages) == MOST_OPEN


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        (EVERYWHERE, False),
        ("192.168.1.5", False),
        ("node7", False),
    ],
)
def test_an_address_that_others_reach_gets_a_token(host: str, local: bool) -> None:
    assert is_local(host) is local
    assert (token_for(host, None) is None) is local
    assert token_for(host, "mine") == "mine"


def test_a_port_that_is_taken_is_an_error(root: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match=r"cannot listen on 127.0.0.1:\d+"):
            serve(root, port=taken.getsockname()[1])
