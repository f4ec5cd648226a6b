"""Starts the server of live pages: on this machine alone, or behind a token."""

from __future__ import annotations

import socket
from pathlib import Path

from gradwatch.errors import ConfigurationError, MissingDependencyError
from gradwatch.reporters.access import token_for


def serve(root: Path, *, host: str = "127.0.0.1", port: int = 8378, token: str | None = None) -> None:
    """Serve live pages until interrupted.

    Args:
        root: A run, or a directory with runs below it.
        host: Address to listen on.
        port: Port; 0 for any free one.
        token: What a browser must know; made up where the address can be reached from elsewhere and none is given.

    Raises:
        ConfigurationError: `root` is no directory, or the address cannot be listened on.
        MissingDependencyError: The extra `serve` is not installed.
    """
    if not root.is_dir():
        raise ConfigurationError.of("RUN_OR_ROOT", "a directory", str(root))
    try:
        import uvicorn

        from gradwatch.reporters.pages import live_app
    except ImportError as error:
        raise MissingDependencyError.of(error.name or "starlette", extra="serve") from error
    needed = token_for(host, token)
    with listen(host, port) as open_socket:
        where = f"http://{f'[{host}]' if ':' in host else host}:{open_socket.getsockname()[1]}/"
        print(f"Serving {root} at {where}{f'?token={needed}' if needed else ''} (Ctrl-C ends)", flush=True)  # noqa: T201
        config = uvicorn.Config(live_app(root, host=host, token=needed), log_level="warning")
        uvicorn.Server(config).run(sockets=[open_socket])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address.

    Raises:
        ConfigurationError: The address is in use, or not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
