"""The pages that `gradwatch serve` shows: the list of runs, and a run that renews itself. Read-only."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from gradwatch.errors import GradwatchError
from gradwatch.reader import RunReader
from gradwatch.records import Finding
from gradwatch.reporters import words
from gradwatch.reporters.access import is_local
from gradwatch.reporters.html import live_page
from gradwatch.reporters.listing import describe, find_runs
from gradwatch.reporters.templating import asset, environment, plotly_js

#: Runs that are kept open at once.
MOST_OPEN = 8
#: A page is drawn anew at most so often: this many seconds, and this many times as long as drawing it took.
LEAST_PAUSE, PAUSE_FACTOR = 1.0, 4.0
COOKIE = "gradwatch_token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Next = Callable[[Request], Awaitable[Response]]


class Page:
    """A run that stays open, with the page last drawn of it.

    Args:
        path: The run.
    """

    def __init__(self, path: Path) -> None:
        self._run = RunReader(path)
        self._lock = threading.Lock()
        self._drawn = ""
        self._of = ""
        self._not_before = 0.0

    def state(self) -> dict[str, Any]:
        """What changes, in few words: read at every look of a browser."""
        with self._lock:
            self._run.refresh()
            findings = self._run.finding_list()
            span = self._run.span
            news = [_news(f) for f in findings[-3:]]
            return {
                "version": self._version(), "status": self._run.info.status, "findings": len(findings),
                "step": span[1] if span else None, "news": news[::-1], "ready": time.monotonic() >= self._not_before,
            }  # fmt: skip

    def html(self, name: str) -> str:
        """The page, drawn anew when the run has changed and the last drawing is long enough ago."""
        with self._lock:
            self._run.refresh()
            current = self._version()
            if current != self._of and time.monotonic() >= self._not_before:
                started = time.monotonic()
                self._drawn, self._of = live_page(self._run, version=current, name=name), current
                took = time.monotonic() - started
                self._not_before = time.monotonic() + max(LEAST_PAUSE, PAUSE_FACTOR * took)
            return self._drawn

    def _version(self) -> str:
        events = len(self._run.finding_list()) + len(self._run.action_list())
        open_ones = sum(f.is_open for f in self._run.finding_list())
        return f"{len(self._run)}-{events}-{open_ones}-{self._run.info.status}"


def _news(finding: Finding) -> dict[str, Any]:
    text = words.visible(finding.message) or words.phrase(finding.rule)
    return {"severity": finding.severity, "step": finding.first_step, "open": finding.is_open, "text": text}


class Library:
    """The runs below a root, by the name under which a browser asks for them; nothing else can be asked for.

    Args:
        root: A run, or a directory with runs below it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> dict[str, Path]:
        """Name to path of every run that is there now."""
        return {
            "." if path == self.root else path.relative_to(self.root).as_posix(): path for path in find_runs(self.root)
        }

    def page(self, name: str) -> Page | None:
        """The open run of this name; None when there is none."""
        with self._lock:
            if name not in self._pages:
                path = self.names().get(name)
                if path is None:
                    return None
                self._pages[name] = Page(path)
            self._pages.move_to_end(name)
            while len(self._pages) > MOST_OPEN:
                self._pages.popitem(last=False)
            return self._pages[name]


def live_app(root: Path, *, host: str = "127.0.0.1", token: str | None = None) -> Starlette:
    """The application.

    Args:
        root: A run, or a directory with runs below it.
        host: Address that it will listen on; a local one answers only to local names (against DNS rebinding).
        token: What a browser must know, as `?token=`, cookie or bearer; None for no token.
    """
    library = Library(root)
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=_guard(token))]
    if is_local(host):
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))

    def home(_: Request) -> Response:
        names = library.names()
        if list(names) == ["."]:
            return RedirectResponse("run?name=.")
        rows = [(name, describe(path, library.root)) for name, path in names.items()]
        page = environment().get_template("list.html")
        return HTMLResponse(page.render(rows=rows, root=words.visible(str(library.root)), now=time.time()))

    def run(request: Request) -> Response:
        name = request.query_params.get("name", "")
        return _answer(library, name, lambda page: HTMLResponse(page.html(name)))

    def state(request: Request) -> Response:
        name = request.query_params.get("name", "")
        return _answer(library, name, lambda page: JSONResponse(page.state()))

    routes = [Route("/", home), Route("/run", run), Route("/state", state), Route("/static/{name}", _static)]
    return Starlette(routes=routes, middleware=middleware)


def _answer(library: Library, name: str, made: Callable[[Page], Response]) -> Response:
    try:
        page = library.page(name)
        return PlainTextResponse("There is no such run.", 404) if page is None else made(page)
    except GradwatchError as error:
        return PlainTextResponse(words.visible(str(error)), 503)


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "plotly.js":
        return Response(plotly_js(), media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})
    types = {"page.js": "text/javascript", "live.js": "text/javascript", "page.css": "text/css"}
    return Response(asset(name), media_type=types[name]) if name in types else PlainTextResponse("Not found.", 404)


def _guard(token: str | None) -> Callable[[Request, Next], Awaitable[Response]]:
    """Lets in who knows the token, and says to every browser what a page may load."""

    async def guard(request: Request, call_next: Next) -> Response:
        given = request.query_params.get("token")
        if token is not None:
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            known = (given or "", request.cookies.get(COOKIE, ""), bearer)
            if not any(secrets.compare_digest(k.encode(), token.encode()) for k in known):
                return PlainTextResponse("A token is needed: open the address that gradwatch serve printed.", 401)
        if given is not None and request.method == "GET":
            response: Response = RedirectResponse(str(request.url.remove_query_params("token")))
            response.set_cookie(COOKIE, given, httponly=True, samesite="strict")
            return response
        response = await call_next(request)
        response.headers.update(
            {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        )
        if "Cache-Control" not in response.headers:
            response.headers["Cache-Control"] = "no-store"
        return response

    return guard
