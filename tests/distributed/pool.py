"""Processes that run scenarios together, kept for many tests because starting them takes seconds."""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any

#: Seconds for one scenario; a hang fails the test instead of the whole run.
LIMIT = 90.0
#: Seconds for the processes to start, which is mostly importing.
START = 240.0


class Pool:
    """`count` ranks of one process group, gloo on the loopback interface."""

    def __init__(self, count: int) -> None:
        self.count = count
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes: list[Any] = []
        self.processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, count, port, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)
        for pipe in self._pipes:
            if not pipe.poll(START):
                self.close()
                raise AssertionError("the ranks do not start")
            pipe.recv()

    def run(self, scenario: str, **arguments: Any) -> list[Any]:
        """What each rank's call of `MODULE:FUNCTION` returned; None of a rank that died.

        Without a module the function is one of `scenarios`.
        """
        for pipe in self._pipes:
            pipe.send((scenario, arguments))
        results: list[Any] = [None] * self.count
        waiting = dict(zip(self._pipes, range(self.count), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout=LIMIT)
            if not ready:
                self.close()
                raise AssertionError(f"ranks {sorted(waiting.values())} hang in {scenario!r}")
            for pipe in [pipe for pipe in self._pipes if pipe in ready]:
                rank = waiting.pop(pipe)
                try:
                    error, results[rank] = pipe.recv()
                except EOFError:
                    continue
                if error:
                    self.close()
                    raise AssertionError(f"rank {rank} in {scenario!r}:\n{error}")
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, count: int, port: int, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    pipe.send("ready")
    while True:
        name, arguments = pipe.recv()
        try:
            module, _, function = name.rpartition(":")
            scenarios = importlib.import_module(f"tests.distributed.{module or 'scenarios'}")
            pipe.send(("", getattr(scenarios, function)(**arguments)))
        except BaseException:  # noqa: BLE001 -- the test is told of it
            pipe.send((traceback.format_exc(), None))
