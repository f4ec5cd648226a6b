"""Restarts by torchrun: the run goes on, and says what happened."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradwatch as gw

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "elastic.py"
#: Seconds until a hang fails the test.
LIMIT = 120


class Torchrun:
    """Starts agents of torchrun, and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._agents = folder, list[subprocess.Popen[bytes]]()

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """An agent in a process group of its own."""
        command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1", *arguments]
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER", "RANK", "WORLD"))
        }
        with (self._folder / f"agent{len(self._agents)}.log").open("wb") as log:
            agent = subprocess.Popen(
                [*command, str(SCRIPT), str(self._folder / "run")],
                env={**inherited, "OMP_NUM_THREADS": "1", **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._agents.append(agent)
        return agent

    def log(self) -> str:
        """What the first agent and its workers said."""
        return (self._folder / "agent0.log").read_text(errors="replace")

    def close(self) -> None:
        """Kill."""
        for agent in self._agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Torchrun]:
    made = Torchrun(tmp_path)
    yield made
    made.close()


def marks(run: gw.Run) -> list[str]:
    return [event["text"] for event in run.events("mark") if "text" in event]


def test_a_run_goes_on_after_a_worker_was_killed_and_says_which(torchrun: Torchrun, tmp_path: Path) -> None:
    # Survivors are ended with the next look of the agent; by then they have told the store.
    agent = torchrun.start("--standalone", "--nproc-per-node=2", "--monitor-interval=2", LOSES="a worker")

    assert agent.wait(LIMIT) == 0, torchrun.log()
    run = gw.load(tmp_path / "run")
    assert run.info.status == "finished"
    assert list(run.grad_norms().index) == list(range(len(run.grad_norms())))
    assert len(run.grad_norms()) >= 10 + 20  # of the first start, what was flushed
    assert marks(run)[0].startswith(
        "restart 1 by torchrun; before it: rank 1 left without a word; rank 0: RuntimeError"
    )


def test_a_run_goes_on_with_the_nodes_that_are_left(torchrun: Torchrun, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (
        "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
        "--local-addr=127.0.0.1", "--rdzv-conf",
    )  # fmt: skip
    agent = torchrun.start(*arguments, "last_call_timeout=3,keep_alive_interval=1,is_host=true", LOSES="nothing")
    torchrun.start(*arguments, "last_call_timeout=3,keep_alive_interval=1,is_host=false", LOSES="the node")

    assert agent.wait(LIMIT) == 0, torchrun.log()
    run = gw.load(tmp_path / "run")
    assert run.info.world_size == 1
    assert list(run.grad_norms().index) == list(range(len(run.grad_norms())))
    assert len(run.grad_norms()) >= 10 + 20
    assert marks(run)[-1] == "resumed with 1 ranks; there were 2 before"
